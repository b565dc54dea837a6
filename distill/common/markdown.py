"""Markdown in which names, labels and paths are shown as they are."""

import re
from collections.abc import Iterable, Sequence

from distill.common.console import visible

# An underscore inside of a word opens no emphasis (CommonMark 0.31, 6.2), and stays readable.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])")
_BREAKS = re.compile(r"[\r\n\t\f\v\x85\u2028\u2029]+")


def escaped(text: str) -> str:
    """Text as Markdown (CommonMark with GitHub's tables) that shows it inside of a line, as a cell of a table too."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", _one_line(text))


def code(text: str) -> str:
    """Text as code inside of a line."""
    text = _one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts: a header and rows; the first column is of names, the others of numbers."""
    lines = [[escaped(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A list of texts."""
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _one_line(text: str) -> str:
    return visible(_BREAKS.sub(" ", text))
