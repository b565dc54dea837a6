"""Score one model on a task's validation and test rows."""

from dataclasses import dataclass

import datasets
import numpy as np
import torch
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
    """Of the primary metric on the first validation split: the 95 % percentile bootstrap over rows (Efron 1979)."""
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
            interval = bootstrap_interval(data.task, logits, labels)
    return Evaluation(metrics, interval, predictions)


def bootstrap_interval(task: Task, logits: np.ndarray, labels: np.ndarray, resamples: int = 200) -> tuple[float, float]:
    """The middle 95 % of the primary metric over resampled rows (seeded)."""
    generator = np.random.default_rng(0)
    draws = generator.integers(len(labels), size=(resamples, len(labels)))
    scores = [compute_metrics(task, logits[rows], labels[rows])[task.primary_metric] for rows in draws]
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


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
