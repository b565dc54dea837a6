"""A task, and a kind of task: its columns, labels, targets, metrics and words for cards; GLUE's nine tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict

import datasets
import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from distill.errors import InputError, nearest_name
from distill.tasks.scorers import Scorer
from distill.tasks.targets import Targets

TaskKind: TypeAlias = str
"""A name in `distill.tasks.kinds.KINDS`."""

STORED_COLUMNS = STORED_LOGITS, STORED_PROBABILITIES = "teacher_logits", "teacher_probabilities"
"""Of rows that carry a teacher's predictions."""


@dataclass(frozen=True)
class Task:
    """One task on the columns that its kind reads: texts, words or images."""

    name: str
    kind: TaskKind
    text: tuple[str, ...]
    label: str = "label"
    label_names: tuple[str, ...] | None = None
    """In the order of the label ids; None for regression, and for own data until its rows have been read."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of `distill.tasks.rows.METRICS` or of its kind; a metric may give several keys."""
    primary_metric: str = "accuracy"
    validation_splits: tuple[tuple[str, str], ...] = (("validation", ""),)
    """Pairs of a validation split and the suffix of its metric keys."""

    @property
    def num_labels(self) -> int:
        """Number of outputs of the model's head: the classes, or one for regression."""
        return len(self.label_names) if self.label_names else 1

    def with_label_names(self, label_names: tuple[str, ...]) -> "Task":
        """This task once its labels are known."""
        return replace(self, label_names=label_names)


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """What stands in the label column of a kind, and what becomes of it. Nothing has a default."""

    named: bool
    """Whether labels are names, or ids of names."""
    sets: bool
    """Whether a row has a set of them, which becomes zeros and ones."""
    tags: bool
    """Whether a row has a list of them, one a word."""
    scores: bool
    """Whether labels are numbers."""
    unknown: Callable[[Task, Any], Any]
    """(task, the first text or the words of a row) → the label of a row that has none."""
    complete: Callable[[datasets.Dataset, Task, Sequence | None], tuple[Sequence | None, str | None]]
    """(rows of a split, task, their labels as read; None for columns that are neither names nor numbers) → the labels
    to keep, None for none; and what is wrong with the column, or None."""

    @property
    def lists(self) -> bool:
        """Whether a row has several labels."""
        return self.sets or self.tags

    @property
    def one_class(self) -> bool:
        """Whether a row has one of several classes."""
        return self.named and not self.lists


@dataclass(frozen=True)
class EncodeOptions:
    """How rows of a kind become model inputs: lengths in tokens, and whether they are scored."""

    max_length: int
    """Tokens."""
    stride: int | None
    """Tokens that neighbouring windows of a long context share; None for the kind's own."""
    scored: bool
    """Whether the rows are scored, and not trained on."""


class ScoringArguments(TypedDict, total=False):
    """The arguments with which a Trainer scores its evaluations."""

    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor]


Batch: TypeAlias = dict[str, list]
"""Columns of some rows."""
Encode: TypeAlias = Callable[[Batch, Sequence[int], Task, Any, EncodeOptions], Batch]
"""(rows, their numbers, task, tokenizer or image processor, options) → inputs and `labels` of as many rows or more,
and of texts `cut`: whether `max_length` took something from a row."""


@dataclass(frozen=True)
class RowMetric:
    """How each row by itself is scored."""

    name: str
    """Of the mean over rows; `is_better_lower` says which way it goes."""
    of_rows: Callable[[Task, Any, Any], np.ndarray]
    """(task, predictions, labels) → whether each row is right, as booleans; or a number of each row."""


@dataclass(frozen=True)
class EngineUsage:
    """Python that prints a prediction from what an inference engine computes of tokens, with numpy alone."""

    rows: str
    """A list of what is encoded; `$example` stands for a text or a pair, `$mask` for the tokenizer's mask."""
    reading: str
    """The lines that print: `rows` are the encoded rows, `names` the labels by their ids as text, and the engine's
    outputs are called as in transformers (`logits`)."""


@dataclass(frozen=True, kw_only=True)
class PredictionRule:
    """What a kind predicts for rows without labels, and the line that says it. Nothing has a default."""

    label: Callable[[Task, Any], Any]
    """(task, the first text or the words of a row) → what stands for the label that the row lacks."""
    encode: Encode
    """Rows → inputs. Where a row becomes several of them, or none, `row` holds its number."""
    read: Callable[[PreTrainedModel, Mapping[str, Tensor], Sequence[Any], str], list[Any]]
    """(model, batch, labels of its rows, the model's name) → of each row what its line is made of."""
    window_columns: tuple[str, ...]
    """Those of the encoded rows that `line` needs."""
    reads_text: bool
    """Whether `line` needs the row's text columns."""
    line: Callable[[Task, Any, Sequence[Any], Sequence[Mapping[str, Any]], Sequence[Any]], dict[str, Any]]
    """(task, tokenizer or image processor, the row's text columns, its encoded rows, what `read` gave of each) → the
    row's prediction as JSON, with the same keys in every row."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between kinds of task. Nothing has a default: a kind that leaves something out can't be made."""

    columns: tuple[str, ...]
    """Those that are read, unless the user names others."""
    pairs: bool
    """Whether there may also be two text columns; the teacher may then read other tokens than the student."""
    reads: Literal["text", "words", "images"]
    """What stands in these columns."""
    grouped_by: slice
    """Which of them tell a row from others when a validation split is cut off; rows alike in these stay together."""
    label: str
    """The label's column; empty where there is none."""
    labels: LabelRule
    unlabelled: bool
    """Whether rows may lack a label."""
    stored_predictions: bool
    """Whether training rows may carry a teacher's predictions, in columns that a user names."""
    encode: Encode
    """Rows → inputs. Images become theirs whenever they are read."""
    needs_offsets: bool
    """Whether this needs a tokenizer that tells where a token stands in its text."""
    strides: bool
    """Whether long texts become windows whose overlap a user chooses."""
    metrics: tuple[str, ...]
    """Names of `distill.tasks.rows.METRICS` or of its kind, for a user's own data."""
    primary_metric: str
    further_metrics: tuple[str, ...]
    """Keys that are computed beside the metrics'."""
    targets: Targets
    """What its models predict."""
    predict: Callable[[np.ndarray], np.ndarray]
    """Logits …×C of rows, tokens or ends of a span → what they predict."""
    read: Callable[[PreTrainedModel, Mapping[str, Tensor], Sequence[Any], str], list[Any]]
    """(model, batch, labels of its rows, the model's name) → of each row what `predictions` is made of."""
    predictions: Callable[[Task, datasets.Dataset, Any, datasets.Dataset], list]
    """(task, tokenized rows, what `read` gave of each, the split) → predictions as in `Evaluation`."""
    scores: Callable[[Task, Any, Any, Any], dict[str, float]]
    """(task, predictions, labels, logits B×C or None) → the metrics."""
    while_training: Callable[[Task, datasets.Dataset, datasets.Dataset], ScoringArguments]
    """(task, tokenized rows, the split) → what a Trainer takes."""
    scorer: Callable[[Task, Any, Any], Scorer]
    """(task, predictions, labels), one of each a row → the primary metric, for the score and for its bootstrap."""
    agreement: Callable[[Any, Any], float]
    """The predictions of two models → how far they are the same."""
    row_metric: RowMetric | None
    """None where what is predicted of a row is not one thing."""
    classes: Callable[[Task, Any], dict[str, np.ndarray]]
    """(task, labels) → for each class which rows are of it or hold it, as booleans; empty where there are no
    classes."""
    outcomes: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None
    """(logits B×C, labels) → logits B×L×C of the distributions that each row's prediction stands for, and the numbers
    B×L of the outcomes that came true; None where predictions are no distributions, or their logits are not kept."""
    in_words: Callable[[Task, Any], Any]
    """(task, one row's prediction or label) → what a reader is shown of it, as JSON."""
    prediction: PredictionRule
    """Of rows without labels."""
    names_labels: bool
    """Whether a model's config says what its outputs are (classes, tags, or the score)."""
    auto_class: str
    """The Auto class of transformers that loads models."""
    architectures: tuple[str, ...]
    """How the names of these models' classes end."""
    peft_task: str | None
    """PEFT's name for what is predicted; None where it has none."""
    heads: tuple[str, ...] | None
    """Layers that PEFT puts adapters into where it should train them as a whole; None where it knows them."""
    pipeline_tag: str
    """The Hub's name of the kind."""
    usage: str
    """Python that prints a prediction of `$model` for `$example`, for `string.Template`."""
    engine_usage: EngineUsage | None
    """The same of an export, without transformers; None where that makes the inputs."""


def pipeline_usage(tag: str, example: str, more: str = "") -> str:
    """Write the Python code that predicts with transformers' pipeline: the `Kind.usage` of kinds that have one.

    Args:
        tag: of the pipeline.
        example: Python of what is predicted for.
        more: further arguments of the pipeline, after a comma.
    """
    return (
        f'from transformers import pipeline\n\npredict = pipeline("{tag}", "$model"{more})\nprint(predict({example}))'
    )


def labels_as_read(rows: datasets.Dataset, task: Task, labels: Sequence | None) -> tuple[Sequence | None, str | None]:
    """Keep labels as they were read: the `LabelRule.complete` of kinds whose labels are names or numbers alone.

    Args:
        rows: of one split; they change nothing here.
        task: of these rows; it changes nothing here.
        labels: of each row; None where they could not be read.

    Returns:
        The labels, and None, as nothing is wrong with them.
    """
    return labels, None


def _pair(name: str, first: str, second: str, labels: tuple[str, ...], **more: Any) -> Task:
    return Task(name, "classification", (first, second), label_names=labels, **more)


_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY_AND_F1: dict[str, Any] = {"metrics": ("accuracy", "f1", "average"), "primary_metric": "average"}

# Columns and label order are those of `nyu-mll/glue` on the Hub; metrics are GLUE's own (Wang et al. 2018, Table 1).
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola",
            "classification",
            ("sentence",),
            label_names=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            primary_metric="matthews_correlation",
        ),
        Task("sst2", "classification", ("sentence",), label_names=("negative", "positive")),
        _pair("mrpc", "sentence1", "sentence2", ("not_equivalent", "equivalent"), **_ACCURACY_AND_F1),
        _pair("qqp", "question1", "question2", ("not_duplicate", "duplicate"), **_ACCURACY_AND_F1),
        Task(
            "stsb",
            "regression",
            ("sentence1", "sentence2"),
            metrics=("pearson", "spearmanr", "average"),
            primary_metric="average",
        ),
        _pair(
            "mnli",
            "premise",
            "hypothesis",
            ("entailment", "neutral", "contradiction"),
            validation_splits=(("validation_matched", ""), ("validation_mismatched", "_mm")),
        ),
        _pair("qnli", "question", "sentence", _ENTAILMENT),
        _pair("rte", "sentence1", "sentence2", _ENTAILMENT),
        _pair("wnli", "sentence1", "sentence2", ("not_entailment", "entailment")),
    )
}


def glue_task(name: str) -> Task:
    """Give the GLUE task of a name.

    Raises:
        InputError: no such task.
    """
    if name not in GLUE:
        raise InputError(f"task: {name!r} is not a GLUE task; {nearest_name(name, GLUE)} (own data goes under `data:`)")
    return GLUE[name]


def is_better_lower(metric: str) -> bool:
    """Whether less of a metric is better: of perplexity, errors and losses (`loss`, `eval_loss`, `loss/soft`)."""
    name = metric.removeprefix("eval_")
    return name.endswith(("perplexity", "error", "loss")) or name.startswith("loss/")
