"""What `distill compress` is asked for: a model, rows, limits, an engine and a time."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import InputError, nearest_name
from distill.export.problems import missing_packages
from distill.export.record import ENGINES

ALL_ENGINES = ("auto", "torch", *ENGINES)
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a compression is asked for."""

    model: str
    """A folder, `package:…` or a Hub id."""
    output_dir: Path
    task: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """The `data:` block of its recipes."""
    benchmark: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    """`max_mb`, `max_ms`, `min_retention`, or none."""
    engine: str = "auto"
    budget: float = 1800.0
    """Seconds."""
    tolerance: float = 0.01
    """Share of the best model's metric that a cheaper one may lack."""

    def __post_init__(self) -> None:
        """Check what can be told without the model and the rows.

        Raises:
            InputError: limits, tolerance or budget that can't be, an engine that is unknown or not installed.
        """
        problems = [
            f"--{name}: should be a number above 0, got {value!r}"
            for name, value in (*self.limits.items(), ("budget", self.budget))
            if not _is_number(value) or not value > 0
        ]
        if not _is_number(self.tolerance) or not 0 <= self.tolerance < 1:
            problems.append(f"--tolerance: should be a share from 0 to below 1, got {self.tolerance!r}")
        if self.engine not in ALL_ENGINES:
            problems.append(f"--engine: no engine {self.engine!r}; {nearest_name(self.engine, ALL_ENGINES)}")
        else:
            problems += [f"--engine: {problem}" for problem in missing_packages(self.engine)]
        if problems:
            raise InputError(*problems)

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines whose formats are tried: the one that was named, or all that are installed."""
        if self.engine != "auto":
            return (self.engine,)
        return ("torch", *(engine for engine in ENGINES if not missing_packages(engine)))


def read_budget(text: str) -> float:
    """Read a time such as `30min`, `90s` or `2h`, in seconds.

    Raises:
        InputError: another text, or no time at all.
    """
    found = _BUDGET.fullmatch(text.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not seconds > 0:
        raise InputError(f"--budget: should be a time like 30min, 90s or 2h, got {text!r}")
    return seconds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
