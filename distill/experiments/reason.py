"""Why a compression picked a model, or none, in words that need no knowledge of compression."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.evaluation.intervals import paired_retention, score_interval
from distill.experiments.asked import Asked
from distill.experiments.candidates import nearest_miss
from distill.experiments.choice import Choice, score
from distill.experiments.footprint import Footprint
from distill.tasks.base import Task

_LITTLE = 0.9
"""Share of the original's metric: where a pick may have less, its reader is told what would help."""


@dataclass(frozen=True)
class Compared:
    """A model with what it predicts for all rows, and what it takes."""

    name: str
    predictions: Sequence
    footprint: Footprint


def reason_of(
    task: Task,
    choice: Choice,
    picked: Compared,
    teacher: Compared,
    *,
    labels: Sequence,
    stating: Sequence[int],
    among: int,
    asked: Asked,
) -> str:
    """Write the paragraph on a pick.

    Args:
        task: whose metric is told.
        choice: of the rows that chose.
        picked: the pick.
        teacher: the model that it was made from.
        labels: of all rows.
        stating: numbers of the rows that chose nothing, which the metric is told of.
        among: how many models were compared.
        asked: the limits and the tolerance.
    """
    by = [labels[row] for row in stating]
    its, of_teacher = ([each.predictions[row] for row in stating] for each in (picked, teacher))
    low, high = score_interval(task, its, by)
    metric = task.primary_metric
    retention, (worst, most) = paired_retention(task, its, of_teacher, by)
    kept = "" if math.isnan(retention) else f", {retention:.1%} ({worst:.1%} to {most:.1%}) of the original's"
    if choice.pick == choice.best:
        why = (
            f"It has the best {metric} of the {among} models that were made and keep the limits, and of no cheaper one "
            "the rows could show that it is about as good."
            if among > 1
            else "It is the only model that was made and keeps the limits."
        )
    else:
        why = (
            f"Of the {among} models that were made and keep the limits {choice.best} has the best {metric}; the picked "
            f"one is the cheapest that lies, with 95 % certainty, no more than {choice.behind:.1%} below it, where "
            f"{asked.tolerance:.1%} were allowed."
        )
    little = (
        ""
        if not worst < _LITTLE
        else " That may be too little: more --budget trains more models for longer, looser limits leave larger ones."
    )
    return (
        f"{picked.name} was picked. It takes {_takes(picked.footprint)}, where the original takes "
        f"{_takes(teacher.footprint)}. On {len(stating)} validation rows that had no part in the choice its {metric} "
        f"is {score(task, its, by):.4f} (95 % interval {low:.3f} to {high:.3f}){kept}.{little} {why} "
        f"Limits: {_limits(asked.limits)}."
    )


def nothing_fits(footprints: Mapping[str, Footprint], limits: Mapping[str, float], margin: float) -> str:
    """Say which candidate came nearest to the limits, and which of these are to be loosened how far.

    Args:
        footprints: of all candidates, by name.
        limits: `max_mb`, `max_ms`.
        margin: share of `max_ms` that is left for the clock.
    """
    name = nearest_miss(footprints, limits, margin)
    found = footprints[name]
    needed = {"max_mb": found.mb, "max_ms": (found.ms or 0.0) / (1 - margin)}
    loosened = [
        f"--{limit} to {math.ceil(value * 100) / 100:g}"
        for limit, value in needed.items()
        if limit in limits and value > limits[limit]
    ]
    clock = f" ({margin:.0%} of max_ms are left for the clock)" if "max_ms" in limits else ""
    return (
        f"Nothing keeps the limits ({_limits(limits)}){clock}: of {len(footprints)} candidates {name} comes nearest, "
        f"with {_takes(found)}. Loosen {' and '.join(loosened)}."
    )


def nothing_retains(name: str, least: float, limits: Mapping[str, float]) -> str:
    """Say which model came nearest to the retention that was asked for.

    Args:
        name: of the model.
        least: the lower end of its retention.
        limits: with `min_retention`.
    """
    if not least > 0:
        return f"No model can be shown to retain anything of the original's metric; {name} comes nearest."
    return (
        f"No model keeps min_retention {limits['min_retention']:g}: {name} comes nearest, which retains with 95 % "
        f"certainty at least {least:.3f}. Loosen --min_retention to {math.floor(least * 1000) / 1000:g}, give more "
        "--budget, or more validation rows, which make the interval narrower."
    )


def _takes(footprint: Footprint) -> str:
    timed = "" if footprint.ms is None else f" and {footprint.ms:.1f} ms a call"
    return f"{footprint.mb:.2f} MB{timed}"


def _limits(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "none"
