"""Score one model on a task's validation and test rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from scipy import stats
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from distill.console import progress
from distill.data import Data
from distill.metrics import compute_metrics, predict, primary_score
from distill.representations import accepted_inputs
from distill.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """Metrics and predictions of one model."""

    metrics: dict[str, float]
    interval: tuple[float, float]
    """Of the primary metric on the first validation split, at 95 %: see `score_interval`."""
    predictions: list
    """Class ids, scores or lists of zeros and ones on the first validation split, in the order of its rows."""


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
        labels = np.asarray(rows["labels"])
        scores = compute_metrics(data.task, logits, labels, suffix)
        metrics |= {prefix + key: value for key, value in scores.items()}
        if not predictions:
            predictions = predict(data.task, logits).tolist()
            interval = score_interval(data.task, logits, labels)
    return Evaluation(metrics, interval, predictions)


def score_interval(task: Task, logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the primary metric.

    For accuracy Wilson's score interval (Wilson 1927), which keeps its width at a perfect score; for other metrics the
    middle 95 % over 400 seeded resamples of the rows (Efron 1979).
    """
    if interval_method(task) == "Wilson":
        right = int((predict(task, logits) == labels).sum())
        interval = stats.binomtest(right, len(labels)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    predictions = predict(task, logits)
    scores = [primary_score(task, predictions[rows], labels[rows]) for rows in _resamples(len(labels))]
    low, high = np.percentile(scores, [2.5, 97.5])
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
    pair, truth = (np.asarray(first), np.asarray(second)), np.asarray(labels)

    def difference(rows: np.ndarray) -> float:
        scores = [primary_score(task, predictions[rows], truth[rows]) for predictions in pair]
        return scores[0] - scores[1]

    low, high = np.percentile([difference(rows) for rows in _resamples(len(truth))], [2.5, 97.5])
    return difference(np.arange(len(truth))), (float(low), float(high))


def _resamples(num_rows: int) -> np.ndarray:
    """Seeded row numbers, 400 draws of all rows."""
    return np.random.default_rng(0).integers(num_rows, size=(400, num_rows))


def interval_method(task: Task) -> str:
    """The name of the method of `score_interval`."""
    return "Wilson" if task.primary_metric == "accuracy" else "bootstrap"


def agreement(task: Task, predictions: list, baseline: list) -> float:
    """Share of rows on which both predict the same class, or set of labels; for regression Pearson of the scores."""
    if task.kind == "regression":
        return compute_metrics(task, np.asarray(predictions), np.asarray(baseline))["pearson"]
    same = np.asarray(predictions) == np.asarray(baseline)
    return float(np.mean(same.all(-1) if same.ndim > 1 else same))


def predict_logits(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    text: str,
    bf16: bool = False,
) -> np.ndarray:
    """Logits B×C of all rows in their order; batches hold rows of like length, so little padding is computed.

    Args:
        rows: as `distill.data.tokenize` makes them.
        text: beside the progress bar.
        bf16: compute under autocast.
    """
    order = np.argsort(rows["length"], kind="stable")
    collate = DataCollatorWithPadding(tokenizer)
    inputs = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
    logits = np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for start in progress(range(0, len(rows), batch_size), text):
            chosen = order[start : start + batch_size]
            batch = collate([inputs[int(index)] for index in chosen]).to(model.device)
            logits[chosen] = model(**accepted_inputs(model, batch)).logits.float().cpu().numpy()
    return logits
