"""Metrics as `evaluate.Metric` classes that need no network (`evaluate.load` fetches a script from the Hub)."""

from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
from scipy import stats
from scipy.special import logsumexp
from sklearn import metrics as sk

from distill import entities
from distill.predictions import IGNORED, ProblemType
from distill.tasks import Task


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics of one split.

    Args:
        logits: B×C; regression B×1 or B; tokens B×T×C.
        labels: B class ids, B scores, B×C zeros and ones of label sets, or for tokens B×T, −100 where there is none.
    """
    predictions = predict(task, logits)
    if task.kind == "token-classification":
        found, truth = words_of(predictions, labels), words_of(labels, labels)
        results = entities.scores(entities.entity_counts(found, truth, task.label_names or ()))
        known = labels != IGNORED
        results["accuracy"] = float((predictions == labels)[known].mean()) if known.any() else 0.0
        return results
    results = {}
    for name in task.metrics:
        if name == "average":  # GLUE's own: the mean of the task's other metrics
            results[name] = float(np.mean(list(results.values())))
        elif name == "roc_auc":
            if task.num_labels == 2 and len(np.unique(labels)) == 2:  # undefined otherwise
                results |= RocAuc().compute(predictions=logits[:, 1] - logits[:, 0], references=labels)
        else:
            results |= METRICS[name](predictions.ndim).compute(predictions=predictions, references=labels)
    return {key: float(value) for key, value in results.items()}


def divergences(problem: ProblemType, reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) of each row's predicted distribution, in nats; for scores the squared difference: B.

    Args:
        reference: logits B×C; logits alike. Of sets of labels the mean over C distributions of two outcomes.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (reference, logits))
    if problem == "regression":
        return np.square(first - second).reshape(len(first), -1).mean(-1)
    if problem == "multi_label_classification":
        first, second = (np.stack([each, np.zeros_like(each)], axis=-1) for each in (first, second))
    first, second = (each - logsumexp(each, axis=-1, keepdims=True) for each in (first, second))
    terms = (np.exp(first) * (first - second)).sum(-1)
    return np.maximum(terms.reshape(len(terms), -1).mean(-1), 0)


def language_scores(losses: np.ndarray) -> dict[str, float]:
    """Perplexity, and the share of tokens predicted right.

    Args:
        losses: N×3, for each row the summed negative log-likelihood (nats), the tokens predicted right, and all.
    """
    loss, right, tokens = losses.sum(0)
    return {"perplexity": float(np.exp(loss / max(tokens, 1))), "accuracy": float(right / max(tokens, 1))}


def words_of(values: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Of tokens (B×T) those that stand for words, row by row: the ones with a label."""
    return [row[known].tolist() for row, known in zip(values, labels != IGNORED, strict=True)]


def primary_score(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The task's primary metric of class ids or scores (B), without `evaluate`'s checks: quick enough to resample."""
    names = [name for name in task.metrics if name in METRICS] if task.primary_metric == "average" else []
    scores = [METRICS[name].score(labels, predictions) for name in names or [task.primary_metric]]
    return float(np.mean(scores))


def predict(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class ids (B, or B×T) of logits, the scores (B) of a regression, or zeros and ones B×C for sets of labels."""
    if task.kind == "regression":
        return logits.reshape(-1)
    return (logits > 0).astype(int) if task.kind == "multi-label" else logits.argmax(-1)


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


class Accuracy(_OfflineMetric):
    """Share of rows predicted right."""

    key = "accuracy"
    score = staticmethod(sk.accuracy_score)


class F1(_OfflineMetric):
    """F1 of class 1, as GLUE scores mrpc and qqp."""

    key = "f1"
    score = staticmethod(lambda references, predictions: sk.f1_score(references, predictions, zero_division=0))


class MicroF1(_OfflineMetric):
    """F1 of all decisions of all labels together."""

    key = "f1_micro"
    score = staticmethod(
        lambda references, predictions: sk.f1_score(references, predictions, average="micro", zero_division=0)
    )


class MacroF1(_OfflineMetric):
    """Unweighted mean of the F1 of every class."""

    key = "f1_macro"
    score = staticmethod(
        lambda references, predictions: sk.f1_score(references, predictions, average="macro", zero_division=0)
    )


class MatthewsCorrelation(_OfflineMetric):
    """Matthews correlation coefficient, as GLUE scores cola; 0 where the predictions are all one class."""

    key = "matthews_correlation"
    score = staticmethod(sk.matthews_corrcoef)


class RocAuc(_OfflineMetric):
    """Area under the ROC curve of a two-class task; the predictions are the margin of class 1 over class 0."""

    key = "roc_auc"
    dtype = "float64"
    score = staticmethod(sk.roc_auc_score)


class Pearson(_OfflineMetric):
    """Pearson correlation; 0 where either side is constant (it is undefined there)."""

    key = "pearson"
    dtype = "float64"
    score = staticmethod(lambda references, predictions: _correlation(stats.pearsonr, references, predictions))


class Spearman(_OfflineMetric):
    """Spearman rank correlation; 0 where either side is constant (it is undefined there)."""

    key = "spearmanr"
    dtype = "float64"
    score = staticmethod(lambda references, predictions: _correlation(stats.spearmanr, references, predictions))


METRICS: dict[str, type[_OfflineMetric]] = {
    metric.key: metric for metric in (Accuracy, F1, MicroF1, MacroF1, MatthewsCorrelation, RocAuc, Pearson, Spearman)
}


def _correlation(correlate: Callable, references: np.ndarray, predictions: np.ndarray) -> float:
    if np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(correlate(references, predictions).statistic)
