"""Score one model on a task's validation and test rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    default_data_collator,
)
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from distill.common.console import progress
from distill.common.hardware import compute_device
from distill.data.load import Data, Truncated
from distill.data.tokenized import Processor
from distill.evaluation.intervals import score_interval
from distill.models.structure import accepted_inputs
from distill.tasks.base import ScoringArguments, Task
from distill.tasks.kinds import KINDS, targets_of


@dataclass(frozen=True)
class Evaluation:
    """Metrics and predictions of one model."""

    metrics: dict[str, float]
    interval: tuple[float, float]
    """Of the primary metric on the first validation split, at 95 %: see `score_interval`."""
    predictions: list
    """For each row of the first validation split a class id, a score, a list of zeros and ones, a list of its words'
    class ids (−100 for words that were not read), or an answer; for each window of a language model's texts
    {"loss": nats, "right": tokens, "tokens": ids that were predicted}."""
    logits: list | None = None
    """B×C, of kinds with one prediction a row."""
    truncated: Truncated | None = None
    """How many rows of each scored split the model's tokenizer cut."""


def evaluate_model(
    model: PreTrainedModel, tokenizer: Processor, data: Data, *, name: str = "model", batch_size: int = 64
) -> Evaluation:
    """Compute a model's metrics on every scored split (`test_…` for a labelled test split, which chooses nothing).

    Args:
        model: is moved to the device that computes, and put into evaluation mode.
        tokenizer: the model's, or its image processor.
        data: with the splits to score.
        name: of the model, for progress bars and messages.
        batch_size: rows.

    Raises:
        InputError: outputs that are NaN or infinite, of which an argmax would make an accuracy.
    """
    model = model.to(compute_device()).eval()
    metrics: dict[str, float] = {}
    interval = (0.0, 0.0)
    predictions: list = []
    logits: list | None = None
    for split, prefix, suffix in data.scored_splits():
        rows = data.tokenized(split, tokenizer)
        batches = _inputs(model, rows, tokenizer, batch_size=batch_size, text=f"Scoring {name} on {split}")
        predicted, found, of_rows = _score(model, data, split, rows, batches, name=name)
        metrics |= {prefix + key + suffix: value for key, value in found.items()}
        if not predictions:
            predictions, logits = predicted, of_rows
            interval = score_interval(data.task, predictions, data.labels(split))
    return Evaluation(metrics, interval, predictions, logits, data.truncated(tokenizer, train=False))


def predict_rows(
    model: PreTrainedModel, tokenizer: Processor, task: Task, rows: datasets.Dataset, *, name: str, batch_size: int = 64
) -> list:
    """Predict the class ids or scores of tokenized rows, in their order.

    Args:
        model: on its device.
        tokenizer: the model's, or its image processor.
        task: of the rows, with one prediction a row.
        rows: as `distill.data.tokenized.tokenize` makes them.
        name: of the rows, beside the progress bar.
        batch_size: rows.

    Raises:
        InputError: outputs that are NaN or infinite.
    """
    logits = logits_of_rows(model, tokenizer, task, rows, name=name, batch_size=batch_size)
    return KINDS[task.kind].predict(logits).tolist()


def logits_of_rows(
    model: PreTrainedModel, tokenizer: Processor, task: Task, rows: datasets.Dataset, *, name: str, batch_size: int = 64
) -> NDArray:
    """Compute the logits B×C of tokenized rows, in their order: arguments and errors as of `predict_rows`."""
    batches = _inputs(model.eval(), rows, tokenizer, batch_size=batch_size, text=f"Predicting {name}")
    return np.stack(_read(model, task, rows, batches, type(model).__name__))


_Inputs: TypeAlias = Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]
"""Numbers of rows, and a model's inputs."""


def _score(
    model: PreTrainedModel, data: Data, split: str, rows: datasets.Dataset, inputs: _Inputs, *, name: str
) -> tuple[list, dict[str, float], list | None]:
    """(predictions, metrics, logits) of a split; logits where a row has one prediction."""
    task, its = data.task, KINDS[data.task.kind]
    found = _read(model, task, rows, inputs, name)
    logits = np.stack(found) if its.targets.per_row else None
    predictions = its.predictions(task, rows, found, data.splits[split])
    scores = its.scores(task, predictions, data.labels(split), logits)
    return predictions, scores, None if logits is None else logits.tolist()


def metrics_while_training(data: Data, rows: datasets.Dataset) -> ScoringArguments:
    """Make the arguments with which a Trainer scores the first validation split, `compute_metrics` and what precedes
    it.

    Args:
        data: which holds the split.
        rows: the split, tokenized.
    """
    return KINDS[data.task.kind].while_training(data.task, rows, data.splits[data.task.validation_splits[0][0]])


def _read(model: PreTrainedModel, task: Task, rows: datasets.Dataset, inputs: _Inputs, name: str) -> list:
    """Keep of each tokenized row what the kind's `read` makes of a model's outputs, in the order of the rows."""
    found: list = [None] * len(rows)
    of_rows = KINDS[task.kind].targets.per_row or "labels" not in rows.column_names
    labels = [None] * len(rows) if of_rows else rows["labels"]  # an image's would be decoded with it
    with torch.inference_mode():
        for numbers, batch in inputs:
            kept = KINDS[task.kind].read(model, batch, [labels[number] for number in numbers], name)
            for number, each in zip(numbers, kept, strict=True):
                found[number] = each
    return found


def _inputs(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: Processor, *, batch_size: int, text: str
) -> _Inputs:
    """Select from `input_batches` the inputs that the model takes, on its device."""
    batches = input_batches(
        rows, tokenizer, batch_size=batch_size, padding_side=None if targets_of(model).per_row else "right"
    )
    for chosen, batch in progress(batches, text, total=math.ceil(len(rows) / batch_size)):
        yield chosen, inputs_on_device(model, batch)


def inputs_on_device(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the inputs of a batch that the model takes, on its device and pixels in its dtype."""
    moved = {
        name: values.to(model.device, model.dtype if values.is_floating_point() else None)
        for name, values in batch.items()
    }
    return accepted_inputs(model, moved)


def input_batches(
    rows: datasets.Dataset, tokenizer: Processor, *, batch_size: int, padding_side: str | None = None
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Iterate over batches of rows of like length, with little padding: the rows' numbers, and a model's inputs.

    Args:
        rows: as `distill.data.tokenized.tokenize` makes them.
        tokenizer: which pads them; the image processor of images.
        batch_size: rows.
        padding_side: the tokenizer's by default; on the right a token stands where it stands in its row.
    """
    if isinstance(tokenizer, BaseImageProcessor):
        order, inputs, collate = np.arange(len(rows)), rows, default_data_collator
    else:
        order = np.argsort(rows["length"], kind="stable")
        inputs = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
        collate = partial(pad_without_fast_tokenizer_warning, tokenizer, padding_side=padding_side, return_tensors="pt")
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, dict(collate([inputs[int(index)] for index in chosen]))
