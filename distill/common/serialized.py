"""Dataclasses as JSON and back, and JSON as we write it."""

import json
import math
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

Record = TypeVar("Record")


def from_json(record: type[Record], content: dict[str, Any]) -> Record:
    """Make a dataclass of the JSON that `asdict` gave of it; keys that it doesn't know are left out.

    Raises:
        TypeError: a key without a default is missing.
        ValueError: a mapping or a list stands where none can be.
    """
    hints = typing.get_type_hints(record)
    known = [each.name for each in fields(record) if each.name in content]  # type: ignore[arg-type]
    return record(**{name: _as_hinted(content[name], hints[name]) for name in known})


def _as_hinted(value: Any, hint: Any) -> Any:
    """A value of JSON, with dataclasses in the places where a hint has them."""
    kind, inside = typing.get_origin(hint), typing.get_args(hint)
    if not _has_dataclass(hint) or (value is None and kind in (typing.Union, types.UnionType)):
        return value
    if kind in (typing.Union, types.UnionType):
        return _as_hinted(value, next(each for each in inside if _has_dataclass(each)))
    if kind is list:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is no list")
        return [_as_hinted(each, inside[0]) for each in value]
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no mapping")
    if kind is dict:
        return {key: _as_hinted(each, inside[1]) for key, each in value.items()}
    return from_json(hint, value)


def _has_dataclass(hint: Any) -> bool:
    return is_dataclass(hint) or any(_has_dataclass(each) for each in typing.get_args(hint))


def as_json(record: Any) -> str:
    """The text of a record's file, from its dataclass."""
    return json_text(asdict(record)) + "\n"


def json_text(content: Any, *, indent: int | None = 1) -> str:
    """JSON that every reader takes: null for numbers that are not finite, half surrogates written out.

    Args:
        indent: spaces for each level; None puts all on one line.
    """
    text = json.dumps(finite(content), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def finite(content: Any) -> Any:
    """The same with None for each number that is not finite, which JSON has no word for."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
