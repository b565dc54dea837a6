"""Where the commands print: results to stdout, what is going on to stderr."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")

# A file or a pipe has no width; rich would take 80.
results = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
log = Console(highlight=False, soft_wrap=True, stderr=True)


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """`items`, with a bar and an estimate while they last, on a terminal."""
    return track(items, description, total, console=log, transient=True) if log.is_terminal else items


def escape(text: str) -> str:
    """Text that may hold brackets, for rich."""
    return text.replace("[", "\\[")
