"""Ranks of the factors of a model's matrices: what each leaves out, what it weighs, and the best within bytes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

STEP = 8
"""Ranks that are chosen are multiples of this, which matrix kernels like."""


@dataclass(frozen=True)
class Choice:
    """One matrix at one rank."""

    rank: int | None
    """None: it stays whole."""
    size: int
    """Bytes of its factors in float32, or of the matrix."""
    error: float
    """The share of its energy that is left out."""


def breaks_even(shape: Sequence[int]) -> int:
    """The largest rank at which the two factors of a matrix hold fewer weights than it does; 0 where none do."""
    rows, columns = shape
    return (rows * columns - 1) // (rows + columns)


def choices_of(shape: Sequence[int], energies: Tensor) -> list[Choice]:
    """All that can be chosen for a matrix, the smallest first: ranks in steps of 8 below break-even, and the whole.

    Args:
        shape: rows and columns.
        energies: squared singular values, in descending order.
    """
    total = max(float(energies.sum()), 1e-300)
    left = 1 - energies.cumsum(0) / total
    most = breaks_even(shape)
    ranks = list(range(min(STEP, most), most + 1, STEP)) if most else []
    found = [Choice(rank, 4 * rank * sum(shape), max(float(left[rank - 1]), 0.0)) for rank in ranks]
    return [*found, Choice(None, 4 * shape[0] * shape[1], 0.0)]


def spread(
    choices: Mapping[str, Sequence[Choice]], *, budget: float = math.inf, energy: float = 1.0
) -> dict[str, int | None]:
    """A rank for each matrix, so that bytes go where they leave out least; None where it stays whole.

    Each starts with its smallest choice, and the next step is always the one that takes away most error for a byte.
    Where a spectrum is flat, that skips the ranks shortly below break-even, which take as much as the whole matrix.

    Args:
        choices: by name of the matrix, as `choices_of` gives them.
        budget: most bytes of all of them; at least what the smallest choices take.
        energy: the share of a matrix's energy, on average, with which it is enough.
    """
    chosen = {name: each[0] for name, each in choices.items()}
    room = budget - sum(each.size for each in chosen.values())
    steps = {name: _best_step(each, chosen[name], room) for name, each in choices.items()}
    while 1 - sum(each.error for each in chosen.values()) / len(chosen) < energy:
        for name, step in steps.items():
            if step is not None and step.size - chosen[name].size > room:
                steps[name] = _best_step(choices[name], chosen[name], room)
        open_steps = [(_worth(chosen[name], step), name, step) for name, step in steps.items() if step is not None]
        if not open_steps:
            break
        _, name, step = max(open_steps, key=lambda each: each[0])
        room -= step.size - chosen[name].size
        chosen[name] = step
        steps[name] = _best_step(choices[name], step, room)
    return {name: each.rank for name, each in chosen.items()}


def _best_step(choices: Sequence[Choice], now: Choice, room: float) -> Choice | None:
    """The larger choice that takes away most error for a byte; None where none fits."""
    larger = [each for each in choices if 0 < each.size - now.size <= room]
    return max(larger, key=lambda each: _worth(now, each), default=None)


def _worth(now: Choice, step: Choice) -> float:
    return (now.error - step.error) / (step.size - now.size)
