"""Score one model on a task's validation and test rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
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
from distill.entities import entity_counts, scores
from distill.metrics import compute_metrics, divergences, language_scores, predict, primary_score, words_of
from distill.models import PROBLEM_TYPES
from distill.predictions import IGNORED, ProblemType, logits_of
from distill.questions import answer_scores, answers_of, normalised
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
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


def divergence_from(task: Task, reference: Sequence, logits: Sequence) -> dict[str, float]:
    """How far a model's predictions are from another's: the mean of `divergences`, and its 95 % interval.

    Args:
        reference: the other's logits B×C; logits alike.
    """
    problem = cast(ProblemType, PROBLEM_TYPES[task.kind])
    of_rows = divergences(problem, np.asarray(reference), np.asarray(logits))
    low, high = np.percentile([of_rows[rows].mean() for rows in _resamples(len(of_rows))], [2.5, 97.5])
    return {"mean": float(of_rows.mean()), "low": float(low), "high": float(high)}


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
        return predicted, language_scores(_losses(predicted)), None
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


def _losses(predictions: Sequence[dict]) -> NDArray:
    return np.array([[each["loss"], each["right"], len(each["tokens"])] for each in predictions], dtype=np.float64)


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


def _scorer(task: Task, predictions: Sequence, labels: Sequence) -> Callable[[np.ndarray], float]:
    """The primary metric of some rows, by their numbers."""
    if task.kind == "token-classification":
        counts = entity_counts(predictions, labels, task.label_names or ())
        return lambda rows: scores(counts[rows])[task.primary_metric]
    if task.kind == "question-answering":
        of_rows = answer_scores(predictions, [label["text"] for label in labels])[:, 0]
        return lambda rows: float(of_rows[rows].mean())
    if task.kind in OF_LANGUAGE:
        losses = _losses(predictions)
        return lambda rows: language_scores(losses[rows])[task.primary_metric]
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
            batch = {name: values.to(model.device) for name, values in batch.items()}
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
