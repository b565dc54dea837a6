"""Tables that grow with a data set, in memory while they are small and else in a file that goes with the process."""

import mmap
import tempfile
from pathlib import Path
from typing import IO

import datasets
import pyarrow as pa

from distill.common.folders import is_writable, told_of_a_full_disk

_LARGEST_IN_MEMORY = 4 * 2**20  # bytes

_ALIGNMENT = 64  # bytes, as Arrow wants its buffers


class Spill:
    """Keeps tables of any columns until they are read, most of them outside of memory.

    What does not fit under a few megabytes lies in a file without a name, which the system deletes with the process
    however it ends, and whose pages it reads and forgets as it likes.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._starts: list[int] = []
        self._held: list[pa.Table] = []
        self._size = 0

    def add(self, table: pa.Table) -> None:
        """Keep one more table."""
        self._held.append(table)
        self._size += table.nbytes
        if self._size > _LARGEST_IN_MEMORY:
            self._write()

    def tables(self) -> list[pa.Table]:
        """All tables in their order, as they were; those in the file are mapped."""
        if self._file is None:
            return list(self._held)
        self._file.flush()
        buffer = pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        streams = (pa.ipc.open_stream(buffer.slice(start)) for start in self._starts)
        return [*(stream.read_all() for stream in streams), *self._held]

    def _write(self) -> None:
        folder = folder_of_rows()
        with told_of_a_full_disk(folder):
            if self._file is None:
                if usable := is_writable(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder if usable else None)  # noqa: SIM115
            for table in self._held:
                self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
                self._starts.append(self._file.tell())
                with pa.ipc.new_stream(self._file, table.schema) as writer:
                    writer.write_table(table)
        self._held, self._size = [], 0
        pa.default_memory_pool().release_unused()  # else tens of megabytes stay with Arrow


def folder_of_rows() -> Path:
    """Give the folder for tokenized rows, beside what `datasets` caches: on the disk that users chose for rows."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "distill"
