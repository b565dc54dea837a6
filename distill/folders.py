"""A folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write into; once the block ends well, it takes the folder's place in one step.

    Whenever the process is killed, the folder is as it was before, or whole; for the instant between two renames it
    is absent, if there was one before. What a killed process left beside it goes with the next call.
    """
    partial, before = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "before"))
    for leftover in (partial, before):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, before)
    os.replace(partial, folder)
    shutil.rmtree(before, ignore_errors=True)
