"""Score one model on a task's validation and test rows."""

from dataclasses import dataclass

import datasets
import numpy as np
import torch
from scipy import stats
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from distill.console import progress
from distill.data import Data
from distill.metrics import compute_metrics, predict
from distill.tasks import Task
from distill.trainer import accepted_inputs


@dataclass(frozen=True)
class Evaluation:
    """Metrics and predictions of one model."""

    metrics: dict[str, float]
    interval: tuple[float, float]
    """Of the primary metric on the first validation split, at 95 %: see `score_interval`."""
    predictions: list[float]
    """Class ids or scores on the task's first validation split, in the order of its rows."""


def evaluate_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, *, name: str = "model", batch_size: int = 64
) -> Evaluation:
    """Metrics on every scored split (`test_…` for a labelled test split, which chooses nothing)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    metrics: dict[str, float] = {}
    interval = (0.0, 0.0)
    predictions: list[float] = []
    for split, prefix, suffix in data.scored_splits():
        rows = data.tokenized(split, tokenizer)
        logits = _logits(model, rows, tokenizer, batch_size, f"Scoring {name} on {split}")
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
    middle 95 % over 200 seeded resamples of the rows (Efron 1979).
    """
    if interval_method(task) == "Wilson":
        right = int((predict(task, logits) == labels).sum())
        interval = stats.binomtest(right, len(labels)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    generator = np.random.default_rng(0)
    draws = generator.integers(len(labels), size=(200, len(labels)))
    scores = [compute_metrics(task, logits[rows], labels[rows])[task.primary_metric] for rows in draws]
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def interval_method(task: Task) -> str:
    """The name of the method of `score_interval`."""
    return "Wilson" if task.primary_metric == "accuracy" else "bootstrap"


def agreement(task: Task, predictions: list[float], baseline: list[float]) -> float:
    """Share of rows on which both predict the same class; Pearson correlation of the scores for regression."""
    if task.kind == "regression":
        return compute_metrics(task, np.asarray(predictions), np.asarray(baseline))["pearson"]
    return float(np.mean(np.asarray(predictions) == np.asarray(baseline)))


def _logits(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, text: str
) -> np.ndarray:
    """Logits B×C of all rows in their order; batches hold rows of like length, so little padding is computed."""
    order = np.argsort(rows["length"], kind="stable")
    collate = DataCollatorWithPadding(tokenizer)
    inputs = rows.remove_columns(["labels", "length"])
    logits = np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    with torch.inference_mode():
        for start in progress(range(0, len(rows), batch_size), text):
            chosen = order[start : start + batch_size]
            batch = collate([inputs[int(index)] for index in chosen]).to(model.device)
            logits[chosen] = model(**accepted_inputs(model, batch)).logits.float().cpu().numpy()
    return logits
