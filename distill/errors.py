"""The exception for input that is wrong (a recipe, data or a model), and those that are told in one line too."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong.

    Args:
        problems: every problem found, one sentence each, naming the file or key and what would be right.
    """

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("\n".join(problems))


class MainProcessFailed(RuntimeError):
    """What this process waited for failed on the main one, which tells why."""


class TrainingDiverged(RuntimeError):
    """A loss or a weight became NaN or infinite; what was saved before is good."""


def in_one_line(error: Exception) -> str:
    """What an exception says; its kind where that is next to nothing (`KeyError('x')`)."""
    message = " ".join(str(error).split())
    return message if " " in message else f"{type(error).__name__} {message}".strip()


class FolderInUse(RuntimeError):
    """Another process is at work in a folder."""


class DiskFull(RuntimeError):
    """There was no room to write something."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A hint for the user who wrote an unknown name: `did you mean 'x'?`, or the known names when none is near.

    Args:
        name: what the user wrote.
        known: what would be right; of more than 12 names the first 12 are listed.
    """
    known = list(known)
    near = near_name(name, known)
    if near:
        return f"did you mean {near!r}?"
    shown = sorted(known)
    return f"known: {', '.join(shown[:12])}{', …' if len(shown) > 12 else ''}"


def near_name(name: str, known: Iterable[str], similarity: float = 0.6) -> str | None:
    """The known name that is most like a name; None where none is similar enough.

    Args:
        name: what the user wrote.
        known: what would be right.
        similarity: the least that counts, as a ratio of difflib's from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=similarity)), None)
