"""Metrics as `evaluate.Metric` classes that need no network (`evaluate.load` fetches a script from the Hub)."""

from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
from scipy.special import logsumexp
from sklearn import metrics as sk

from distill.tasks import entities, scorers
from distill.tasks.base import OF_LANGUAGE, Task
from distill.tasks.questions import answer_scores
from distill.tasks.scorers import Scorer
from distill.tasks.targets import IGNORED, ProblemType


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics of one split.

    Args:
        logits: B×C; regression B×1 or B; tokens B×T×C.
        labels: B class ids, B scores, B×C zeros and ones of label sets, or for tokens B×T, −100 where there is none.
    """
    predictions = predict(task, logits)
    if task.kind == "token-classification":
        return tag_scores(task, *(words_of(each, labels) for each in (predictions, labels)))
    results: dict[str, float] = {}
    for name in task.metrics:
        if name == "average":  # GLUE's own: the mean of the task's other metrics
            results[name] = float(np.mean(list(results.values())))
        elif name == "roc_auc":
            if task.num_labels == 2 and len(np.unique(labels)) == 2:  # undefined otherwise
                results |= RocAuc().compute(predictions=logits[:, 1] - logits[:, 0], references=labels)
        else:
            results |= METRICS[name](predictions.ndim).compute(predictions=predictions, references=labels)
    return {key: float(value) for key, value in results.items()}


def computed(task: Task) -> list[str]:
    """The keys of the metrics that are computed for a task's rows."""
    more = {"token-classification": ["entity_precision", "entity_recall"]}.get(task.kind, [])
    return [name for name in task.metrics if name != "roc_auc" or task.num_labels == 2] + more


def scorer(task: Task, predictions: Sequence, labels: Sequence) -> Scorer:
    """The task's primary metric of rows of which each counts so often.

    Args:
        predictions: as in `Evaluation`, one a row; labels alike (none for language models).
    """
    if task.kind == "token-classification":
        return scorers.f1(entities.entity_counts(predictions, labels, task.label_names or ()))
    if task.kind == "question-answering":
        return scorers.mean(answer_scores(predictions, [label["text"] for label in labels])[:, 0])
    if task.kind in OF_LANGUAGE:
        return _perplexity(token_losses(predictions))
    found, truth = np.asarray(predictions), np.asarray(labels)
    names = [name for name in task.metrics if name in _SCORERS] if task.primary_metric == "average" else []
    return scorers.mean_of([_SCORERS[name](truth, found) for name in names or [task.primary_metric]])


def tag_scores(task: Task, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, and the share of words whose tag is right.

    Args:
        predictions: label ids of each row's words; −100 for words that the model did not read, which are not right.
        labels: of every word.
    """
    results = entities.scores(entities.entity_counts(predictions, labels, task.label_names or ()))
    pairs = [pair for rows in zip(predictions, labels, strict=True) for pair in zip(*rows, strict=True)]
    right = [found == truth for found, truth in pairs if truth != IGNORED]
    return results | {"accuracy": float(np.mean(right)) if right else 0.0}


def span_scores(answers: Sequence[str], labels: Sequence[dict]) -> dict[str, float]:
    """F1 and exact match of answers, from 0 to 1."""
    of_rows = answer_scores(answers, [label["text"] for label in labels])
    f1, exact = (scorers.whole(scorers.mean(values), len(values)) for values in of_rows.T)
    return {"f1": f1, "exact_match": exact}


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
    _, right, tokens = losses.T
    of_all = {"perplexity": _perplexity(losses), "accuracy": scorers.ratio(right, tokens)}
    return {name: scorers.whole(each, len(losses)) for name, each in of_all.items()}


def token_losses(predictions: Sequence[dict]) -> np.ndarray:
    """N×3 of a language model's predictions: nats, tokens that were right, tokens."""
    return np.array([[each["loss"], each["right"], len(each["tokens"])] for each in predictions], dtype=np.float64)


def _perplexity(losses: np.ndarray) -> Scorer:
    loss_of_token = scorers.ratio(losses[:, 0], losses[:, 2])
    return lambda weights: np.exp(loss_of_token(weights))


def words_of(values: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Of tokens (B×T) those that stand for words, row by row: the ones with a label."""
    return [row[known].tolist() for row, known in zip(values, labels != IGNORED, strict=True)]


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
