"""What models, rows and folders of this machine are called where others read it."""

import contextlib
import getpass
import itertools
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from distill.common.markdown import escaped
from distill.common.records import Report, read_step

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
        report: of the run.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], report: Report):
        run, output_dir = folder.resolve().parent, Path(os.path.expanduser(recipe["output_dir"]))
        self._steps: dict[str, dict[str, Any]] = recipe["steps"]
        self._is_local: dict[str, bool] = {}
        """For the models and rows that the run's records tell of."""
        for record in (read_step(run / name) for name in self._steps):
            if record is None:
                continue
            self._is_local |= {name: revision is None for name, revision in record.sources.items()}
            if record.data:
                self._is_local[record.data["path"]] = record.data_revision is None
        self._names = {str(place / name): name for name in self._steps for place in (output_dir, run)}
        data = recipe.get("data") or {}
        self._add_names([*self._is_local, report.baseline, *self._models(), data.get("path"), data.get("unlabelled")])
        roots = [_home(), Path.cwd(), run, output_dir, Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE)]
        roots += map(Path, (tempfile.gettempdir(), *_USUAL_ROOTS))
        self._roots = {str(each) for root in roots for each in (root, root.resolve()) if len(each.parts) > 1}

    def _models(self) -> Iterator[str | None]:
        """Every model that the recipe names."""
        for options in self._steps.values():
            for key in ("model", "teacher"):
                value = options.get(key)
                yield from value if isinstance(value, list) else [value]

    def _add_names(self, references: list[str | None]) -> None:
        """Call each of them that lies here by its base name, which is made another's than a step's or an earlier's."""
        taken = {*self._steps}
        for reference in dict.fromkeys(each for each in references if each is not None and each not in self._steps):
            location, digest = _split_digest(reference)
            if not self._lies_here(reference, location):
                continue
            base = base_name(location)
            numbered = (f"{base}-{number}" for number in itertools.count(2))
            name = next(each for each in itertools.chain([base], numbered) if each not in taken)
            taken.add(name)
            self._names |= {reference: name + digest, location: name}

    def _lies_here(self, reference: str, location: str) -> bool:
        if location.startswith("package:"):
            return False
        if reference in self._is_local:
            return self._is_local[reference]
        looks_local = _PATH.fullmatch(location) or _DATA_FILE.fullmatch(location) or location.count("/") > 1
        return bool(looks_local) or os.path.exists(location)

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
    return "local" if name.strip(".~") == "" or name == _home().name else name


def _home() -> Path:
    return Path(os.path.expanduser("~"))  # `~` itself for a user without one


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
