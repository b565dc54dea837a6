"""Parts of the scored rows: how every model does on them, and where one lost more than elsewhere."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from distill.common.records import Slice
from distill.evaluation.fidelity import holm
from distill.evaluation.intervals import mean_interval
from distill.tasks.base import is_better_lower

SMALLEST = 30
"""Rows of a slice; smaller ones are left out, since their intervals say nothing."""

RARE = 5
"""A token that the training rows hold fewer times than this is rare."""

_MOST_VALUES = 20
"""Of a column; the most frequent ones are slices."""

Groups: TypeAlias = Mapping[str, Mapping[str, NDArray[np.bool_]]]
"""For each thing that rows are alike in, and each slice by it, which rows are in it: B."""


def compare_slices(groups: Groups, of_rows: Mapping[str, NDArray], *, metric: str, baseline: str | None) -> list[Slice]:
    """Every model on every slice, with the chance that as many random rows would have lost as much.

    Args:
        groups: slices of fewer than `SMALLEST` rows, and of all rows, are left out.
        of_rows: for each model B values of the metric, whose mean it is: booleans (right or wrong) or numbers.
        metric: its name.
        baseline: the model that the others are held against; None leaves the p-values out.
    """
    others = [name for name in of_rows if baseline is not None and name != baseline]
    sign = 1 if is_better_lower(metric) else -1
    loss = {name: sign * (of_rows[name].astype(float) - of_rows[baseline].astype(float)) for name in others}  # type: ignore[index]
    found = []
    for by, slices in groups.items():
        for name, rows in slices.items():
            if SMALLEST <= rows.sum() < len(rows):
                metrics: dict[str, float | None] = {
                    model: float(values[rows].mean()) for model, values in of_rows.items()
                }
                intervals: dict[str, list[float | None]] = {
                    model: list(mean_interval(values[rows])) for model, values in of_rows.items()
                }
                p = {model: chance_of_loss(loss[model], rows) for model in others}
                found.append(Slice(by, name, int(rows.sum()), metric, metrics, intervals, p))
    adjusted = iter(holm([each.p[model] for each in found for model in others]))
    return [Slice(**{**vars(each), "p": {model: next(adjusted) for model in others}}) for each in found]


def chance_of_loss(loss: NDArray[np.float64], rows: NDArray[np.bool_]) -> float:
    """The chance that as many rows drawn at random lose as much as these: a one-sided permutation test.

    A model that is worse everywhere alike has no slice that is worse than the others. Where a row loses or gains one
    prediction, the chance is exact (two hypergeometric distributions); for numbers it is that of the ranks of losses
    (Mann and Whitney 1947).

    Args:
        loss: B, what a model lost against the baseline on each row.
        rows: B, those of the slice.
    """
    if not loss.any():
        return 1.0
    if not np.isin(loss, (-1, 0, 1)).all():
        return float(stats.mannwhitneyu(loss[rows], loss[~rows], alternative="greater", method="asymptotic").pvalue)
    total, size = len(loss), int(rows.sum())
    lost, gained = int((loss == 1).sum()), int((loss == -1).sum())
    drawn = np.arange(max(0, size - (total - lost)), min(size, lost) + 1)  # how many of the lost rows may be in it
    rest = stats.hypergeom.cdf(drawn - int(loss[rows].sum()), total - lost, gained, size - drawn)
    return float(min(1.0, (stats.hypergeom.pmf(drawn, total, lost, size) * rest).sum()))


def quarters(values: ArrayLike, spelled: Callable[[float], str]) -> dict[str, NDArray[np.bool_]]:
    """Rows in four groups of about as many, by a number of each; equal numbers stay together.

    Args:
        spelled: how a number is written in a group's name.
    """
    numbers = np.asarray(values, dtype=np.float64)
    places = np.searchsorted(np.quantile(numbers, [0.25, 0.5, 0.75]), numbers)
    found = {}
    for place in np.unique(places):
        rows = places == place
        low, high = (spelled(float(each)) for each in (numbers[rows].min(), numbers[rows].max()))
        found[low if low == high else f"{low} to {high}"] = rows
    return found


def by_value(values: Sequence[Any]) -> dict[str, NDArray[np.bool_]]:
    """Rows by what stands in a column: its most frequent values, or quarters of many different numbers."""
    numbers = _numbers(values)
    if numbers is not None and len(set(numbers)) > _MOST_VALUES:
        return quarters(numbers, lambda number: f"{number:g}")
    names = ["none" if value is None else str(value) for value in values]
    held = np.array(names, dtype=object)
    return {name: held == name for name, _ in Counter(names).most_common(_MOST_VALUES)}


def shares_of_rare(tokens: Sequence[NDArray[np.int64]], trained: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each row the share of its tokens that the training rows hold fewer than `RARE` times.

    Args:
        tokens: the ids of each row.
        trained: how often each id stands in the training rows.
    """
    known = np.concatenate([trained, np.zeros(max((int(ids.max(initial=0)) for ids in tokens), default=0) + 1)])
    return np.array([(known[ids] < RARE).mean() if len(ids) else 0.0 for ids in tokens])


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """The values as numbers; None where one is none."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return numbers if np.isfinite(numbers).all() else None
