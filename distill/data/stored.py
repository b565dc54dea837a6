"""Tokenized rows on disk: made once, found again by later steps and runs, and mapped by every process."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import tokenizers
import transformers
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from filelock import FileLock, Timeout

from distill.common.folders import is_writable, told_of_a_full_disk
from distill.data.spill import folder_of_rows

_VERSION = 1
"""Of the files and of what is made of a row outside of its kind's own module; raise it with any change of that."""

_LIMIT = 10e9  # bytes of all files together, as of the teachers' caches
_ROWS_AT_ONCE = 10_000


def rows_fingerprint(rows: datasets.Dataset, *more: Any) -> str:
    """Hash (SHA-256) the values of rows, whatever else decides what is made of them, and the tokenizing libraries'
    versions.

    Args:
        rows: of one split.
        more: values that JSON can hold.
    """
    versions = [_VERSION, transformers.__version__, tokenizers.__version__]
    digest = hashlib.sha256(json.dumps([versions, str(rows.features), more], sort_keys=True, default=str).encode())
    for table in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def stored_rows(fingerprint: str | None, write: Callable[[ArrowWriter], None]) -> datasets.Dataset:
    """Write rows to disk once, and map them into memory for everyone who asks for the same ones.

    One process writes while others that want the same rows wait. A file is whole or not there; beyond ten gigabytes the
    files go that are unused the longest (processes that have mapped one keep it).

    Args:
        fingerprint: of the rows. Without one, and where nothing can be written, they are made in memory.
        write: makes them.

    Raises:
        DiskFull: there is no room for them.
    """
    folder = folder_of_rows()
    if fingerprint is None or not is_writable(folder):
        stream = pa.BufferOutputStream()
        _finished(ArrowWriter(stream=stream), write)
        table = InMemoryTable.from_buffer(stream.getvalue())
        return datasets.Dataset(table, fingerprint=generate_random_fingerprint())  # else its bytes would be pickled
    path = folder / f"{fingerprint}.arrow"
    with told_of_a_full_disk(folder):
        with _lock(path):
            if path.is_file():
                os.utime(path)
            else:
                partial = path.with_suffix(".partial")  # the lock makes it this process's own
                try:
                    _finished(ArrowWriter(path=str(partial)), write)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
            rows = datasets.Dataset.from_file(str(path))
        _make_room(folder, path)
    return rows


def _finished(writer: ArrowWriter, write: Callable[[ArrowWriter], None]) -> None:
    with writer:
        write(writer)
        writer.finalize()


def _lock(path: Path) -> FileLock:
    """Lock a file by one of 256 locks, as a lock for each would leave a file for all that ever was."""
    locks = path.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(str(locks / f"{path.name[:2]}.lock"), is_singleton=False)


def _make_room(folder: Path, kept: Path) -> None:
    """Delete what killed processes left, and the files unused the longest until all others fit under the limit."""
    found = {}
    for path in (*folder.glob("*.arrow"), *folder.glob("*.partial")):
        with suppress(FileNotFoundError):
            found[path] = path.stat()
    size = sum(stat.st_size for stat in found.values())
    for path, stat in sorted(found.items(), key=lambda item: item[1].st_mtime):
        if path != kept and (path.suffix == ".partial" or size > _LIMIT):
            with suppress(Timeout, OSError), _lock(path).acquire(blocking=False):
                path.unlink(missing_ok=True)
                size -= stat.st_size
