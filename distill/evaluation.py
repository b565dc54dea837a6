"""Score one model on a task's validation and test rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from scipy import stats
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from distill.console import progress
from distill.data import Data
from distill.entities import entity_counts, scores
from distill.metrics import compute_metrics, predict, primary_score, words_of
from distill.predictions import IGNORED, problem_type
from distill.representations import accepted_inputs
from distill.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """Metrics and predictions of one model."""

    metrics: dict[str, float]
    interval: tuple[float, float]
    """Of the primary metric on the first validation split, at 95 %: see `score_interval`."""
    predictions: list
    """Class ids, scores, lists of zeros and ones, or lists of words' class ids, a row of the first validation split."""


def evaluate_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, *, name: str = "model", batch_size: int = 64
) -> Evaluation:
    """Metrics on every scored split (`test_…` for a labelled test split, which chooses nothing)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    metrics: dict[str, float] = {}
    interval = (0.0, 0.0)
    predictions: list = []
    for split, prefix, suffix in data.scored_splits():
        rows = data.tokenized(split, tokenizer)
        logits = predict_logits(model, rows, tokenizer, batch_size=batch_size, text=f"Scoring {name} on {split}")
        labels = _as_array(rows["labels"])
        found = compute_metrics(data.task, logits, labels, suffix)
        metrics |= {prefix + key: value for key, value in found.items()}
        if not predictions:
            predictions = predict(data.task, logits).tolist()
            truth = labels.tolist()
            if data.task.kind == "token-classification":
                predictions, truth = words_of(np.asarray(predictions), labels), words_of(labels, labels)
            interval = score_interval(data.task, predictions, truth)
    return Evaluation(metrics, interval, predictions)


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
    low, high = np.percentile([score(rows) for rows in _resamples(len(labels))], [2.5, 97.5])
    return float(low), float(high)


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
    low, high = np.percentile([one(rows) - other(rows) for rows in _resamples(len(labels))], [2.5, 97.5])
    every = np.arange(len(labels))
    return one(every) - other(every), (float(low), float(high))


def _scorer(task: Task, predictions: Sequence, labels: Sequence) -> Callable[[np.ndarray], float]:
    """The primary metric of some rows, by their numbers."""
    if task.kind == "token-classification":
        counts = entity_counts(predictions, labels, task.label_names or ())
        return lambda rows: scores(counts[rows])[task.primary_metric]
    found, truth = np.asarray(predictions), np.asarray(labels)
    return lambda rows: primary_score(task, found[rows], truth[rows])


def _as_array(labels: Sequence) -> np.ndarray:
    """Labels of rows; those of tokens B×T, filled up with −100."""
    if not isinstance(labels[0], list) or isinstance(labels[0][0], float):  # sets of labels are floats
        return np.asarray(labels)
    filled = np.full((len(labels), max(map(len, labels))), IGNORED)
    for row, values in zip(filled, labels, strict=True):
        row[: len(values)] = values
    return filled


def _resamples(num_rows: int) -> np.ndarray:
    """Seeded row numbers, 400 draws of all rows."""
    return np.random.default_rng(0).integers(num_rows, size=(400, num_rows))


def interval_method(task: Task) -> str:
    """The name of the method of `score_interval`."""
    return "Wilson" if task.primary_metric == "accuracy" else "bootstrap"


def agreement(task: Task, predictions: list, baseline: list) -> float:
    """Share of rows (of words, for tokens) on which both predict the same; for regression Pearson of the scores."""
    if task.kind == "regression":
        return compute_metrics(task, np.asarray(predictions), np.asarray(baseline))["pearson"]
    if task.kind == "token-classification":
        pairs = [pair for rows in zip(predictions, baseline, strict=True) for pair in zip(*rows, strict=False)]
        return float(np.mean([first == second for first, second in pairs]))
    same = np.asarray(predictions) == np.asarray(baseline)
    return float(np.mean(same.all(-1) if same.ndim > 1 else same))


def predict_logits(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, text: str
) -> np.ndarray:
    """Logits of all rows in their order, B×C, or for tokens B×T×C with 0 for padding.

    Batches hold rows of like length, so little padding is computed.

    Args:
        rows: as `distill.data.tokenize` makes them.
        text: beside the progress bar.
    """
    order = np.argsort(rows["length"], kind="stable")
    collate = DataCollatorWithPadding(tokenizer)
    inputs = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
    shape: tuple[int, ...] = (len(rows), model.config.num_labels)
    if problem_type(model) == "token_classification":
        shape = (len(rows), max(rows["length"]), model.config.num_labels)
    logits = np.zeros(shape, dtype=np.float32)
    with torch.inference_mode():
        for start in progress(range(0, len(rows), batch_size), text):
            chosen = order[start : start + batch_size]
            batch = collate([inputs[int(index)] for index in chosen]).to(model.device)
            found = model(**accepted_inputs(model, batch)).logits.float().cpu().numpy()
            if found.ndim == 3:
                logits[chosen, : found.shape[1]] = found
            else:
                logits[chosen] = found
    return logits
