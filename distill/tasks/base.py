"""What a task is: its columns, label names and metrics; GLUE's nine."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from distill.errors import InputError, nearest_name

TaskKind = Literal[
    "classification",
    "multi-label",
    "regression",
    "token-classification",
    "question-answering",
    "masked-lm",
    "causal-lm",
    "image-classification",
]

OF_CLASSES = ("classification", "image-classification")
"""Kinds with one class a row."""

OF_LANGUAGE = ("masked-lm", "causal-lm")
"""Kinds whose labels are the tokens themselves."""


@dataclass(frozen=True)
class Task:
    """One task on one or two text columns, a column of words, or a column of images."""

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
    """The GLUE task of that name.

    Raises:
        InputError: no such task.
    """
    if name not in GLUE:
        raise InputError(f"task: {name!r} is not a GLUE task; {nearest_name(name, GLUE)} (own data goes under `data:`)")
    return GLUE[name]


def is_better_lower(metric: str) -> bool:
    """Whether less of a metric is better: of perplexity, and of losses (`loss`, `eval_loss`, `loss/soft`)."""
    name = metric.removeprefix("eval_")
    return name.endswith(("perplexity", "loss")) or name.startswith("loss/")
