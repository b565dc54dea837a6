"""How two models compare on the same rows, and how sure that is: intervals, agreement, divergence."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from distill.entities import entity_counts, scores
from distill.metrics import compute_metrics, divergences, language_scores, primary_score
from distill.models import PROBLEM_TYPES
from distill.predictions import ProblemType
from distill.questions import answer_scores, normalised
from distill.tasks import OF_LANGUAGE, Task


def score_interval(task: Task, predictions: Sequence, labels: Sequence) -> tuple[float, float]:
    """The 95 % interval of the primary metric.

    For accuracy Wilson's score interval (Wilson 1927), which keeps its width at a perfect score; for other metrics the
    middle 95 % over 400 seeded resamples of the rows (Efron 1979).

    Args:
        predictions: as in `Evaluation`, one a row; labels alike.
    """
    if interval_method(task) == "Wilson":
        right = int((np.asarray(predictions) == np.asarray(labels)).sum())
        interval = stats.binomtest(right, len(labels)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    score = _scorer(task, predictions, labels)
    low, high = np.percentile([score(rows) for rows in _resamples(len(predictions))], [2.5, 97.5])
    return float(low), float(high)


def interval_method(task: Task) -> str:
    """The name of the method of `score_interval`."""
    return "Wilson" if task.primary_metric == "accuracy" else "bootstrap"


def paired_difference(
    task: Task, first: Sequence, second: Sequence, labels: Sequence
) -> tuple[float, tuple[float, float]]:
    """How much more the first model scores than the second, and the 95 % interval of that.

    Both are scored on the same resampled rows (paired bootstrap; Berg-Kirkpatrick et al. 2012), so that rows hard for
    both cancel out.

    Args:
        first: predictions as in `Evaluation`, one a row; second and labels alike.
    """
    one, other = (_scorer(task, predictions, labels) for predictions in (first, second))
    low, high = np.percentile([one(rows) - other(rows) for rows in _resamples(len(first))], [2.5, 97.5])
    every = np.arange(len(first))
    return one(every) - other(every), (float(low), float(high))


def agreement(task: Task, predictions: list, baseline: list) -> float:
    """Share of rows (of words or tokens) on which both predict the same; for regression Pearson of the scores."""
    if task.kind == "regression":
        return compute_metrics(task, np.asarray(predictions), np.asarray(baseline))["pearson"]
    if task.kind in OF_LANGUAGE:
        predictions, baseline = ([each["tokens"] for each in found] for found in (predictions, baseline))
    if task.kind in ("token-classification", *OF_LANGUAGE):
        pairs = [pair for rows in zip(predictions, baseline, strict=True) for pair in zip(*rows, strict=False)]
        return float(np.mean([first == second for first, second in pairs]))
    if task.kind == "question-answering":
        predictions, baseline = ([normalised(answer) for answer in found] for found in (predictions, baseline))
    same = np.asarray(predictions) == np.asarray(baseline)
    return float(np.mean(same.all(-1) if same.ndim > 1 else same))


def divergence_from(task: Task, reference: Sequence, logits: Sequence) -> dict[str, float]:
    """How far a model's predictions are from another's: the mean of `divergences`, and its 95 % interval.

    Args:
        reference: the other's logits B×C; logits alike.
    """
    of_rows = _divergences(task, reference, logits)
    low, high = np.percentile([of_rows[rows].mean() for rows in _resamples(len(of_rows))], [2.5, 97.5])
    return {"mean": float(of_rows.mean()), "low": float(low), "high": float(high)}


def won_back(task: Task, reference: Sequence, before: Sequence, after: Sequence) -> tuple[float, list[float]] | None:
    """The share of one model's divergence from a reference that another model is without, and its 95 % interval.

    Negative where the other is farther off; None where there was nothing to win. Both are measured on the same
    resampled rows.

    Args:
        reference: its logits B×C; those of the one and of the other alike.
    """
    one, other = (_divergences(task, reference, logits) for logits in (before, after))
    if not one.any():
        return None
    shares = [1 - other[rows].sum() / one[rows].sum() for rows in _resamples(len(one)) if one[rows].any()]
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(1 - other.sum() / one.sum()), [float(low), float(high)]


def _scorer(task: Task, predictions: Sequence, labels: Sequence) -> Callable[[np.ndarray], float]:
    """The primary metric of some rows, by their numbers."""
    if task.kind == "token-classification":
        counts = entity_counts(predictions, labels, task.label_names or ())
        return lambda rows: scores(counts[rows])[task.primary_metric]
    if task.kind == "question-answering":
        of_rows = answer_scores(predictions, [label["text"] for label in labels])[:, 0]
        return lambda rows: float(of_rows[rows].mean())
    if task.kind in OF_LANGUAGE:
        losses = token_losses(predictions)
        return lambda rows: language_scores(losses[rows])[task.primary_metric]
    found, truth = np.asarray(predictions), np.asarray(labels)
    return lambda rows: primary_score(task, found[rows], truth[rows])


def _divergences(task: Task, reference: Sequence, logits: Sequence) -> NDArray[np.float64]:
    problem = cast(ProblemType, PROBLEM_TYPES[task.kind])
    return divergences(problem, np.asarray(reference), np.asarray(logits))


def token_losses(predictions: Sequence[dict]) -> NDArray:
    """N×3 of a language model's predictions: nats, tokens that were right, tokens."""
    return np.array([[each["loss"], each["right"], len(each["tokens"])] for each in predictions], dtype=np.float64)


def _resamples(num_rows: int) -> np.ndarray:
    """Seeded row numbers, 400 draws of all rows."""
    return np.random.default_rng(0).integers(num_rows, size=(400, num_rows))
