"""Columns of Arrow tables as the rest of the package knows them, whatever wrote them."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

_INTEGER = r"^-?(0|[1-9]\d*)$"
_NUMBER = r"^-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
"""What stands for a number and nothing else: 007, +1 and 1_000 are names."""

_BOOLEAN = r"^(?i:true|false)$"


def with_numbers(tables: Mapping[str, pa.Table], text: tuple[str, ...], label: str) -> dict[str, pa.Table]:
    """Convert the columns of text tables to numbers where every cell, in every split, is a number.

    The label `true` stays text, since its name is what the file says; other columns of true and false become booleans.

    Args:
        tables: of each split.
        text: columns that stay text whatever they hold.
        label: the label's column.
    """
    converted = dict(tables)
    for name in dict.fromkeys(name for table in tables.values() for name in table.column_names if name not in text):
        parts = {split: table[name] for split, table in tables.items() if name in table.column_names}
        wanted = _type_of(list(parts.values()), may_be_boolean=name != label)
        for split, column in parts.items():
            place = converted[split].column_names.index(name)
            cells = pc.equal(pc.utf8_lower(column), "true") if pa.types.is_boolean(wanted) else column.cast(wanted)
            converted[split] = converted[split].set_column(place, name, cells)
    return converted


def _type_of(columns: list[pa.ChunkedArray], *, may_be_boolean: bool) -> pa.DataType:
    if all(column.null_count == len(column) for column in columns):
        return pa.string()
    if _all_match(columns, _INTEGER):
        try:
            [column.cast(pa.int64()) for column in columns]
        except pa.ArrowInvalid:  # more digits than 64 bits hold
            return pa.string()
        return pa.int64()
    if _all_match(columns, _NUMBER):
        return pa.float64()
    if may_be_boolean and _all_match(columns, _BOOLEAN):
        return pa.bool_()
    return pa.string()


def _all_match(columns: list[pa.ChunkedArray], pattern: str) -> bool:
    return all(pc.all(pc.match_substring_regex(column, pattern)).as_py() is not False for column in columns)


def plain_types(table: pa.Table) -> pa.Table:
    """Cast text and lists of the types that polars, DuckDB and arrow itself write to the usual ones."""
    for place, field in enumerate(table.schema):
        wanted = _plain(field.type)
        if wanted != field.type:
            table = table.set_column(place, field.with_type(wanted), table[place].cast(wanted))
    return table


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_decimal(kind):
        return pa.float64()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    listed = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
    if any(of_lists(kind) for of_lists in listed):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind
