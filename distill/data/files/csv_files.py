"""Rows of csv and tsv files, every cell as the text that stands there."""

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill.data.files.text_files import ending, text_lines
from distill.data.spill import Spill
from distill.errors import InputError

_SEPARATORS = ",;\t"
_ROWS_AT_ONCE = 50_000

_QUOTED: dict[str, Any] = {"strict": True}  # RFC 4180: a quote inside of a quoted cell is doubled
_BACKSLASHED: dict[str, Any] = {"strict": True, "escapechar": "\\"}  # as Spark and MySQL write
_LITERAL: dict[str, Any] = {"quoting": csv.QUOTE_NONE}  # tab-separated values as IANA has them


def read_separated(path: Path, label: str, notes: list[str]) -> pa.Table:
    """Read a csv or tsv file as columns of text, by the names of its first line; an empty cell is null.

    Commas, semicolons (of spreadsheets) or tabs separate the cells, by the header. Blank lines are left out.

    Args:
        path: the file, packed or not.
        label: the column whose values tell a row that was swallowed by an open quote.
        notes: what was read otherwise than csv's rules say is appended here.

    Raises:
        InputError: quotes that never close, rows of more or fewer cells than the header, names that stand twice.
    """
    with _cells_of_any_length():
        layout = _layout(path)
        try:
            found = _parse(path, layout, _QUOTED, label)
        except _BadQuotes as error:
            found = _parse_otherwise(path, layout, label, error)
        if layout.separator == "\t" and found.of_several_lines and (literal := _literal(path, layout, label)):
            found = literal
    problem = _swallowed(path, layout, found, label)
    if problem:
        raise InputError(problem)
    notes += [f"{path.name}: {note}" for note in layout.notes + found.notes] + found.of_text
    return _as_table(found)


@dataclass
class _Layout:
    separator: str
    spaces_follow: bool
    """Whether a space stands behind each separator."""
    wrapped: bool
    """Whether every line stands in quotes as a whole."""
    skipped: int
    """Lines before the header."""
    notes: list[str] = field(default_factory=list)


@dataclass
class _Found:
    names: list[str]
    chunks: list[pa.Table]
    notes: list[str]
    of_text: list[str]
    """Notes on the file's encoding."""
    of_several_lines: list[tuple[int, list[str]]]
    """Rows whose cells hold line breaks, with their first lines."""


class _BadQuotes(Exception):
    """Quotes that a dialect of csv does not have."""


def _layout(path: Path) -> _Layout:
    lines = text_lines(path, [])
    skipped, first = 0, next(lines, "")
    while first and not first.strip():
        skipped, first = skipped + 1, next(lines, "")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # a line for Excel
        return _Layout(first.strip()[4], spaces_follow=False, wrapped=False, skipped=skipped + 1)
    second = next((line for line in lines if line.strip()), "")
    inner = _unwrapped(first)
    wrapped = inner != first or (_width(first) > 1 and _unwrapped(second) != second)
    usual = "\t" if ending(path) == ".tsv" else _SEPARATORS[0]  # where the header has one as often as another, or none
    separator = max(usual + _SEPARATORS, key=lambda each: len(_split(inner, each)))
    notes = ["every line stands in quotes as a whole; they were taken off"] if wrapped else []
    later = _split(inner, separator)[1:]
    spaces = bool(later) and all(name.startswith(" ") for name in later)
    return _Layout(separator, spaces, wrapped, skipped, notes)


def _split(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator), [])


def _width(line: str) -> int:
    return max(len(_split(line, separator)) for separator in _SEPARATORS)


def _unwrapped(line: str) -> str:
    """Unwrap a line that is one quoted cell which holds several; any other stays as it is."""
    if not (line.startswith('"') and line.rstrip().endswith('"')):
        return line
    try:
        cells = next(csv.reader([line], strict=True))
    except csv.Error:
        return line
    return cells[0] + "\n" if len(cells) == 1 and _width(cells[0]) > 1 else line


def _all_unwrapped(lines: Iterable[str], layout: _Layout) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        inside = _unwrapped(line)
        if inside == line and line.strip() and number > layout.skipped + 1:
            raise InputError(f"line {number} is not one cell in quotes that holds several, as the second line is")
        yield inside


def _parse(path: Path, layout: _Layout, dialect: dict[str, Any], label: str) -> _Found:
    of_text: list[str] = []
    lines: Iterable[str] = text_lines(path, of_text)
    if layout.wrapped:
        lines = _all_unwrapped(lines, layout)
    rows = _numbered(csv.reader(_after(lines, layout), delimiter=layout.separator, **_spaced(dialect, layout)), layout)
    header = next(rows, (0, []))[1]
    names = _names(header, layout)
    found = _Found(names, [], [], of_text, [])
    chunks = Spill()
    kept: list[list[str]] = []
    ragged: list[tuple[int, int]] = []
    empty = 0
    for number, row in rows:
        if len(row) > len(names) and not any(row[len(names) :]):
            row = row[: len(names)]
        if not row or (len(names) > 1 and not any(cell.strip() for cell in row)):
            empty += bool(row) and len(row) > 1
            continue
        if len(row) != len(names):
            ragged.append((number, len(row)))
            continue
        if any("\n" in cell for cell in row):
            found.of_several_lines.append((number, row))
        kept.append(row)
        if len(kept) == _ROWS_AT_ONCE:
            chunks.add(_as_columns(kept, names))
            kept = []
    if ragged:
        raise InputError(_ragged(ragged, len(names), layout))
    chunks.add(_as_columns(kept, names))
    found.chunks = chunks.tables()
    if empty:
        found.notes.append(f"{empty} rows without a filled cell were left out")
    return found


def _spaced(dialect: dict[str, Any], layout: _Layout) -> dict[str, Any]:
    return dialect | {"skipinitialspace": layout.spaces_follow}


def _after(lines: Iterable[str], layout: _Layout) -> Iterator[str]:
    """Iterate over the lines from the header on."""
    for number, line in enumerate(lines):
        if number >= layout.skipped:
            yield line


def _numbered(reader: Any, layout: _Layout) -> Iterator[tuple[int, list[str]]]:
    """Iterate over rows with the number of the line on which each begins."""
    begins = layout.skipped + 1
    try:
        for row in reader:
            yield begins, row
            begins = layout.skipped + reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            problem = f"a quote that opens on line {begins} never closes, and swallows all that follows"
        else:
            last = layout.skipped + reader.line_num
            lines = f"line {begins}" if last == begins else f"lines {begins} to {last}"
            problem = f"{lines}: a quote opens or closes in the middle of a cell"
        raise _BadQuotes(f"{problem}; put the whole cell in quotes, and write a quote inside of it twice") from None


def _names(header: list[str], layout: _Layout) -> list[str]:
    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(header)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"line {layout.skipped + 1} names column {twice[0]!r} twice; rename or remove one of them")
    return names


def _ragged(rows: list[tuple[int, int]], width: int, layout: _Layout) -> str:
    number, cells = rows[0]
    more = f" ({len(rows)} lines are like it)" if len(rows) > 1 else ""
    if cells > width:
        return (
            f"line {number} has {cells} cells{more}, more cells than the header has names; put texts that "
            f"hold {layout.separator!r} in quotes"
        )
    return f"line {number} has {cells} cells{more}, and the header has {width} names; fill or remove what is missing"


def _parse_otherwise(path: Path, layout: _Layout, label: str, error: _BadQuotes) -> _Found:
    """Parse with backslashes before quotes, or, between tabs, with quotes as text; else raise the first error."""
    try:
        found = _parse(path, layout, _BACKSLASHED, label)
    except (_BadQuotes, InputError):
        literal = _literal(path, layout, label) if layout.separator == "\t" else None
        if literal is None:
            raise InputError(str(error)) from None
        return literal
    found.notes.append("backslashes stand before quotes inside of cells; they were taken off")
    return found


def _literal(path: Path, layout: _Layout, label: str) -> _Found | None:
    """Parse with quotes as part of the text, where every line then has the header's number of cells."""
    try:
        found = _parse(path, layout, _LITERAL, label)
    except (InputError, _BadQuotes):
        return None
    found.notes.append("quotes do not enclose cells; they were read as part of the text")
    return found


def _swallowed(path: Path, layout: _Layout, found: _Found, label: str) -> str | None:
    """Say where an open quote that another one closes has made a cell of several rows; None where none has."""
    if not found.of_several_lines or label not in found.names:
        return None
    place = found.names.index(label)
    several = Counter(row[place] for _, row in found.of_several_lines)
    known = Counter(value for chunk in found.chunks for value in chunk[label].to_pylist() if value is not None)
    labels = {value for value, count in known.items() if count > several[value]}
    for number, row in found.of_several_lines:
        for column, cell in enumerate(row):
            first, *inner = cell.split("\n")
            if not inner:
                continue
            whole = [_cells(line, layout) for line in inner[:-1]]
            if column < place:  # the label must stand in the cell, and not before or behind it, as in any row
                whole.append([*row[:column], *_cells(first, layout)])
            elif column > place:
                whole.append([*_cells(inner[-1], layout), *row[column + 1 :]])
            if any(len(cells) == len(found.names) and cells[place].strip('"\r') in labels for cells in whole):
                return (
                    f"a quote that opens on line {number} closes {len(inner)} lines later, and swallows rows between; "
                    "put the whole cell in quotes, and write a quote inside of it twice"
                )
    return None


def _cells(line: str, layout: _Layout) -> list[str]:
    return next(csv.reader([line], delimiter=layout.separator, quoting=csv.QUOTE_NONE), [])


def _as_columns(rows: list[list[str]], names: list[str]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table([pa.array([cell or None for cell in cells], pa.string()) for cells in columns], names)


def _as_table(found: _Found) -> pa.Table:
    table = pa.concat_tables(found.chunks)
    unnamed = [name for name in table.column_names if name.startswith("Unnamed: ")]
    return table.drop_columns([name for name in unnamed if table[name].null_count == len(table)])


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Let csv read cells of more than 131,072 characters, which it refuses by default; the limit is the whole
    process's.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
