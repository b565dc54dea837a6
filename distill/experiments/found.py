"""What a search has found: its trials, the best of them, and what mattered."""

import math
from dataclasses import dataclass
from typing import Any

from distill.common.markdown import escaped, table
from distill.evaluation.front import dominating
from distill.experiments.trials import Outcome
from distill.tasks.base import is_better_lower


@dataclass(frozen=True)
class Tried:
    """One trial that has ended."""

    number: int
    params: dict[str, Any]
    """The values that were tried, by path."""
    outcome: Outcome


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    metric: str
    step: str
    """The step whose model was scored."""
    tried: list[Tried]
    best: Tried | None
    importance: dict[str, float]
    """Of each path, summing to 1; empty where too few trials have finished."""


def on_front(found: Found) -> list[int]:
    """Find the trials that some limit of bytes and latency would choose.

    Returns:
        Their numbers, the smallest model first.
    """
    finished = [each for each in found.tried if each.outcome.state == "finished" and each.outcome.value is not None]
    sign = 1 if is_better_lower(found.metric) else -1
    points = [(sign * _or_nan(each.outcome.value), _or_nan(each.outcome.mb), each.outcome.ms or 0) for each in finished]
    best = [each for each, others in zip(finished, dominating(points), strict=True) if not others]
    return [each.number for each in sorted(best, key=lambda each: each.outcome.mb or 0)]


def rows_of(found: Found) -> list[list[str]]:
    """The table of all trials, its header first; `*` marks the front, `**` the best."""
    front, paths = on_front(found), list(dict.fromkeys(path for each in found.tried for path in each.params))
    rows = [["trial", *paths, found.metric, "95 % interval", "MB", "ms", "ended"]]
    for each in sorted(found.tried, key=lambda each: each.number):
        mark = "**" if found.best and each.number == found.best.number else "*" * (each.number in front)
        outcome = each.outcome
        interval = "" if outcome.interval is None else "–".join(f"{end:.3f}" for end in outcome.interval)
        ended = outcome.state if outcome.reason is None else f"{outcome.state}: {outcome.reason}"
        values = [_shown(each.params.get(path)) for path in paths]
        numbers = [_number(outcome.value, ".4f"), interval, _number(outcome.mb, ".1f"), _number(outcome.ms, ".1f")]
        rows.append([f"{each.number}{mark}", *values, *numbers, ended])
    return rows


def sentences(found: Found) -> list[str]:
    """What a reader should know beside the table."""
    states = [each.outcome.state for each in found.tried]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    said = [f"{len(states)} trials: {counts}."]
    if found.best is None:
        return [*said, "No trial has finished within the limits; loosen them, or widen the space."]
    values = ", ".join(f"{path} {_shown(value)}" for path, value in found.best.params.items())
    said.append(f"Best: trial {found.best.number} ({values}), {found.metric} {found.best.outcome.value:.4f}.")
    finished = states.count("finished")
    if finished > 1:
        said.append(
            f"It was chosen among {finished} on the rows that its metric is of, so expect a little less on others."
        )
    if found.importance:
        said.append("Importance: " + ", ".join(f"{path} {share:.2f}" for path, share in found.importance.items()) + ".")
    return said


def as_markdown(found: Found) -> str:
    """The table and the sentences."""
    about = "`*`: some limit of bytes and latency would choose it; `**`: the best."
    return "\n\n".join([table(rows_of(found)), about, *map(escaped, sentences(found))]) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
