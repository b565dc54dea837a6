"""The envelope of a run: its best models under any limits of size and latency, and those that no limit would choose."""

import math
from collections.abc import Sequence

from distill.common.records import ModelEntry, Report
from distill.evaluation.front import dominating
from distill.tasks.base import is_better_lower

_NAMED = 30  # models in one sentence


def never_picked(report: Report) -> dict[str, str | None]:
    """Find the models that no limit of bytes on disk and of latency would ever choose.

    Args:
        report: with scored and timed models.

    Returns:
        For each such model the best one that is at least as good, small and quick, and more than equal in one of these;
        None for a model whose metric is no number.
    """
    of_models = dominating([(loss(model, report.metric), *_limited(model)) for model in report.models])
    found: dict[str, str | None] = {}
    for model, others in zip(report.models, of_models, strict=True):
        if math.isnan(loss(model, report.metric)):
            found[model.name] = None
        elif others:
            best = min(others, key=lambda index: (loss(report.models[index], report.metric), index))
            found[model.name] = report.models[best].name
    return found


def envelope_lines(report: Report) -> list[str]:
    """Say which models no limit would choose: one sentence for each model that is chosen in place of others.

    Args:
        report: with scored and timed models.
    """
    of_others: dict[str | None, list[str]] = {}
    for name, other in never_picked(report).items():
        of_others.setdefault(other, []).append(name)
    lines = []
    for other, names in of_others.items():
        *first, last = [*names[:_NAMED], *([f"{len(names) - _NAMED} more"] if len(names) > _NAMED else [])]
        listed = f"{', '.join(first)} or {last}" if first else last
        reason = "the metric is no number" if other is None else f"{other} is as good, small and quick, or better"
        lines.append(f"No limit of size or latency would ever choose {listed}: {reason}.")
    return lines or ["Every model is the best one under some limits of size and latency."]


def on_front(values: Sequence[float], models: Sequence[ModelEntry], metric: str) -> list[int]:
    """Indices of the models that are the best ones up to their number, the least number first.

    Args:
        values: of each model, less is better; NaN where it has none.
        models: of a report.
        metric: the primary one.
    """
    of_models = dominating([(value, loss(model, metric)) for value, model in zip(values, models, strict=True)])
    known = [index for index, value in enumerate(values) if not math.isnan(value + loss(models[index], metric))]
    return sorted((index for index in known if not of_models[index]), key=lambda index: values[index])


def loss(model: ModelEntry, metric: str) -> float:
    """The primary metric, turned so that less is better; NaN where it is no number.

    Args:
        model: of a report.
        metric: the primary one.
    """
    value = model.metrics[metric]
    if value is None:
        return math.nan
    return value if is_better_lower(metric) else -value


def _limited(model: ModelEntry) -> tuple[float, float]:
    """Bytes and milliseconds; a size that is not known is within no limit."""
    return math.inf if model.size_on_disk_bytes is None else model.size_on_disk_bytes, model.latency_ms.p50
