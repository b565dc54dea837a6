"""Comparisons of two models on the same rows, with their intervals: differences, agreement, divergence."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from distill.tasks import scorers
from distill.tasks.base import Task, is_better_lower
from distill.tasks.kinds import KINDS
from distill.tasks.scorers import Scorer

RESAMPLES = 9999
"""Of the bootstrap; from seed to seed a bound moves by about a hundredth of the interval's width."""

_RESAMPLES_OF_RANKS = 2000
"""Of a metric that ranks the rows of each resample anew."""

_RANKED = {"spearmanr"}

_DRAWN_AT_ONCE = 2**20
"""Rows of resamples that are held at once: 8 MB in each of the few arrays made of them."""


def score_interval(task: Task, predictions: Sequence, labels: Sequence) -> tuple[float, float]:
    """Compute the 95 % interval of the primary metric, which the metric itself never lies outside of.

    For accuracy Wilson's score interval (Wilson 1927), which keeps its width at a perfect score; for other metrics the
    bootstrap (Efron 1979): the middle 95 % over resamples of the rows.

    Args:
        task: whose primary metric it is.
        predictions: as in `Evaluation`, one a row.
        labels: alike.
    """
    num_rows = len(predictions)
    score = KINDS[task.kind].scorer(task, predictions, labels)
    if interval_method(task) != "Wilson":
        return bootstrap(score, num_rows, resamples=_resamples(task))[1]
    share = scorers.whole(score, num_rows)
    interval = stats.binomtest(round(share * num_rows), num_rows).proportion_ci(method="wilson")
    return min(float(interval.low), share), max(float(interval.high), share)


def interval_method(task: Task) -> str:
    """Name the method of `score_interval`."""
    return "Wilson" if task.primary_metric == "accuracy" else "bootstrap"


def paired_difference(
    task: Task, first: Sequence, second: Sequence, labels: Sequence
) -> tuple[float, tuple[float, float]]:
    """Compute how much more the first model scores than the second, and the 95 % interval of that.

    Both are scored on the same resampled rows (paired bootstrap; Berg-Kirkpatrick et al. 2012), so that rows hard for
    both cancel out.

    Args:
        task: whose primary metric is compared.
        first: the first model's predictions as in `Evaluation`, one a row.
        second: the second model's.
        labels: of the same rows.
    """
    one, other = (KINDS[task.kind].scorer(task, predictions, labels) for predictions in (first, second))
    return bootstrap(lambda weights: one(weights) - other(weights), len(first), resamples=_resamples(task))


def paired_retention(
    task: Task, model: Sequence, baseline: Sequence, labels: Sequence
) -> tuple[float, tuple[float, float]]:
    """Compute a model's primary metric over its baseline's, and the 95 % interval of that on the same resampled rows.

    Where lower is better it is the other way round. Resamples in which what is divided by is not above 0 are left out.

    Args:
        task: whose primary metric is compared.
        model: the model's predictions as in `Evaluation`, one a row.
        baseline: the baseline's.
        labels: of the same rows.
    """
    pair = (baseline, model) if is_better_lower(task.primary_metric) else (model, baseline)
    over, under = (KINDS[task.kind].scorer(task, predictions, labels) for predictions in pair)

    def quotient(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        divisor = np.asarray(under(weights))
        return np.divide(over(weights), divisor, out=np.full(divisor.shape, np.nan), where=divisor > 0)

    return bootstrap(quotient, len(model), resamples=_resamples(task))


def difference_over_seeds(
    task: Task, first: Sequence[Sequence], second: Sequence[Sequence] | None, labels: Sequence
) -> tuple[float, tuple[float, float]]:
    """Compute the mean over seeds of how much more one model scores than another, and the 95 % interval of that.

    Each resample draws rows, and of the seeds as many with replacement, independently (the pigeonhole bootstrap of
    crossed factors; Owen 2007): all models of a resample are scored on the same rows, those of one seed as a pair.

    Args:
        task: whose primary metric is compared.
        first: for each seed the one model's predictions as in `Evaluation`, one a row.
        second: the other's, in the same order of seeds; None for the mean score of the first itself.
        labels: of the same rows.
    """
    scorer, num_rows = KINDS[task.kind].scorer, len(first[0])
    ones = [scorer(task, predictions, labels) for predictions in first]
    others = [scorer(task, predictions, labels) for predictions in second or ()]

    def scores(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """…×S of weights …×N."""
        found = np.stack([score(weights) for score in ones], axis=-1)
        return found - np.stack([score(weights) for score in others], axis=-1) if others else found

    value = float(scores(np.ones(num_rows)).mean(-1))
    generator = np.random.default_rng(0)
    at_once, resamples = max(1, _DRAWN_AT_ONCE // num_rows), _resamples(task)
    means = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        of_seeds = scores(_weights(generator.integers(num_rows, size=(count, num_rows)), num_rows))
        drawn = generator.integers(len(first), size=(count, len(first)))
        means.append(np.take_along_axis(of_seeds, drawn, axis=-1).mean(-1))
    low, high = np.nanpercentile(np.concatenate(means), [2.5, 97.5])
    return value, (min(float(low), value), max(float(high), value))


def mean_interval(values: NDArray) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's of a share (booleans), the percentile bootstrap's of numbers.

    Args:
        values: B booleans, or B numbers.
    """
    if values.dtype == bool:
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    drawn = max(1, _DRAWN_AT_ONCE // len(values))
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=drawn, method="percentile", rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _resamples(task: Task) -> int:
    """How many resamples the primary metric takes."""
    of_average = task.metrics if task.primary_metric == "average" else ()
    return _RESAMPLES_OF_RANKS if _RANKED & {task.primary_metric, *of_average} else RESAMPLES


def agreement(task: Task, predictions: list, baseline: list) -> float:
    """Compute the share of rows (of words or tokens) on which two models predict the same; for regression Pearson's r.

    Words that neither model read (−100) are left out.

    Args:
        task: of the rows.
        predictions: one model's as in `Evaluation`, one a row.
        baseline: the other model's.
    """
    return KINDS[task.kind].agreement(predictions, baseline)


def divergence_from(task: Task, reference: Sequence, logits: Sequence) -> dict[str, float]:
    """Compute how far a model's predictions are from another's: the mean over rows, and its 95 % interval.

    Args:
        task: whose kind says how predictions are compared: KL in nats, or the squared difference of scores.
        reference: the other's logits B×C.
        logits: the model's.
    """
    of_rows = _divergences(task, reference, logits)
    mean, (low, high) = bootstrap(scorers.mean(of_rows), len(of_rows))
    return {"mean": mean, "low": low, "high": high}


def won_back(task: Task, reference: Sequence, before: Sequence, after: Sequence) -> tuple[float, list[float]] | None:
    """Compute the share of a model's divergence from a reference that another model is without, with its 95 % interval.

    Negative where the other is farther off; None where there was nothing to win. Both are measured on the same
    resampled rows; resamples in which there was nothing to win are left out.

    Args:
        task: as in `divergence_from`.
        reference: its logits B×C.
        before: the one model's.
        after: the other model's.
    """
    one, other = (_divergences(task, reference, logits) for logits in (before, after))
    if not one.any():
        return None

    def share(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        of_one = weights @ one
        return 1 - np.divide(weights @ other, of_one, out=np.full(np.shape(of_one), np.nan), where=of_one != 0)

    value, interval = bootstrap(share, len(one))
    return value, list(interval)


def bootstrap(score: Scorer, num_rows: int, *, resamples: int = RESAMPLES) -> tuple[float, tuple[float, float]]:
    """Compute the score of all rows, and the middle 95 % of the scores of seeded resamples (percentile bootstrap).

    The interval is widened to the score where it lies outside (a biased score, or rounding). Resamples whose score is
    NaN are left out.

    Args:
        score: takes how often each row was drawn (…×N) and returns a score of each resample (…).
        num_rows: N.
        resamples: how many are drawn; none of a single row, whose interval is its score.
    """
    value = scorers.whole(score, num_rows)
    if num_rows == 1:  # all resamples are the same, and scipy refuses
        return value, (value, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of shares that are NaN, which are left out
        resampled = stats.bootstrap(
            (np.arange(num_rows),),
            lambda rows, axis: score(_weights(rows, num_rows)),
            n_resamples=resamples,
            batch=max(1, _DRAWN_AT_ONCE // num_rows),
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = np.nanpercentile(resampled.bootstrap_distribution, [2.5, 97.5])
    return value, (min(float(low), value), max(float(high), value))


def _weights(rows: NDArray[np.int64], num_rows: int) -> NDArray[np.float64]:
    """Count how often each of N rows is among the row numbers …×N of resamples: …×N."""
    drawn = rows.reshape(-1, num_rows)
    places = drawn + num_rows * np.arange(len(drawn))[:, None]
    return np.bincount(places.ravel(), minlength=drawn.size).reshape(rows.shape).astype(np.float64)


def _divergences(task: Task, reference: Sequence, logits: Sequence) -> NDArray[np.float64]:
    return KINDS[task.kind].targets.divergences(np.asarray(reference), np.asarray(logits))
