"""Want of room, as those who write tell it."""

import errno
from pathlib import Path

import pytest

from distill.common.folders import told_of_a_full_disk
from distill.errors import DiskFull, InputError

RUST = 'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "no room" })'


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(errno.ENOSPC, "as the system says it"), "here: no room to write there (No space left on device)"),
        (OSError(errno.EDQUOT, "quota", "/data/run/x.bin"), "/data/run: no room to write there (Disk quota exceeded)"),
        (Exception(RUST), "here: no room to write there (No space left on device)"),
        (Exception("I/O error: File too large (os error 27)"), "here: no room to write there (File too large)"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "here: no room to write there (torch does"),
        (RuntimeError("inline_container.cc:664] . unexpected pos 64 vs 0"), "here: no room to write there (torch does"),
    ],
)
def test_each_librarys_want_of_room_is_one_message(raised, told):
    with pytest.raises(DiskFull) as error, told_of_a_full_disk(Path("here")):
        raise ValueError("what was said about it") from raised
    assert str(error.value).startswith(told)


@pytest.mark.parametrize(
    "raised", [OSError(errno.EACCES, "no"), RuntimeError("exit code: 28"), InputError("os error 28")]
)
def test_what_has_another_reason_stays_as_it_is(raised):
    with pytest.raises(type(raised)) as error, told_of_a_full_disk(Path("here")):
        raise raised
    assert error.value is raised
