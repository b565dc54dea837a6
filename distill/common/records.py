"""What a run folder says of itself, step.json, and JSON as we write it."""

import json
import math
from pathlib import Path
from typing import Any

from distill.errors import InputError

SCHEMA = 1
"""Of step.json and report.json: what their keys mean."""


def read_record(folder: Path, name: str = "step.json") -> dict[str, Any]:
    """A run folder's step.json, or another record in it; empty where there is none, or what is left of one.

    Raises:
        InputError: it may not be read, or another version of distill wrote it with a schema of its own.
    """
    file = folder / name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no JSON, no text
        return {}
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        return {}
    refuse_unknown_schema(file, content)
    return content


def refuse_unknown_schema(file: Path, content: dict[str, Any]) -> None:
    """Refuse a record whose keys may mean something else; one that names no schema has none to mistake.

    Raises:
        InputError: its schema is not the one that is read here.
    """
    if content.get("schema", SCHEMA) != SCHEMA:
        raise InputError(f"{file}: has schema {content['schema']}, and this version of distill reads schema {SCHEMA}")


def json_text(content: Any, *, indent: int | None = 1) -> str:
    """JSON that every reader takes: null for numbers that are not finite, half surrogates written out."""
    text = json.dumps(finite(content), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def finite(content: Any) -> Any:
    """The same with None for each number that is not finite, which JSON has no word for."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
