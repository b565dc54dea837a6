"""What models, rows and folders of this machine are called where others read it."""

import contextlib
import getpass
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from distill.markdown import escaped
from distill.records import read_record

WORDS = re.compile(r"label.*|id2label|.*label_map|text|slice|.*_tokens?|.*tokens_decoder")
"""Keys whose values are words of the task, its rows or the vocabulary, whatever they look like."""
_OF_THE_TRACKER = re.compile(r"run_name|project|logging_dir|hub_.*|trackio_.*")
"""Options that say where a training was followed, and not what was trained."""
_PATH = re.compile(r"~[\w.-]*/.*|\.{1,2}/.*|/[^/\s]+(/[^/]+)+/?|file://.*|[A-Za-z]:[/\\].*|\\\\.*", re.DOTALL)
_REST_OF_A_PATH = r"""(?:[/\\][^\s/\\"'`<>|*?:;,()\[\]{}]+)"""
_USUAL_ROOTS = (
    *("/home", "/Users", "/root", "/mnt", "/media", "/scratch", "/private", "/var", "/srv", "/opt", "/data", "/tmp"),
    *("/workspace", "/content"),
)
_USUAL_USERS = ("root", "user", "admin", "ubuntu", "runner", "jovyan", "nobody")
"""Names that tell of nobody."""
_CACHED_MODEL = re.compile(r"(?:models|datasets)--(?P<id>[^/\\]+)[/\\]")
_DATA_FILE = re.compile(r".*\.(csv|tsv|jsonl?|txt|parquet|gz|arrow|zip)")


class LocalNames:
    """What models, rows and folders of this machine are called where others read it.

    Args:
        folder: of the step that is pushed; the records of its run's other steps lie beside it.
        recipe: content of recipe.yaml.
        report: content of report.json.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], report: dict[str, Any]):
        run = folder.resolve().parent
        self._steps = recipe["steps"]
        self._sources: dict[str, str | None] = {}
        self._data_is_local: dict[str, bool] = {}
        for name in self._steps:
            record = read_record(run / name)
            self._sources |= record.get("sources", {})
            if record.get("data", {}).get("path") is not None:
                self._data_is_local[record["data"]["path"]] = record.get("data_revision") is None
        self._names: dict[str, str] = {}
        output_dir = Path(recipe["output_dir"]).expanduser()
        for name in self._steps:
            self._names[str(output_dir / name)] = self._names[str(run / name)] = name
        data = recipe.get("data") or {}
        references = [*self._sources, report["baseline"], *self._models(), data.get("path"), data.get("unlabelled")]
        taken = {*self._steps}
        for reference in dict.fromkeys(each for each in references if isinstance(each, str)):
            if reference not in self._steps and self._is_local(reference):
                location, digest = _split_digest(reference)
                name = base = base_name(location)
                count = 1
                while name in taken:
                    count += 1
                    name = f"{base}-{count}"
                taken.add(name)
                self._names[reference] = name + digest
                self._names[location] = name
        roots = [Path.home(), Path.cwd(), run, output_dir, Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE)]
        roots += map(Path, (tempfile.gettempdir(), *_USUAL_ROOTS))
        self._roots = {str(each) for root in roots for each in (root, root.resolve()) if len(each.parts) > 1}

    def _models(self) -> Iterator[str]:
        """Every model that the recipe names."""
        for options in self._steps.values():
            for key in ("model", "teacher"):
                value = options.get(key)
                yield from value if isinstance(value, list) else [value]

    def _is_local(self, reference: str) -> bool:
        location, _ = _split_digest(reference)
        if location.startswith("package:"):
            return False
        if reference in self._sources:
            return self._sources[reference] is None
        if reference in self._data_is_local:
            return self._data_is_local[reference]
        looks_local = _PATH.fullmatch(location) or _DATA_FILE.fullmatch(location) or location.count("/") > 1
        return bool(looks_local) or Path(location).expanduser().exists()

    def rewritten_recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A recipe that names no place here: its rows, models and output folder by their names alone."""
        found = self.rewritten({key: value for key, value in recipe.items() if key != "output_dir"})
        found["steps"] = {
            name: {key: value for key, value in options.items() if not _OF_THE_TRACKER.fullmatch(key)}
            for name, options in found["steps"].items()
        }
        head = {"task": found.pop("task")} if "task" in found else {}
        return {**head, "output_dir": f"runs/{base_name(str(Path(recipe['output_dir']).resolve()))}", **found}

    def rewritten(self, content: Any, key: str = "") -> Any:
        """The same content of JSON, its strings and keys without paths.

        Args:
            key: that the content stands under.
        """
        if WORDS.fullmatch(key):
            return content
        if isinstance(content, dict):
            return {self.in_text(name): self.rewritten(value, name) for name, value in content.items()}
        if isinstance(content, list):
            return [self.rewritten(value, key) for value in content]
        if not isinstance(content, str):
            return content
        if content in self._names:
            return self._names[content]
        return base_name(content) if _PATH.fullmatch(content) else self.in_text(content)

    def in_text(self, text: str, spelt: Callable[[str], str] = str) -> str:
        """A text, the paths in it replaced.

        Args:
            spelt: how the text writes a name, as Markdown.
        """
        for reference, name in sorted(self._names.items(), key=lambda pair: -len(pair[0])):
            if reference != name and len(re.findall(r"\w", reference)) > 2:  # `.` is no path in a sentence
                pattern = rf"(?<![\w./\\-]){re.escape(spelt(reference))}(?![\w-])"  # what lies in it keeps its name
                text = re.sub(pattern, lambda _, name=name: spelt(name), text)  # type: ignore[misc]
        for root in sorted(self._roots, key=len, reverse=True):
            depth = "*" if root.count("/") > 1 else "+"  # `/tmp` alone is a word
            pattern = rf"(?<![\w.-]){re.escape(spelt(root))}(?![\w.-]){_REST_OF_A_PATH}{depth}"
            text = re.sub(pattern, lambda found: base_name(found[0]), text)
        return text

    def in_markdown(self, text: str) -> str:
        """A card, the paths in it replaced."""
        return self.in_text(self.in_text(text), escaped)


def base_name(path: str) -> str:
    """What a path is called where others read it: a cached model by its id, all else by the name of file or folder.

    The user's name and the machine's are left out of it.
    """
    cached = _CACHED_MODEL.search(path)
    if cached:
        return cached["id"].replace("--", "/")
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    for of_here, instead in _names_of_here():
        name = re.sub(rf"(?<![A-Za-z0-9]){re.escape(of_here)}(?![A-Za-z0-9])", instead, name, flags=re.I)
    return "local" if name.strip(".~") == "" or name == Path.home().name else name


def _names_of_here() -> list[tuple[str, str]]:
    """The user's name and the machine's, and what stands for them."""
    host = socket.gethostname()
    found = [(host, "host"), (host.partition(".")[0], "host")]
    with contextlib.suppress(OSError, KeyError):  # an id without an entry, in a container
        found.append((getpass.getuser(), "user"))
    return [(name, instead) for name, instead in found if name and name not in _USUAL_USERS]


def _split_digest(reference: str) -> tuple[str, str]:
    location, mark, digest = reference.partition("#sha256=")
    return location, mark + digest
