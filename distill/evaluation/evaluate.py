"""Score one model on a task's validation and test rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    EvalPrediction,
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
from distill.tasks.base import OF_LANGUAGE, Task
from distill.tasks.kinds import KINDS
from distill.tasks.language import language_scores, token_losses
from distill.tasks.metrics import compute_metrics
from distill.tasks.questions import answers_of, span_scores
from distill.tasks.targets import (
    CHUNK,
    IGNORED,
    OF_ROWS,
    labels_of,
    logits_in_chunks,
    logits_of,
    problem_type,
    refuse_not_finite_outputs,
)
from distill.tasks.words import tag_scores, tags_of_words, words_of


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
    """Metrics on every scored split (`test_…` for a labelled test split, which chooses nothing).

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
    """Class ids or scores of tokenized rows, in their order.

    Args:
        name: of the rows, beside the progress bar.
    """
    batches = _inputs(model.eval(), rows, tokenizer, batch_size=batch_size, text=f"Predicting {name}")
    logits = _together(_forwards(batches, model, type(model).__name__), len(rows))
    return KINDS[task.kind].predict(logits).tolist()


_Inputs: TypeAlias = Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]
"""Numbers of rows, and a model's inputs."""

_Batches: TypeAlias = Iterator[tuple[NDArray[np.int64], Tensor]]
"""Numbers of rows, and their logits."""


def _score(
    model: PreTrainedModel, data: Data, split: str, rows: datasets.Dataset, inputs: _Inputs, *, name: str
) -> tuple[list, dict[str, float], list | None]:
    """(predictions, metrics, logits) of a split; logits where a row has one prediction."""
    task = data.task
    if task.kind in OF_LANGUAGE:
        with torch.inference_mode():
            predicted = _language_predictions(model, rows, inputs, name)
        return predicted, language_scores(token_losses(predicted)), None
    batches = _forwards(inputs, model, name)
    if task.kind == "question-answering":
        of_windows: list = [None] * len(rows)
        for numbers, found in batches:
            for number, each in zip(numbers, found.numpy(), strict=True):
                of_windows[number] = each
        answers = answers_to(data.splits[split], task, rows, of_windows)
        return answers, span_scores(answers, data.labels(split)), None
    if task.kind == "token-classification":
        of_tokens, found_tags = rows["labels"], cast("list[list[int]]", [[]] * len(rows))
        for numbers, found in batches:
            for number, tags in zip(numbers, found.argmax(-1).numpy(), strict=True):
                known = np.array(of_tokens[number]) != IGNORED
                found_tags[number] = tags[: len(known)][known].tolist()
        of_words = tags_of_words(found_tags, rows["words"], data.labels(split))
        return of_words, tag_scores(task, of_words, data.labels(split)), None
    labels = np.asarray(data.labels(split))
    logits = _together(batches, len(labels))
    return KINDS[task.kind].predict(logits).tolist(), compute_metrics(task, logits, labels), logits.tolist()


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
    if task.kind == "token-classification":

        def of_words(output: EvalPrediction) -> dict[str, float]:
            found = words_of(output.predictions, output.label_ids)
            return tag_scores(task, tags_of_words(found, rows["words"], questions["label"]), questions["label"])

        return {"preprocess_logits_for_metrics": lambda logits, _: logits.argmax(-1), "compute_metrics": of_words}
    return {"compute_metrics": lambda output: compute_metrics(task, output.predictions, output.label_ids)}


def answers_to(
    questions: datasets.Dataset, task: Task, windows: datasets.Dataset, logits: Sequence[NDArray]
) -> list[str]:
    """A model's answer to each question.

    Args:
        windows: as `distill.data.tokenized.tokenize` makes them of the questions.
        logits: 2×T of each window.
    """
    may_be_none = any(not answers["text"] for answers in questions["label"])
    of_windows = zip(windows["row"], windows["starts"], windows["ends"], logits, strict=True)
    return answers_of(questions[task.text[1]], of_windows, may_be_none=may_be_none)


def _language_predictions(
    model: PreTrainedModel, rows: datasets.Dataset, batches: _Inputs, name: str
) -> list[dict[str, Any]]:
    predicted: list = [None] * len(rows)
    of_rows = rows["labels"]
    for numbers, batch in batches:
        mask = batch["attention_mask"].bool()
        labels = torch.full_like(batch["input_ids"], IGNORED)
        labels[mask] = torch.tensor([label for number in numbers for label in of_rows[number]], device=labels.device)
        problem = problem_type(model)
        every = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        labels = cast(Tensor, labels_of(problem, {"attention_mask": mask, "labels": labels}, every).labels)
        known = labels != IGNORED
        places = torch.nn.functional.pad(
            known, (0, mask.shape[1] - known.shape[1])
        )  # a causal LM's last predicts nothing
        losses, tokens = [], []
        for logits, targets in zip(logits_in_chunks(model, batch, places), labels[known].split(CHUNK), strict=True):
            refuse_not_finite_outputs(logits, None, name)
            losses.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"))
            tokens.append(logits.argmax(-1))
        counts = known.sum(1).tolist()
        of_tokens = (torch.cat(each).cpu().split(counts) for each in (losses, tokens, [labels[known]]))
        for number, loss, found, truth in zip(numbers, *of_tokens, strict=True):
            right = int((found == truth).sum())
            predicted[number] = {"loss": float(loss.double().sum()), "right": right, "tokens": found.tolist()}
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


def _forwards(batches: _Inputs, model: PreTrainedModel, name: str) -> _Batches:
    """The logits of batches; for spans B×2×T."""
    with torch.inference_mode():
        for chosen, batch in batches:
            logits = logits_of(model(**batch)).float().cpu()
            refuse_not_finite_outputs(logits, batch.get("attention_mask"), name)
            yield chosen, logits


def _inputs(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: Processor, *, batch_size: int, text: str
) -> _Inputs:
    """Those of `input_batches` that the model takes, on its device.

    Args:
        text: beside the progress bar.
    """
    of_tokens = problem_type(model) not in OF_ROWS
    batches = input_batches(rows, tokenizer, batch_size=batch_size, padding_side="right" if of_tokens else None)
    for chosen, batch in progress(batches, text, total=math.ceil(len(rows) / batch_size)):
        batch = {
            name: values.to(model.device, model.dtype if values.is_floating_point() else None)  # pixels
            for name, values in batch.items()
        }
        yield chosen, accepted_inputs(model, batch)


def input_batches(
    rows: datasets.Dataset, tokenizer: Processor, *, batch_size: int, padding_side: str | None = None
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Batches of rows of like length, so little padding is computed: the rows' numbers, and a model's inputs.

    Args:
        rows: as `distill.data.tokenized.tokenize` makes them.
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
