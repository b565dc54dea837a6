"""What a push sends of a run folder: known files alone, without the paths and names of this machine, and no tokens."""

import io
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from distill.common.credentials import known_secrets, refuse_secrets, refuse_secrets_under
from distill.common.local_names import LocalNames
from distill.common.records import Report
from distill.common.serialized import from_json, json_text
from distill.common.sources import reason_of
from distill.errors import InputError
from distill.models.folders import EXPORT_RECORD, export_files, is_export
from distill.recipes.yaml12 import dump_yaml, parse_yaml
from distill.reports.presentation import draw

_CONFIGS = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "sensitivity.json", "qat.json"),
    EXPORT_RECORD,
)
"""Small JSON files, in which a path becomes a name."""

_VOCABULARIES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("normalizer.json", "entity_vocab.json", "vocab-src.json", "vocab-tgt.json", "word_shape.json"),
    *("word_pronunciation.json", "byte_maps.json", "emoji.json", "bpe.codes", "chat_template.jinja"),
)
"""Text of tokens, which stays as it is."""

_SENTENCEPIECE = ("spiece.model", "spm.model", "sentencepiece.bpe.model", "sentencepiece.model", "tokenizer.model")
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors")
_WEIGHTS_INDEX = "model.safetensors.index.json"
_PLOTS = ("sensitivity.png",)
_OWN = ("step.json", "pushed.json", "profile.json", "profile.md", "README.md")
"""What a run writes for itself; a push writes the card anew."""


def published(folder: Path, names: LocalNames, report: Report) -> dict[str, Path | bytes]:
    """What goes up of a run folder and of its run, without the card: for each name a file, or its content.

    Args:
        folder: of a finished step; recipe.yaml and report.* of its run lie beside it.
        names: of the run.
        report: of the run.

    Raises:
        InputError: something in it looks like a token or a password, or weights name a path.
    """
    run, secrets = folder.resolve().parent, known_secrets()
    found: dict[str, Path | bytes] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.name in _CONFIGS:
            found[path.name] = _rewritten(path, names.rewritten, secrets)
        elif path.name in (*_VOCABULARIES, _WEIGHTS_INDEX):
            refuse_secrets(path.name, path.read_text(encoding="utf-8", errors="replace"), secrets)
            found[path.name] = path
        elif path.name in _SENTENCEPIECE:
            found[path.name] = path
        elif path.name in _PLOTS:
            found[path.name] = without_text_chunks(path.read_bytes())
        elif _WEIGHTS.fullmatch(path.name):
            _check_metadata(path, names, secrets)
            found[path.name] = path
    for path in export_files(folder) if is_export(folder) else ():
        if path.suffix == ".xml":
            refuse_secrets(path.name, path.read_text(encoding="utf-8"), secrets)
        found[path.relative_to(folder).as_posix()] = path
    found["recipe.yaml"] = _rewritten(run / "recipe.yaml", names.rewritten_recipe, secrets, parse_yaml, dump_yaml)
    found["report.json"] = _rewritten(
        run / "report.json", lambda content: names.rewritten(without_rows(content)), secrets
    )
    plot = run / "report.png"
    if plot.is_file():
        is_public = not any(model.name != names.in_text(model.name) for model in report.models)
        found["report.png"] = without_text_chunks(plot.read_bytes() if is_public else _drawn(names, report))
    return found


def left_out(folder: Path) -> list[str]:
    """What lies in a run folder and is not pushed, as no file of a model that others load; a run's own files aside."""
    known = (*_CONFIGS, *_VOCABULARIES, *_SENTENCEPIECE, *_PLOTS, *_OWN, _WEIGHTS_INDEX)
    exported = {path.parent for path in export_files(folder)} if is_export(folder) else set()
    return [
        path.name + "/" * path.is_dir()
        for path in sorted(folder.iterdir())
        if path not in exported and (path.is_dir() or not (path.name in known or _WEIGHTS.fullmatch(path.name)))
    ]


def without_rows(report: dict[str, Any]) -> dict[str, Any]:
    """A report without the texts of rows."""
    kept = {key: None if key == "worst_rows" else value for key, value in report.items()}
    contamination = kept.get("contamination")
    if isinstance(contamination, dict):
        kept["contamination"] = {key: None if key == "examples" else value for key, value in contamination.items()}
    return kept


# --- files -----------------------------------------------------------------------------------------------------------


def _check_metadata(weights: Path, names: LocalNames, secrets: Mapping[str, re.Pattern]) -> None:
    """Raise where the header of a safetensors file tells more than of tensors."""
    try:
        with safe_open(weights, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights}: cannot be read ({reason_of(error)})") from None
    refuse_secrets_under(weights.name, metadata, secrets, ("__metadata__",))
    for key, value in metadata.items():
        if names.rewritten(value) != value:
            raise InputError(f"{weights}: its metadata names a path here under {key!r}; save the file without it")


def _rewritten(
    file: Path,
    rewrite: Callable[[Any], Any],
    secrets: Mapping[str, re.Pattern],
    parse: Callable[[str], Any] = json.loads,
    dump: Callable[[Any], str] = lambda content: json_text(content, indent=2) + "\n",
) -> Path | bytes:
    """A file as it is, or what is sent instead.

    Raises:
        InputError: it can't be read, or holds what looks like a token.
    """
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read ({reason_of(error)})") from None
    refuse_secrets_under(file.name, content, secrets)
    changed = rewrite(content)
    return file if changed == content else dump(changed).encode()


def without_text_chunks(png: bytes) -> bytes:
    """A PNG image without the chunks that hold texts, times and camera data (PNG 1.2, section 4.2)."""
    kept, place = [png[:8]], 8
    while place + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        end = place + 12 + length
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"eXIf"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def _drawn(names: LocalNames, report: Report) -> bytes:
    """The plot of a report, with the names that others read."""
    drawn = io.BytesIO()
    draw(from_json(Report, names.rewritten(asdict(report))), drawn)
    return drawn.getvalue()
