"""Rows of json and jsonl files, with the types that JSON gives them."""

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill.data.files.text_files import ending, text_lines
from distill.data.spill import Spill
from distill.errors import InputError

_ROWS_AT_ONCE = 50_000

_Row = tuple[int, dict[str, Any]]
"""A row with the number of its line, or with its own where the file is one list."""


def read_json(path: Path, columns: Iterable[str], notes: list[str]) -> pa.Table:
    """Read the rows of a file of one JSON object a line, or of one list of objects.

    A column that holds numbers in some rows and text in others is text in all. Half of a surrogate pair, which is no
    character, is read as U+FFFD.

    Args:
        path: the file, packed or not.
        columns: those that the task reads; only what is done to them is noted.
        notes: what was changed or left out is appended here.

    Raises:
        InputError: rows that are no objects, or a column with lists in some rows only.
        ValueError: no JSON, or keys that stand twice.
    """
    of_text: list[str] = []
    rows, unit = _rows(path, of_text)
    columns = set(columns)
    chunks, sizes = Spill(), []
    lines = array("q")
    remarks: list[str] = []
    while found := _columns(itertools.islice(rows, _ROWS_AT_ONCE)):
        of_part, values = found
        lines.extend(of_part)
        chunk = {
            name: _array(name, of_column, of_part, unit, name in columns, remarks) for name, of_column in values.items()
        }
        chunks.add(pa.table(chunk))
        sizes.append(len(of_part))
    table = _joined(chunks.tables(), sizes, lines, unit, columns, remarks)
    notes += of_text + [f"{path.name}: {note}" for note in dict.fromkeys(remarks)]
    return table


def _columns(rows: Iterable[_Row]) -> tuple[list[int], dict[str, list[Any]]] | None:
    """Sort some rows into columns, with the rows' numbers; None where there is no row."""
    numbers: list[int] = []
    columns: dict[str, list[Any]] = {}
    for count, (number, row) in enumerate(rows):
        numbers.append(number)
        for name, value in row.items():
            if name not in columns:
                columns[name] = [None] * count
            columns[name].append(value)
        if len(row) < len(columns):
            for values in columns.values():
                values.extend([None] * (count + 1 - len(values)))
    return (numbers, columns) if numbers else None


def _rows(path: Path, notes: list[str]) -> tuple[Iterator[_Row], str]:
    """Open a file's rows, and say whether a `line` or a `row` is what is counted."""
    lines = text_lines(path, notes)
    start = next((line for line in lines if line.strip()), "")
    try:
        value = json.loads(start) if start.strip() else {}
        of_lines = isinstance(value, dict)
    except ValueError:
        of_lines = ending(path) == ".jsonl" and not start.lstrip().startswith("[") and start.strip() != "{"
    if of_lines:
        return _of_lines(path, notes), "line"
    return _of_list(path, notes), "row"


def _of_lines(path: Path, notes: list[str]) -> Iterator[_Row]:
    for number, line in enumerate(text_lines(path, notes), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"line {number} is no object with a value for each column, but {_kind(row)}")
        yield number, row


def _of_list(path: Path, notes: list[str]) -> Iterator[_Row]:
    """Read the rows of a file that is one list of objects, or an object with one such list and nothing else of rows."""
    value = json.loads("".join(text_lines(path, notes)), object_pairs_hook=_object)
    if isinstance(value, dict):
        lists = {
            key: each for key, each in value.items() if _kind(each) == "lists" and each and _kind(each[0]) == "objects"
        }
        if len(lists) > 1:
            raise InputError(f"holds several lists of rows ({', '.join(lists)}); write each into a file of its own")
        if lists:
            key, value = next(iter(lists.items()))
            notes.append(f"{path.name}: its rows are the list {key!r}")
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"row {number} is no object with a value for each column, but {_kind(row)}")
        yield number, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in an object")
    return found


def _array(name: str, values: list[Any], lines: Sequence[int], unit: str, used: bool, remarks: list[str]) -> pa.Array:
    """Make one column of some rows, as text where its values are of several types."""
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        whole = [_without_halves(value) for value in values]
        # Strings differ where a half was replaced; NaN differs from itself, and is no string.
        changed = [line for line, old, new in zip(lines, values, whole, strict=True) if repr(old) != repr(new)]
        if used:
            remarks.append(
                f"{len(changed)} rows of column {name!r} hold half of a surrogate pair, read as U+FFFD (the first is "
                f"{unit} {changed[0]})"
            )
        return _array(name, whole, lines, unit, used, remarks)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return _of_several_types(name, values, lines, unit, used, remarks)


def _of_several_types(
    name: str, values: list[Any], lines: Sequence[int], unit: str, used: bool, remarks: list[str]
) -> pa.Array:
    present = [(line, value) for line, value in zip(lines, values, strict=True) if value is not None]
    first = present[0][1]
    other = next(((line, value) for line, value in present if _kind(value) != _kind(first)), None)
    nested = any(isinstance(value, list | dict) for _, value in present)
    if used and nested and other is not None:
        raise InputError(f"column {name!r} holds {_kind(first)} at first, but {_kind(other[1])} on {unit} {other[0]}")
    try:
        array = pa.array([_as_text(value) for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        if used:
            raise InputError(
                f"column {name!r} holds nested values beside plain ones ({error}); give all one form"
            ) from None
        return pa.array([None if value is None else json.dumps(value) for value in values])
    if used:
        where = f", from {unit} {other[0]} on {_kind(other[1])} too" if other else " of several types or sizes"
        remarks.append(f"column {name!r} holds {_kind(first)}{where}; all are read as text")
    return array


def _joined(
    chunks: list[pa.Table], sizes: list[int], lines: Sequence[int], unit: str, columns: set[str], remarks: list[str]
) -> pa.Table:
    """Join the chunks to one table; a column that differs in type between them becomes text."""
    joined = {}
    for name in dict.fromkeys(name for chunk in chunks for name in chunk.column_names):
        parts = [
            chunk[name] if name in chunk.column_names else pa.chunked_array([pa.nulls(size)])
            for chunk, size in zip(chunks, sizes, strict=True)
        ]
        fields = [pa.schema([(name, part.type)]) for part in parts]
        try:
            wanted = pa.unify_schemas(fields, promote_options="permissive").field(0).type
            cast = (part if part.type == wanted else part.cast(wanted) for part in parts)
            joined[name] = pa.chunked_array([piece for part in cast for piece in part.chunks], wanted)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            values = [value for part in parts for value in part.to_pylist()]
            joined[name] = _of_several_types(name, values, lines, unit, name in columns, remarks)
    return pa.table(joined)


def _as_text(value: Any) -> Any:
    """Write a value as text, numbers and booleans as JSON writes them, inside of lists too."""
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    if isinstance(value, dict):
        return {key: _as_text(each) for key, each in value.items()}
    if value is None or value != value:  # NaN is how pandas writes what is missing
        return None
    return value if isinstance(value, str) else json.dumps(value)


def _without_halves(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_without_halves(each) for each in value]
    if isinstance(value, dict):
        return {_without_halves(key): _without_halves(each) for key, each in value.items()}
    return value


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "numbers", float: "numbers", list: "lists", dict: "objects"}
    return names.get(type(value), "null")
