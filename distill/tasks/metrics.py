"""The metrics of a task's predictions, whatever its kind."""

import numpy as np

from distill.tasks.base import Task
from distill.tasks.kinds import KINDS


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the metrics of one split of a task with one prediction a row.

    Args:
        task: whose metrics are computed.
        logits: B×C; regression B×1 or B.
        labels: B class ids, B scores, or B×C zeros and ones of label sets.
    """
    its = KINDS[task.kind]
    return its.scores(task, its.predict(logits), labels, logits)


def computed(task: Task) -> list[str]:
    """List the keys of the metrics that are computed for a task's rows."""
    named = [name for name in task.metrics if name != "roc_auc" or task.num_labels == 2]
    return [*named, *KINDS[task.kind].further_metrics]
