"""The `search:` block of a recipe: what is tried, how long, and what no trial may exceed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, TypeGuard

from pydantic import Field

from distill.errors import InputError, nearest_name

PRESENCE = ("present", "absent")
"""What a space says of a step that may be left out."""

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


Limits: TypeAlias = dict[Literal["max_mb", "max_ms"], PositiveFloat]
"""What the searched step's model may take at most: 10⁶ bytes of weight files, and median milliseconds of one call under
the recipe's `benchmark:`, in the engine that serves it."""


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be right if all are."""
        return self.values

    @property
    def texts(self) -> tuple[str, ...]:
        """The values as JSON, for Optuna, which takes no lists and mappings."""
        return tuple(json.dumps(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """A number between two; a whole one where both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers alone are tried."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be right if all are."""
        return (self.low, self.high)


Space: TypeAlias = dict[str, Choice | Range]
"""What is tried of each path of the recipe, or of each step that may be left out."""


@dataclass(kw_only=True)
class SearchOptions:
    """The `search:` block of a recipe."""

    space: dict[str, Any] = field(
        metadata={
            "help": "For each path of the recipe a list of choices, or {low, high, log, step}; for a step's name "
            "[present, absent]."
        }
    )
    step: str | None = field(
        default=None, metadata={"help": "Whose metric is optimised; by default the last step that trains."}
    )
    trials: PositiveInt = field(default=20, metadata={"help": "Trials in all, of all processes together."})
    timeout: PositiveInt | None = field(
        default=None, metadata={"help": "Seconds after which no trial begins; by default no limit."}
    )
    limits: Limits = field(
        default_factory=dict,
        metadata={"help": "max_mb (10⁶ bytes of weights) and max_ms (median of a call): beyond them a trial ends."},
    )
    sampler: Literal["tpe", "random", "gp", "qmc"] = field(
        default="tpe", metadata={"help": "How the next trial is chosen (Optuna's samplers)."}
    )
    pruner: Literal["median", "hyperband", "none"] = field(
        default="median", metadata={"help": "Which trainings are ended early for what they score on the way."}
    )
    seed: int = field(default=0, metadata={"help": "Of the sampler."})

    def __post_init__(self) -> None:
        """Check the space.

        Raises:
            InputError: with each entry of it that is neither choices nor a range.
        """
        problems: list[str] = []
        if not self.space:
            problems.append("space: names no path; say what to try, like {student.num_layers: [2, 3, 4]}")
        for path, given in self.space.items():
            problems += [f"space.{path}: {problem}" for problem in _problems_of(given)]
        if problems:
            raise InputError(*problems)

    def parsed(self) -> Space:
        """The entries of the space."""
        return {path: _entry(given) for path, given in self.space.items()}


def _problems_of(given: Any) -> list[str]:
    if isinstance(given, list):
        return [] if len(given) > 1 else ["a list needs two choices or more; a value that is fixed goes into its step"]
    keys = ("low", "high", "log", "step")
    if not isinstance(given, Mapping):
        return [f"should be a list of choices or {{low, high, log, step}}, got {given!r}"]
    problems = [f"{key}: no such key; {nearest_name(str(key), keys)}" for key in given if key not in keys]
    low, high = given.get("low"), given.get("high")
    if not (_is_number(low) and _is_number(high)):
        return [*problems, f"needs two numbers, low and high; got {given!r}"]
    log, step = given.get("log", False), given.get("step")
    if not low < high:
        problems.append(f"low must be below high; got {low} and {high}")
    if not isinstance(log, bool):
        problems.append(f"log: should be true or false, got {log!r}")
    elif log and low <= 0:
        problems.append(f"log: low must be above 0, got {low}")
    if step is not None and not (_is_number(step) and step > 0):
        problems.append(f"step: should be a number above 0, got {step!r}")
    elif step is not None and log:
        problems.append("step: goes not together with log: true; leave one of them out")
    return problems


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _entry(given: Any) -> Choice | Range:
    if isinstance(given, list):
        return Choice(tuple(given))
    return Range(**given)
