"""What a task is: its kind, columns, label names and metrics; GLUE's nine, and one from a user's own columns."""

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
    """Names of `distill.tasks.metrics`; a metric may give several keys."""
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


DEFAULT_COLUMNS: dict[TaskKind, tuple[list[str], str]] = {
    "classification": (["text"], "label"),
    "multi-label": (["text"], "label"),
    "regression": (["text"], "label"),
    "token-classification": (["tokens"], "label"),
    "question-answering": (["question", "context"], "answers"),
    "masked-lm": (["text"], ""),
    "causal-lm": (["text"], ""),
    "image-classification": (["image"], "label"),
}
"""Of each kind the columns that are read, and the label's (empty where there is none), unless the user names others."""

_METRICS: dict[TaskKind, tuple[tuple[str, ...], str]] = {
    "classification": (("accuracy", "f1_macro", "roc_auc"), "accuracy"),
    "multi-label": (("f1_micro", "f1_macro", "accuracy"), "f1_micro"),
    "regression": (("pearson", "spearmanr"), "pearson"),
    "token-classification": (("entity_f1", "accuracy"), "entity_f1"),
    "question-answering": (("f1", "exact_match"), "f1"),
    "masked-lm": (("perplexity", "accuracy"), "perplexity"),
    "causal-lm": (("perplexity", "accuracy"), "perplexity"),
    "image-classification": (("accuracy", "f1_macro"), "accuracy"),
}


def is_better_lower(metric: str) -> bool:
    """Whether less of a metric is better: of perplexity, and of losses (`loss`, `eval_loss`, `loss/soft`)."""
    name = metric.removeprefix("eval_")
    return name.endswith(("perplexity", "loss")) or name.startswith("loss/")


def own_task(kind: TaskKind, text: tuple[str, ...], label: str) -> Task:
    """A task on a user's own columns; its label names are read from the data."""
    metrics, primary = _METRICS[kind]
    return Task("own", kind, text, label, metrics=metrics, primary_metric=primary)
