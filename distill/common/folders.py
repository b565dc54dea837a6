"""Folders and files that are there whole or not at all, and that one run at a time writes into."""

import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from distill.common.sources import causes
from distill.errors import DiskFull, FolderInUse, InputError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Rust (safetensors, tokenizers) and torch's zip writer raise their own kinds, with the reason in words at best.
_NO_ROOM_IN_WORDS = re.compile(
    rf"(?:os error|Os \{{ code:) (?P<number>{'|'.join(map(str, sorted(_NO_ROOM)))})\b"
    rf"|{'|'.join(map(os.strerror, sorted(_NO_ROOM)))}|(?P<torch>PytorchStreamWriter failed|inline_container\.cc.* pos)"
)


def unfinished(folder: Path) -> Path:
    """The hidden sibling in which a folder's successor is made."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write into; once the block ends well, it takes the folder's place in one step.

    Whenever the process is killed, the folder is as it was before, or whole; for the instant between two renames it
    is absent, if there was one before, and `settle` puts it there. What a killed process left goes with the next call.
    """
    settle(folder)
    partial, before = unfinished(folder), _before(folder)
    shutil.rmtree(partial, ignore_errors=True)
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


def settle(folder: Path) -> None:
    """End what a process was killed in: a folder that was moved away has a successor that is whole."""
    partial, before = unfinished(folder), _before(folder)
    if before.is_dir() and not folder.exists():
        os.replace(partial if partial.is_dir() else before, folder)
    shutil.rmtree(before, ignore_errors=True)


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, also where another process writes it too.

    Args:
        path: a file, new or not, in a folder that exists.
        text: is written in UTF-8.
    """
    with opened_atomically(path) as file:
        file.write(text)


@contextmanager
def opened_atomically(path: Path) -> Iterator[TextIO]:
    """Open a file to be written, in UTF-8, which takes its place once the block ends well, and else is not there.

    Args:
        path: a file, new or not, in a folder that exists.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, which need not exist yet."""
    nearest = nearest_existing(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the first above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to this process alone; one that ends in any way gives it back. It may be locked within a block.

    Raises:
        FolderInUse: another process has it.
        InputError: nothing can be written there.
    """
    file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(file.resolve()), is_singleton=True)
        lock.acquire(blocking=False)
        if lock.lock_counter == 1:
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        holder = file.read_text(encoding="utf-8").strip() or "its process is not known"
        raise FolderInUse(
            f"{folder}: another distill run is at work there ({holder}); wait for it, or say another output_dir"
        ) from None
    except OSError as error:
        if _no_room(error):
            raise
        raise InputError(f"output_dir: {folder} cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def told_of_a_full_disk(folder: Path) -> Iterator[None]:
    """Raise what a full disk, or a limit on files, makes of writing into a folder as one message.

    Args:
        folder: is named where the exception names no file.

    Raises:
        DiskFull: instead of the many exceptions of those who write.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:  # libraries in Rust and C++ raise their own kinds
        failed = next(filter(_no_room, causes(error)), None)
        if failed is None:
            raise
        file = getattr(failed, "filename", None)
        where = Path(file).parent if isinstance(file, str) else folder
        raise DiskFull(
            f"{where}: no room to write there ({_no_room(failed)}). What was not whole does not count; make room, and "
            "the same command goes on"
        ) from error


def _no_room(error: BaseException) -> str | None:
    """Why something could not be written, where that is for want of room."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return os.strerror(error.errno)
    found = None if isinstance(error, InputError) else _NO_ROOM_IN_WORDS.search(str(error))
    if found is None:
        return None
    if found["torch"]:
        return "torch does not say more"
    return os.strerror(int(found["number"])) if found["number"] else found[0]
