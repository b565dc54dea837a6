"""Score one model on a task's validation and test rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
)

from distill.console import progress
from distill.data import Data
from distill.encoding import Processor
from distill.hardware import compute_device
from distill.intervals import score_interval, token_losses
from distill.metrics import compute_metrics, language_scores, predict, words_of
from distill.predictions import IGNORED, logits_of
from distill.questions import answer_scores, answers_of
from distill.representations import accepted_inputs
from distill.tasks import OF_LANGUAGE, Task


@dataclass(frozen=True)
class Evaluation:
    """Metrics and predictions of one model."""

    metrics: dict[str, float]
    interval: tuple[float, float]
    """Of the primary metric on the first validation split, at 95 %: see `score_interval`."""
    predictions: list
    """For each row of the first validation split a class id, a score, a list of zeros and ones, a list of its words'
    class ids, or an answer; for each window of a language model's texts {"loss": nats, "right": tokens, "tokens": ids
    that were predicted}."""
    logits: list | None = None
    """B×C, of kinds with one prediction a row."""


def evaluate_model(
    model: PreTrainedModel, tokenizer: Processor, data: Data, *, name: str = "model", batch_size: int = 64
) -> Evaluation:
    """Metrics on every scored split (`test_…` for a labelled test split, which chooses nothing)."""
    model = model.to(compute_device()).eval()
    metrics: dict[str, float] = {}
    interval = (0.0, 0.0)
    predictions: list = []
    logits: list | None = None
    for split, prefix, suffix in data.scored_splits():
        rows = data.tokenized(split, tokenizer)
        batches = _forwards(model, rows, tokenizer, batch_size=batch_size, text=f"Scoring {name} on {split}")
        predicted, found, of_rows = _score(data, split, rows, batches)
        metrics |= {prefix + key + suffix: value for key, value in found.items()}
        if not predictions:
            predictions, logits = predicted, of_rows
            interval = score_interval(data.task, predictions, data.labels(split))
    return Evaluation(metrics, interval, predictions, logits)


def predict_rows(
    model: PreTrainedModel, tokenizer: Processor, task: Task, rows: datasets.Dataset, *, name: str, batch_size: int = 64
) -> list:
    """Class ids or scores of tokenized rows, in their order.

    Args:
        name: of the rows, beside the progress bar.
    """
    batches = _forwards(model.eval(), rows, tokenizer, batch_size=batch_size, text=f"Predicting {name}")
    return predict(task, _together(batches, len(rows))).tolist()


_Batches = Iterator[tuple[NDArray[np.int64], Tensor]]
"""Numbers of rows, and their logits."""


def _score(
    data: Data, split: str, rows: datasets.Dataset, batches: _Batches
) -> tuple[list, dict[str, float], list | None]:
    """(predictions, metrics, logits) of a split; logits where a row has one prediction."""
    task = data.task
    if task.kind in OF_LANGUAGE:
        predicted = _language_predictions(task, rows, batches)
        return predicted, language_scores(token_losses(predicted)), None
    if task.kind == "question-answering":
        of_windows: list = [None] * len(rows)
        for numbers, found in batches:
            for number, each in zip(numbers, found.numpy(), strict=True):
                of_windows[number] = each
        answers = answers_to(data.splits[split], task, rows, of_windows)
        return answers, span_scores(answers, data.labels(split)), None
    labels = _as_array(rows["labels"] if task.kind != "image-classification" else data.labels(split))
    logits = _together(batches, len(labels))
    predictions = predict(task, logits)
    metrics = compute_metrics(task, logits, labels)
    if task.kind == "token-classification":
        return words_of(predictions, labels), metrics, None
    return predictions.tolist(), metrics, logits.tolist()


def metrics_while_training(data: Data, rows: datasets.Dataset) -> dict[str, Callable]:
    """What a Trainer takes to score the first validation split: `compute_metrics` and what goes before it.

    Args:
        rows: the split, tokenized.
    """
    task, questions = data.task, data.splits[data.task.validation_splits[0][0]]
    if task.kind in OF_LANGUAGE:  # the logits of every token don't fit into memory
        return {
            "preprocess_logits_for_metrics": lambda logits, labels: _token_losses(task, logits, labels),
            "compute_metrics": lambda output: language_scores(np.maximum(output.predictions, 0).sum(1)),
        }
    if task.kind == "question-answering":

        def of_spans(output: EvalPrediction) -> dict[str, float]:
            logits = np.stack(output.predictions, axis=1)
            return span_scores(answers_to(questions, task, rows, list(logits)), questions["label"])

        return {"compute_metrics": of_spans}
    return {"compute_metrics": lambda output: compute_metrics(task, output.predictions, output.label_ids)}


def answers_to(
    questions: datasets.Dataset, task: Task, windows: datasets.Dataset, logits: Sequence[NDArray]
) -> list[str]:
    """A model's answer to each question.

    Args:
        windows: as `distill.encoding.tokenize` makes them of the questions.
        logits: 2×T of each window.
    """
    may_be_none = any(not answers["text"] for answers in questions["label"])
    of_windows = zip(windows["row"], windows["starts"], windows["ends"], logits, strict=True)
    return answers_of(questions[task.text[1]], of_windows, may_be_none=may_be_none)


def span_scores(answers: Sequence[str], labels: Sequence[dict]) -> dict[str, float]:
    """F1 and exact match, from 0 to 1."""
    f1, exact = answer_scores(answers, [label["text"] for label in labels]).mean(0)
    return {"f1": float(f1), "exact_match": float(exact)}


def _language_predictions(task: Task, rows: datasets.Dataset, batches: _Batches) -> list[dict]:
    predicted: list = [None] * len(rows)
    for numbers, logits in batches:
        for number, each in zip(numbers, logits, strict=True):
            labels = torch.tensor(rows[int(number)]["labels"])
            each = each[: len(labels)]
            loss, right, _ = _token_losses(task, each.unsqueeze(0), labels.unsqueeze(0)).sum((0, 1)).tolist()
            if task.kind == "causal-lm":
                each, labels = each[:-1], labels[1:]
            tokens = each[labels != IGNORED].argmax(-1).tolist()
            predicted[int(number)] = {"loss": loss, "right": right, "tokens": tokens}
    return predicted


def _token_losses(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """B×T×3 of logits B×T×V: each token's negative log-likelihood (nats), whether it was predicted right, and whether
    it counts; a causal LM predicts a token from the one before it, and not the first."""
    if task.kind == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
    known = labels != IGNORED
    return torch.stack([loss, (logits.argmax(-1) == labels) & known, known], dim=-1)


def _together(batches: _Batches, num_rows: int) -> NDArray:
    """Logits of all rows in their order, B×C, or for tokens B×T×C with 0 for padding."""
    found = [(numbers, logits.numpy()) for numbers, logits in batches]
    widest = tuple(np.max([logits.shape[1:] for _, logits in found], axis=0))
    together = np.zeros((num_rows, *widest), dtype=np.float32)
    for numbers, logits in found:
        if logits.ndim == 3:
            together[numbers, : logits.shape[1]] = logits
        else:
            together[numbers] = logits
    return together


def _as_array(labels: Sequence) -> np.ndarray:
    """Labels of rows; those of tokens B×T, filled up with −100."""
    if not isinstance(labels[0], list) or isinstance(labels[0][0], float):  # sets of labels are floats
        return np.asarray(labels)
    filled = np.full((len(labels), max(map(len, labels))), IGNORED)
    for row, values in zip(filled, labels, strict=True):
        row[: len(values)] = values
    return filled


def _forwards(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: Processor, *, batch_size: int, text: str
) -> _Batches:
    """The logits of `input_batches`; for spans B×2×T.

    Args:
        text: beside the progress bar.
    """
    batches = input_batches(rows, tokenizer, batch_size=batch_size)
    with torch.inference_mode():
        for chosen, batch in progress(batches, text, total=math.ceil(len(rows) / batch_size)):
            batch = {
                name: values.to(model.device, model.dtype if values.is_floating_point() else None)  # pixels
                for name, values in batch.items()
            }
            yield chosen, logits_of(model(**accepted_inputs(model, batch))).float().cpu()


def input_batches(
    rows: datasets.Dataset, tokenizer: Processor, *, batch_size: int
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Batches of rows of like length, so little padding is computed: the rows' numbers, and a model's inputs.

    Args:
        rows: as `distill.encoding.tokenize` makes them.
    """
    if isinstance(tokenizer, BaseImageProcessor):
        order, inputs, collate = np.arange(len(rows)), rows, default_data_collator
    else:
        order = np.argsort(rows["length"], kind="stable")
        inputs = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
        collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, dict(collate([inputs[int(index)] for index in chosen]))
