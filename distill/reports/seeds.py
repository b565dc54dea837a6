"""What report.json says of steps that are there once per seed: mean and spread, and comparisons over rows and seeds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill.common.markdown import table
from distill.common.records import Report
from distill.evaluation.evaluate import Evaluation
from distill.evaluation.intervals import difference_over_seeds
from distill.recipes.plan import Plan


def further_copies(plan: Plan) -> set[str]:
    """The steps of all seeds but the first, which stand for no model of their own."""
    return {copy for of_seeds in plan.recipe.copies.values() for copy in of_seeds[1:]}


def spread_over_seeds(plan: Plan, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]] | None:
    """Mean and spread of every metric over the seeds of each step; None for a recipe without seeds.

    `std` is the sample's standard deviation (over n − 1). `interval` is of the primary metric's mean at 95 %, over rows
    and seeds.

    Args:
        plan: of the run.
        evaluations: of its finished models.
    """
    found: dict[str, dict[str, Any]] = {}
    task = plan.data.task
    for first, copies in plan.recipe.copies.items():
        finished = [name for name in copies if name in evaluations]
        if len(finished) < 2:
            continue
        metrics = [evaluations[name].metrics for name in finished]
        values = {key: np.array([each[key] for each in metrics]) for key in metrics[0]}
        predictions = [evaluations[name].predictions for name in finished]
        _, interval = difference_over_seeds(task, predictions, None, _labels(plan))
        found[first] = {
            "models": finished,
            "mean": {key: float(each.mean()) for key, each in values.items()},
            "std": {key: float(each.std(ddof=1)) for key, each in values.items()},
            "min": {key: float(each.min()) for key, each in values.items()},
            "max": {key: float(each.max()) for key, each in values.items()},
            "interval": {task.primary_metric: list(interval)},
        }
    return found or None


def paired_over_seeds(
    plan: Plan, evaluations: Mapping[str, Evaluation], model: str, other: str
) -> tuple[float, tuple[float, float]] | None:
    """How much more a step's models score than another's over the same rows and seeds; None without several seeds.

    Args:
        plan: of the run.
        evaluations: of its finished models.
        model: the step, by its first seed's name.
        other: likewise.
    """
    copies = plan.recipe.copies
    if model not in copies or other not in copies:
        return None
    pairs = [pair for pair in zip(copies[model], copies[other], strict=True) if set(pair) <= evaluations.keys()]
    if len(pairs) < 2:
        return None
    ones, others = ([evaluations[name].predictions for name in names] for names in zip(*pairs, strict=True))
    return difference_over_seeds(plan.data.task, ones, others, _labels(plan))


def seeds_section(report: Report) -> list[str]:
    """A table of report.md with the mean and the spread of the primary metric; nothing for a run without seeds."""
    if not report.seeds:
        return []
    metric = report.metric
    rows = [
        [
            "model",
            "seeds",
            f"mean {metric.replace('_', ' ')}",
            "95 % interval",
            "standard deviation",
            "lowest",
            "highest",
        ]
    ]
    for name, of_step in report.seeds.items():
        numbers = [_shown(of_step[key].get(metric)) for key in ("mean", "std", "min", "max")]
        interval = "–".join(map(_shown, of_step["interval"][metric]))
        rows.append([name, str(len(of_step["models"])), numbers[0], interval, *numbers[1:]])
    said = "Over the seeds, each of which trained every model anew (95 % interval of the mean, over rows and seeds; "
    return [f"{said}comparisons below are of these means, paired by row and seed):", table(rows)]


def seed_lines(report: Report) -> list[str]:
    """A sentence for each step that is there once per seed."""
    return [
        f"{name}: {report.metric.replace('_', ' ')} {_shown(of_step['mean'].get(report.metric))} ± "
        f"{_shown(of_step['std'].get(report.metric))} over {len(of_step['models'])} seeds "
        f"({_shown(of_step['min'].get(report.metric))} to {_shown(of_step['max'].get(report.metric))})"
        for name, of_step in (report.seeds or {}).items()
    ]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _labels(plan: Plan) -> list:
    return plan.data.labels(plan.data.task.validation_splits[0][0])
