"""Kinds with one prediction a row: its metrics as `evaluate.Metric` classes, which need no network.

`evaluate.load` fetches a script from the Hub.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from sklearn import metrics as sk
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from distill.tasks import scorers
from distill.tasks.base import ScoringArguments, Task
from distill.tasks.outputs import finite_logits
from distill.tasks.scorers import Scorer


def most_likely(logits: np.ndarray) -> np.ndarray:
    """Choose the most likely class ids of logits …×C."""
    return logits.argmax(-1)


def label_sets(logits: np.ndarray) -> np.ndarray:
    """Choose the labels of logits B×C whose probability is above a half, as zeros and ones B×C."""
    return (logits > 0).astype(int)


def scores_of(logits: np.ndarray) -> np.ndarray:
    """Read the scores B of a regression's outputs B×1 or B."""
    return logits.reshape(-1)


def read_rows(model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence, name: str) -> list[np.ndarray]:
    """Compute the logits C of each row of a batch.

    Args:
        model: in evaluation mode.
        batch: its inputs, of B rows.
        labels: of these rows; they change nothing here.
        name: of the model, for messages.

    Raises:
        InputError: logits that are NaN or infinite.
    """
    return list(finite_logits(model, batch, name).numpy())


def row_predictions(
    predict: Callable[[np.ndarray], np.ndarray],
) -> Callable[[Task, datasets.Dataset, Sequence[np.ndarray], datasets.Dataset], list]:
    """Make a kind's `predictions`, which applies `predict` to the logits B×C of all rows."""
    return lambda task, rows, found, split: predict(np.stack(found)).tolist()


def rows_while_training(
    predict: Callable[[np.ndarray], np.ndarray],
) -> Callable[[Task, datasets.Dataset, datasets.Dataset], ScoringArguments]:
    """Make a kind's `while_training`, which scores what `predict` makes of the logits B×C of all rows."""

    def scoring(task: Task, rows: datasets.Dataset, split: datasets.Dataset) -> ScoringArguments:
        def of_rows(output: EvalPrediction) -> dict[str, float]:
            return row_scores(task, predict(output.predictions), output.label_ids, output.predictions)

        return {"compute_metrics": of_rows}

    return scoring


def row_scores(task: Task, predictions: ArrayLike, labels: ArrayLike, logits: np.ndarray) -> dict[str, float]:
    """Compute the task's metrics of one split.

    Args:
        task: whose metrics are computed.
        predictions: B class ids, B scores, or B×C zeros and ones of label sets; labels alike.
        labels: of the rows.
        logits: B×C, or B of a regression.
    """
    found, truth = np.asarray(predictions), np.asarray(labels)
    results: dict[str, float] = {}
    for name in task.metrics:
        if name == "average":  # GLUE's own: the mean of the task's other metrics
            results[name] = float(np.mean(list(results.values())))
        elif name == "roc_auc":
            if task.num_labels == 2 and len(np.unique(truth)) == 2:  # undefined otherwise
                results |= RocAuc().compute(predictions=logits[:, 1] - logits[:, 0], references=truth)
        else:
            results |= METRICS[name](found.ndim).compute(predictions=found, references=truth)
    return {key: float(value) for key, value in results.items()}


def row_scorer(task: Task, predictions: Sequence, labels: Sequence) -> Scorer:
    """Make a function of row weights that gives the task's primary metric of the rows.

    Args:
        task: whose primary metric it is.
        predictions: as in `row_scores`.
        labels: as in `row_scores`.
    """
    found, truth = np.asarray(predictions), np.asarray(labels)
    names = [name for name in task.metrics if name in _SCORERS] if task.primary_metric == "average" else []
    return scorers.mean_of([_SCORERS[name](truth, found) for name in names or [task.primary_metric]])


def row_agreement(predictions: Sequence, baseline: Sequence) -> float:
    """Compute the share of rows on which two models predict the same class, or the same set of labels.

    Args:
        predictions: B class ids, or B×C zeros and ones, of one model.
        baseline: of the other.
    """
    found, other = np.asarray(predictions), np.asarray(baseline)
    return scorers.whole(scorers.accuracy(other, found), len(found))


def correlation(predictions: Sequence, baseline: Sequence) -> float:
    """Compute Pearson's correlation of two models' scores of the same rows; 0 where those of either are all the same.

    Args:
        predictions: B scores of one model.
        baseline: of the other.
    """
    found, other = np.asarray(predictions), np.asarray(baseline)
    return scorers.whole(scorers.pearson(other, found), len(found))


def rows_right(task: Task, predictions: Sequence, labels: Sequence) -> np.ndarray:
    """Find the rows whose class is predicted right, or whose whole set of labels: N booleans.

    Args:
        task: of the rows; it changes nothing here.
        predictions: N class ids, or N×C zeros and ones.
        labels: alike.
    """
    right = np.asarray(predictions) == np.asarray(labels)
    return right if right.ndim == 1 else right.all(-1)


def squared_errors(task: Task, predictions: Sequence, labels: Sequence) -> np.ndarray:
    """Compute the squared error of each row's score: N.

    Args:
        task: of the rows; it changes nothing here.
        predictions: N scores.
        labels: N scores.
    """
    return np.square(np.asarray(predictions, dtype=np.float64) - np.asarray(labels, dtype=np.float64))


def rows_of_classes(task: Task, labels: Sequence) -> dict[str, np.ndarray]:
    """For each class which rows are of it, or have it among their labels.

    Args:
        labels: B class ids, or B×C zeros and ones.
    """
    truth = np.asarray(labels)
    of_classes = truth[:, None] == np.arange(task.num_labels) if truth.ndim == 1 else truth == 1
    return dict(zip(task.label_names or (), of_classes.T, strict=True))


def no_classes(task: Task, labels: Sequence) -> dict[str, np.ndarray]:
    """Return an empty dictionary: the `Kind.classes` of a kind without any.

    Args:
        task: of the rows; it changes nothing here.
        labels: of the rows; they change nothing here.
    """
    return {}


def class_outcomes(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each row one distribution over the classes: the `Kind.outcomes` of rows of one class each.

    Args:
        logits: B×C.
        labels: B class ids.

    Returns:
        The logits as B×1×C, and the labels as B×1.
    """
    return logits[:, None, :], labels[:, None]


def label_outcomes(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each label a distribution of two outcomes: the `Kind.outcomes` of sets of labels.

    Args:
        logits: B×C.
        labels: B×C zeros and ones.

    Returns:
        Logits B×C×2 as those of `losses.per_label`, and B×C outcomes: 0 where the label is there, 1 where it is not.
    """
    return np.stack([logits, np.zeros_like(logits)], axis=-1), (labels != 1).astype(np.int64)


def class_in_words(task: Task, label: int) -> str:
    """Name a class.

    Args:
        task: holds the names.
        label: the class id.
    """
    return (task.label_names or ())[label]


def labels_in_words(task: Task, label: Sequence[int]) -> list[str]:
    """Name the labels of a set.

    Args:
        task: holds the names.
        label: C zeros and ones, 1 for a label that is there.
    """
    return [name for name, there in zip(task.label_names or (), label, strict=True) if there]


def as_predicted(task: Task, label: Any) -> Any:
    """Return a prediction or label as it is: the `Kind.in_words` of values that say themselves what they are.

    Args:
        task: of the row; it changes nothing here.
        label: the row's prediction or label.
    """
    return label


class _OfflineMetric(evaluate.Metric):
    """A metric of one function of (references, predictions); what it computes is written in its subclass."""

    dtype = "int64"
    score: Callable[..., float]

    def __init__(self, dimensions: int = 1) -> None:
        self._dimensions = dimensions  # 2 for sets of labels
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self.dtype)
        of_a_row = value if self._dimensions == 1 else datasets.List(value)
        features = {"predictions": of_a_row, "references": of_a_row}
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references, one of each a row",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        return {self.key: type(self).score(np.asarray(references), np.asarray(predictions))}

    key: str


def _whole(make: Callable[[np.ndarray, np.ndarray], Scorer]) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda references, predictions: scorers.whole(make(references, predictions), len(references))


class Accuracy(_OfflineMetric):
    """Share of rows predicted right."""

    key = "accuracy"
    score = staticmethod(_whole(scorers.accuracy))


class F1(_OfflineMetric):
    """F1 of class 1, as GLUE scores mrpc and qqp."""

    key = "f1"
    score = staticmethod(_whole(scorers.f1_of_ones))


class MicroF1(_OfflineMetric):
    """F1 of all decisions of all labels together."""

    key = "f1_micro"
    score = staticmethod(_whole(scorers.f1_of_ones))


class MacroF1(_OfflineMetric):
    """Unweighted mean of the F1 of every class."""

    key = "f1_macro"
    score = staticmethod(
        lambda references, predictions: sk.f1_score(references, predictions, average="macro", zero_division=0)
    )


class MatthewsCorrelation(_OfflineMetric):
    """Matthews correlation coefficient, as GLUE scores cola; 0 where the predictions are all one class."""

    key = "matthews_correlation"
    score = staticmethod(_whole(scorers.matthews))


class RocAuc(_OfflineMetric):
    """Area under the ROC curve of a two-class task; the predictions are the margin of class 1 over class 0."""

    key = "roc_auc"
    dtype = "float64"
    score = staticmethod(sk.roc_auc_score)


class Pearson(_OfflineMetric):
    """Pearson correlation; 0 where either side is constant (it is undefined there)."""

    key = "pearson"
    dtype = "float64"
    score = staticmethod(_whole(scorers.pearson))


class Spearman(_OfflineMetric):
    """Spearman rank correlation; 0 where either side is constant (it is undefined there)."""

    key = "spearmanr"
    dtype = "float64"
    score = staticmethod(_whole(scorers.spearman))


METRICS: dict[str, type[_OfflineMetric]] = {
    metric.key: metric for metric in (Accuracy, F1, MicroF1, MacroF1, MatthewsCorrelation, RocAuc, Pearson, Spearman)
}

_SCORERS: dict[str, Callable[[np.ndarray, np.ndarray], Scorer]] = {
    "accuracy": scorers.accuracy,
    "f1": scorers.f1_of_ones,
    "f1_micro": scorers.f1_of_ones,
    "matthews_correlation": scorers.matthews,
    "pearson": scorers.pearson,
    "spearmanr": scorers.spearman,
}
"""Of the metrics that may be a task's primary one."""
