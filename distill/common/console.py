"""Where the commands print: results to stdout, what is going on to stderr; names and paths as they are."""

import logging
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

Item = TypeVar("Item")

# Those that steer a terminal, that turn the direction of what follows, and that no output can encode.
_HIDDEN = ("Cc", "Cf", "Cs")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def visible(text: str) -> str:
    """Text in which every control character but line breaks and tabs is written out (`\\x1b`), half surrogates too.

    Of a token of the Hub only its beginning is left.
    """
    text = _TOKEN.sub("hf_…", text)
    return "".join(_written_out(character) if _is_hidden(character) else character for character in text)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of which some parts, pairs of a text and a style of rich's, look otherwise: `styled(("error:", "red"))`."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((visible(text), style) for text, style in pairs))


class PlainConsole(Console):
    """A console that prints strings as they are: no markup (`[ham]` is a label), no emoji codes, no control characters.

    What should look otherwise is printed as `styled` text.
    """

    def __init__(self, **options: Any) -> None:
        # A file or a pipe has no width; rich would take 80.
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """What becomes of every string that is printed, in a table too."""
        return super().render_str(visible(text), **options)

    def status(self, status: Any, **options: Any) -> Status:
        """A line that is shown while a block lasts."""
        return super().status(styled(status) if isinstance(status, str) else status, **options)


results = PlainConsole(width=None if sys.stdout.isatty() else 120)
log = PlainConsole(stderr=True)


def log_errors(problems: Iterable[str]) -> None:
    """Tell what is wrong, a line for each problem."""
    for problem in problems:
        log.print(styled(("error:", "red"), f" {problem}"))


def remark(text: str) -> Text:
    """What must not be overlooked, to be printed."""
    return styled(("!", "yellow"), f" {text}")


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Iterate over items, with a progress bar and an estimate of the time left where stderr is a terminal.

    Args:
        items: are given on as they are.
        description: stands before the bar.
        total: how many items there are; by default their length, where they have one.
    """
    if not log.is_terminal:
        return items
    return _with_bar(items, visible(description), total)


class LogHandler(logging.Handler):
    """Prints what is logged as everything else, so that it breaks no bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        log.print(self.format(record))


log_handler = LogHandler()
"""The one of this process, which is added once however often."""


def _with_bar(items: Iterable[Item], description: str, total: int | None) -> Iterable[Item]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log, transient=True) as bar:
        yield from bar.track(items, total, description=description)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in "\n\t\u200c\u200d"  # the joiners of scripts


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
