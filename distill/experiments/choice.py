"""Which of some models is picked: the cheapest that the rows show to be about as good as the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.evaluation.intervals import paired_difference, paired_retention
from distill.experiments.candidates import cost
from distill.experiments.footprint import Footprint
from distill.tasks import scorers
from distill.tasks.base import Task, is_better_lower
from distill.tasks.kinds import KINDS


@dataclass(frozen=True)
class Scored:
    """A model that was scored."""

    name: str
    predictions: Sequence
    """As in `Evaluation`, one for each row that chooses."""
    footprint: Footprint


@dataclass(frozen=True)
class Choice:
    """What was picked."""

    pick: str
    best: str
    """The model with the best metric on the rows that chose."""
    runner_up: str | None
    """The best one but for the pick."""
    behind: float
    """How much the pick scores below the best one at most (the interval's end), as a share of the best one's metric."""


def choose(task: Task, scored: Sequence[Scored], labels: Sequence, *, tolerance: float) -> Choice:
    """Pick the cheapest model whose difference to the best has its lower end above −tolerance.

    The best is among them, so it is picked where the rows can't show that of a cheaper one.

    Args:
        task: whose primary metric is compared.
        scored: models that satisfy all limits, at least one.
        labels: of the rows that choose.
        tolerance: share of the best one's metric.
    """
    sign = -1 if is_better_lower(task.primary_metric) else 1
    values = {each.name: score(task, each.predictions, labels) for each in scored}
    ranked = sorted(scored, key=lambda each: (-sign * values[each.name], cost(each.footprint)))
    best = ranked[0]
    scale = abs(values[best.name])
    for each in sorted(scored, key=lambda each: cost(each.footprint)):
        behind = _behind(task, each, best, labels)
        if each is best or behind < tolerance * scale:
            runner_up = next((other.name for other in ranked if other is not each), None)
            return Choice(each.name, best.name, runner_up, behind / scale if scale else 0.0)
    raise ValueError("no model to choose from")


def _behind(task: Task, model: Scored, best: Scored, labels: Sequence) -> float:
    """How much worse than the best a model is at most: the end of the paired interval, below 0 where it is better."""
    if model is best:
        return 0.0
    _, (low, high) = paired_difference(task, model.predictions, best.predictions, labels)
    return high if is_better_lower(task.primary_metric) else -low


def least_retention(task: Task, scored: Scored, teacher: Sequence, labels: Sequence) -> float:
    """The lower end of a model's retention of its teacher's metric.

    Args:
        task: whose primary metric is compared.
        scored: the model.
        teacher: the teacher's predictions, as the model's.
        labels: of the same rows.
    """
    return paired_retention(task, scored.predictions, teacher, labels)[1][0]


def score(task: Task, predictions: Sequence, labels: Sequence) -> float:
    """Compute the primary metric of some rows."""
    return scorers.whole(KINDS[task.kind].scorer(task, predictions, labels), len(predictions))
