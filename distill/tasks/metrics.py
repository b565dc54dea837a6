"""What is computed of a task's predictions, whatever its kind."""

import numpy as np
from scipy.special import logsumexp

from distill.tasks.base import Task
from distill.tasks.kinds import KINDS
from distill.tasks.targets import ProblemType


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of one split of a task with one prediction a row.

    Args:
        logits: B×C; regression B×1 or B.
        labels: B class ids, B scores, or B×C zeros and ones of label sets.
    """
    its = KINDS[task.kind]
    return its.scores(task, its.predict(logits), labels, logits)


def computed(task: Task) -> list[str]:
    """The keys of the metrics that are computed for a task's rows."""
    named = [name for name in task.metrics if name != "roc_auc" or task.num_labels == 2]
    return [*named, *KINDS[task.kind].further_metrics]


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
