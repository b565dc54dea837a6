"""Metrics as functions of row weights: one function gives a score and the bootstrap of it.

A score gives every row the weight 1; a resample gives each the times that it was drawn. What a metric sums over rows is
summed as weights times a matrix, which is quick enough for 9,999 resamples of thousands of rows.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scorer: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Weights of rows …×N → scores …."""

_ROUNDING = 1e-13
"""Of a sum of squares, relative; a spread below it is none."""


def whole(scorer: Scorer, num_rows: int) -> float:
    """Compute the score of all rows, each with the weight 1.

    Args:
        scorer: made for these rows.
        num_rows: their number.
    """
    return float(scorer(np.ones(num_rows)))


def accuracy(references: NDArray, predictions: NDArray) -> Scorer:
    """Make the scorer of the share of rows that are predicted right.

    Args:
        references: B class ids, or B×C zeros and ones that must all be right.
        predictions: alike.
    """
    right = references == predictions
    return mean(right if right.ndim == 1 else right.all(-1))


def mean(values: ArrayLike) -> Scorer:
    """Make the scorer of the mean of a value of each row."""
    return ratio(values, np.ones(len(np.asarray(values))))


def ratio(over: ArrayLike, under: ArrayLike) -> Scorer:
    """Make the scorer of a sum over rows divided by another one; 0 where there is nothing to divide by.

    Args:
        over: N numbers, summed above the line.
        under: N numbers, summed below it.
    """
    columns = np.stack([np.asarray(each, dtype=np.float64) for each in (over, under)], axis=-1)

    def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = weights @ columns
        return _divided(sums[..., 0], sums[..., 1])

    return score


def f1(counts: NDArray) -> Scorer:
    """Make the scorer of the micro-averaged F1 of counts N×3: found rightly, found, and there in each row."""
    return ratio(2 * counts[:, 0], counts[:, 1] + counts[:, 2])


def f1_of_ones(references: NDArray, predictions: NDArray) -> Scorer:
    """Make the scorer of the F1 of class 1, or of the decisions of all labels together.

    Args:
        references: B class ids, or B×C zeros and ones.
        predictions: alike.
    """
    there, found = ((each == 1).reshape(len(each), -1) for each in (references, predictions))
    return f1(np.stack([each.sum(-1) for each in (there & found, found, there)], axis=-1))


def matthews(references: NDArray, predictions: NDArray) -> Scorer:
    """Make the scorer of the Matthews correlation coefficient of any number of classes (Gorodkin 2004).

    It is 0 where either side is constant.

    Args:
        references: B class ids.
        predictions: alike.
    """
    classes = np.unique([references, predictions])
    truth, found = ((each[:, None] == classes).astype(np.float64) for each in (references, predictions))
    columns = np.column_stack([references == predictions, truth, found]).astype(np.float64)

    def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total, sums = weights.sum(-1), weights @ columns
        right, of_truth, of_found = sums[..., 0], sums[..., 1 : len(classes) + 1], sums[..., len(classes) + 1 :]
        shared = right * total - (of_truth * of_found).sum(-1)
        spreads = [total**2 - (each**2).sum(-1) for each in (of_truth, of_found)]
        return _divided(shared, np.sqrt(spreads[0] * spreads[1]))

    return score


def pearson(references: NDArray, predictions: NDArray) -> Scorer:
    """Make the scorer of the Pearson correlation; 0 where either side is constant (it is undefined there).

    Args:
        references: B scores.
        predictions: alike.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (references, predictions))
    first, second = first - first.mean(), second - second.mean()
    columns = np.column_stack([first, second, first * first, second * second, first * second])
    return lambda weights: _correlation(weights.sum(-1), *np.moveaxis(weights @ columns, -1, 0))


def spearman(references: NDArray, predictions: NDArray) -> Scorer:
    """Make the scorer of the Spearman rank correlation, ties at their mean rank; 0 where either side is constant.

    Args:
        references: B scores.
        predictions: alike.
    """
    ranks = [_ranked(np.asarray(each)) for each in (references, predictions)]

    def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(-1)
        first, second = (each(weights) - (total[..., None] + 1) / 2 for each in ranks)
        products = (first, second, first * first, second * second, first * second)
        return _correlation(total, *((weights * each).sum(-1) for each in products))

    return score


def mean_of(scorers: Sequence[Scorer]) -> Scorer:
    """Make the scorer of the mean of several scores of the same rows."""
    return lambda weights: np.mean([scorer(weights) for scorer in scorers], axis=0)


def _ranked(values: NDArray) -> Scorer:
    """Weights …×N → the ranks …×N that the values have in a sample with each as often as it weighs."""
    order = np.argsort(values, kind="stable")
    _, starts, group = np.unique(values[order], return_index=True, return_counts=False, return_inverse=True)
    group_of_row = np.empty(len(values), dtype=np.int64)
    group_of_row[order] = group

    def rank(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        of_groups = np.add.reduceat(weights[..., order], starts, axis=-1)
        return (np.cumsum(of_groups, axis=-1) - (of_groups - 1) / 2)[..., group_of_row]

    return rank


def _correlation(total: NDArray, *sums: NDArray) -> NDArray[np.float64]:
    """Of a total weight, and weighted sums of x, y, x², y² and xy."""
    of_first, of_second, first_squared, second_squared, products = sums
    spreads = []
    for of_one, squared in ((of_first, first_squared), (of_second, second_squared)):
        spread = total * squared - of_one**2
        spreads.append(np.where(spread > _ROUNDING * total * squared, spread, 0))
    shared = total * products - of_first * of_second
    return np.clip(_divided(shared, np.sqrt(spreads[0] * spreads[1])), -1, 1)


def _divided(over: NDArray, under: NDArray) -> NDArray[np.float64]:
    return np.divide(over, under, out=np.zeros(np.shape(over)), where=np.asarray(under) != 0)
