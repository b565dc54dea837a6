"""Read the splits of a data set: from the Hub, from csv, json and parquet files, or from folders of classes."""

import glob
import lzma
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.table import InMemoryTable

from distill.common.sources import (
    hub_problem,
    locate,
    reason_of,
    sha256,
    split_revision,
)
from distill.data.files.class_folders import (
    named_images,
    read_image_folders,
    read_text_folders,
    with_images,
)
from distill.data.files.csv_files import read_separated
from distill.data.files.json_files import read_json
from distill.data.files.split_files import (
    READABLE,
    is_readable,
    split_files,
    with_usual_names,
)
from distill.data.files.tables import plain_types, with_numbers
from distill.data.files.text_files import PACKED, ending
from distill.data.spill import Spill
from distill.errors import InputError
from distill.tasks.base import Task
from distill.tasks.kinds import KINDS

GLUE_ON_THE_HUB = "nyu-mll/glue"

_COMMIT = re.compile("[0-9a-f]{40}")

_ROWS_AT_ONCE = 50_000


@dataclass(frozen=True)
class SplitsRead:
    """The splits of a data set as they were read, before any column is checked."""

    splits: dict[str, datasets.Dataset]
    fingerprint: str
    """Changes with the rows of the source."""
    notes: tuple[str, ...]
    """What was done to read them that their source does not say."""


def read_splits(task: Task, path: str | None, name: str | None, *, key: str = "data.path") -> SplitsRead:
    """Read the splits of a data set under their usual names (`dev` is `validation`), and hash their source.

    Args:
        task: its name says which part of GLUE, where `path` is None.
        path: a file (all of it `train`), a folder, `package:…`, or a Hub data set.
        name: the Hub data set's configuration.
        key: of the recipe, for messages.

    Raises:
        InputError: nothing there, or not readable.
    """
    try:
        location = locate(path or GLUE_ON_THE_HUB)
        return _read(task, location, name if path else task.name)
    except InputError as error:
        raise InputError(*(f"{key}: {problem}" for problem in error.problems)) from None


def _read(task: Task, location: str | Path, name: str | None) -> SplitsRead:
    notes: list[str] = []
    of_images = KINDS[task.kind].reads == "images"
    if isinstance(location, str):
        return _read_hub(location, name, task)
    files = {"train": [location]} if location.is_file() else split_files(location, task, notes)
    if files:
        digests = {split: [sha256(path) for path in paths] for split, paths in files.items()}
        fingerprint = " ".join(f"{split} {' '.join(of_split)}" for split, of_split in digests.items())
        found = _read_files(files, task, {split: each[0][:16] for split, each in digests.items()}, notes)
        if of_images:
            fingerprint += "".join(f" {split} images {named_images(found[split], task.text[0])}" for split in files)
    else:
        fingerprint = sha256(location)
        found = read_image_folders(location, task) if of_images else read_text_folders(location, task, notes)
    return SplitsRead(found, fingerprint, tuple(dict.fromkeys(notes)))


def _read_files(
    files: Mapping[str, list[Path]], task: Task, fingerprints: Mapping[str, str], notes: list[str]
) -> dict[str, datasets.Dataset]:
    """Read the rows of each split's files."""
    of_images = KINDS[task.kind].reads == "images"
    if of_images and all(ending(paths[0]) == ".parquet" for paths in files.values()):
        # Images stay on disk; as patterns, brackets and stars in the paths would name other files.
        found = {split: _from_disk(paths) for split, paths in files.items()}
    else:
        tables = {split: _read_shards(paths, task, notes) for split, paths in files.items()}
        of_text = {split: table for split, table in tables.items() if ending(files[split][0]) in (".csv", ".tsv")}
        tables |= with_numbers(of_text, text=task.text, label=task.label)
        found = {
            split: datasets.Dataset(InMemoryTable(table), fingerprint=fingerprints[split])
            for split, table in tables.items()
        }
    if of_images:
        return {split: with_images(rows, files[split][0].parent, task.text[0]) for split, rows in found.items()}
    return found


def _from_disk(paths: list[Path]) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_parquet([glob.escape(str(path)) for path in paths])  # type: ignore[return-value]
    except Exception as error:  # pyarrow and datasets raise their own kinds
        raise InputError(f"{paths[0]}: cannot be read as parquet ({reason_of(error.__cause__ or error)})") from error


def _read_shards(paths: list[Path], task: Task, notes: list[str]) -> pa.Table:
    shards = Spill()
    first: list[str] = []
    for path in paths:
        table = _read_file(path, task, notes)
        first = first or table.column_names
        if set(table.column_names) != set(first):
            columns = ", ".join(table.column_names), ", ".join(first)
            raise InputError(f"{path}: has the columns {columns[0]}, but {paths[0].name} has {columns[1]}")
        if len(paths) == 1:
            return table
        shards.add(table)
    try:
        return pa.concat_tables(shards.tables(), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"{paths[0].parent}: columns of {paths[0].name} and the like differ in type ({error})"
        ) from None


def _read_hub(reference: str, name: str | None, task: Task) -> SplitsRead:
    where = f"{reference} ({name})" if name else reference
    path, wanted = split_revision(reference)
    try:
        loaded = datasets.load_dataset(path, name, revision=wanted)
    except Exception as error:  # the Hub client, the network and each builder raise their own kinds
        raise InputError(
            f"{hub_problem(error, reference, where=where, nothing_here='no such file or folder here')}. "
            "Without a network, give it a local folder with train.* and validation.* files"
        ) from None
    if not isinstance(loaded, dict):
        raise InputError(f"{where} has no splits")
    found = hub_revision(loaded)
    if wanted is not None and found is not None and _COMMIT.fullmatch(wanted) and found != wanted:
        # Without a network, datasets takes what was cached last, whatever revision was asked for.
        raise InputError(f"{where}: not to be had from the Hub now, and its cache holds another revision, {found}")
    fingerprint = " ".join(f"{split} {rows._fingerprint}" for split, rows in loaded.items())
    try:
        usual = with_usual_names(loaded, task)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    notes = [f"{split}: {found} of {where}" for found, split in usual.items() if found != split]
    return SplitsRead({usual[split]: rows for split, rows in loaded.items()}, fingerprint, tuple(notes))


def hub_revision(splits: Mapping[str, datasets.Dataset]) -> str | None:
    """Find the commit that rows from the Hub were read from; None for rows of files.

    datasets tells it nowhere, but keeps the rows of each commit in a folder named after it.
    """
    folders = [Path(file["filename"]).parent.name for rows in splits.values() for file in rows.cache_files]
    return next((name for name in folders if _COMMIT.fullmatch(name)), None)


def _read_file(path: Path, task: Task, notes: list[str]) -> pa.Table:
    """Read the columns of one file; those of csv and tsv are text, whatever stands in them."""
    if not is_readable(path):
        raise InputError(f"{path}: not a {', '.join(READABLE)} file")
    suffix = ending(path)
    shown = suffix[1:] + (path.suffix.lower() if path.suffix.lower() in PACKED else "")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        if suffix == ".parquet":
            table = _read_parquet(path)
        elif suffix in (".json", ".jsonl"):
            table = read_json(path, (*task.text, task.label), notes)
        else:
            table = read_separated(path, task.label, notes)
    except InputError as error:
        raise InputError(*(f"{path}: {problem}" for problem in error.problems)) from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {shown} ({reason_of(error)})") from error
    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: column {twice!r} stands there twice; rename or remove one of them")
    if len(table) == 0:
        raise InputError(f"{path}: the file holds no rows")
    return table


def _read_parquet(path: Path) -> pa.Table:
    file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    parts = Spill()
    parts.add(plain_types(file.schema_arrow.empty_table()))
    for batch in file.iter_batches(_ROWS_AT_ONCE):
        parts.add(plain_types(pa.Table.from_batches([batch])))
    return pa.concat_tables(parts.tables())
