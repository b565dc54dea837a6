"""Text files as lines: unpacked, decoded, and with wrong bytes told by line."""

import bz2
import gzip
import io
import lzma
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from distill.errors import InputError

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Endings of compressed files, and what opens them."""

_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks; the longer ones come first, as UTF-32's begins like UTF-16's."""

_NOT_UTF8 = re.compile("[\udc80-\udcff]+")
"""Bytes that were no UTF-8, as Python's `surrogateescape` keeps them."""

_MOSTLY_FOREIGN = 0.4
"""Western texts have fewer accents than this share of their letters, Cyrillic, Greek or Asian ones more."""


def text_lines(path: Path, notes: list[str]) -> Iterator[str]:
    r"""Read a file's lines with their ends (`\n`, `\r\n` or `\r`), without byte order marks.

    UTF-8, and UTF-16 and UTF-32 with a byte order mark, are read as what they are; single bytes that are no UTF-8 as
    Windows' cp1252, which is noted, as is UTF-16.

    Args:
        path: the file, packed or not.
        notes: what was read as another encoding is appended here.

    Raises:
        InputError: another encoding, or NUL bytes.
    """
    encoding = _encoding(path)
    of_units = encoding in ("utf-16", "utf-32")
    foreign: list[int] = []
    accents = letters = 0
    opened = _open(path)
    with io.TextIOWrapper(opened, encoding, "strict" if of_units else "surrogateescape", newline="") as file:
        for number, line in enumerate(file, 1):
            line = line.lstrip("\ufeff")
            if "\0" in line:
                raise InputError(
                    f"line {number} holds NUL bytes: the file is damaged, no text, or UTF-16 without a byte order "
                    "mark; save it as UTF-8"
                )
            if not line.isascii() and _NOT_UTF8.search(line):
                foreign.append(number)
                line = _from_cp1252(line, number, path)
                accents += sum(not character.isascii() for character in line)
                letters += sum(character.isascii() and character.isalpha() for character in line)
            yield line
    if accents > _MOSTLY_FOREIGN * (accents + letters):
        raise InputError(_not_utf8(foreign[0], path))
    if foreign:
        notes.append(
            f"{path.name}: {len(foreign)} lines are not UTF-8 and were read as cp1252 (the first is line {foreign[0]})"
        )
    if of_units:
        notes.append(f"{path.name}: read as {encoding.upper()}")


def ending(path: Path) -> str:
    """Give the ending of a file's name without that of its packing, in small letters: `.csv` of `train.CSV.gz`."""
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def _open(path: Path) -> IO[bytes]:
    return PACKED.get(path.suffix.lower(), open)(path, "rb")


def _encoding(path: Path) -> str:
    with _open(path) as file:
        start = file.read(4)
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


def _from_cp1252(line: str, number: int, path: Path) -> str:
    try:
        return _NOT_UTF8.sub(lambda found: found[0].encode("utf-8", "surrogateescape").decode("cp1252"), line)
    except UnicodeDecodeError:
        raise InputError(_not_utf8(number, path)) from None


def _not_utf8(number: int, path: Path) -> str:
    unpacked = path.name.removesuffix(path.suffix) if path.suffix.lower() in PACKED else path.name
    unpack = "unpack it, and convert it" if unpacked != path.name else "convert it"
    return (
        f"line {number} is not UTF-8, and not cp1252 either; {unpack} from the one that it was saved in "
        f"(such as CP1251, GB18030 or SHIFT_JIS): iconv -f ENCODING -t UTF-8 {shlex.quote(unpacked)} > converted && "
        f"mv converted {shlex.quote(unpacked)}"
    )
