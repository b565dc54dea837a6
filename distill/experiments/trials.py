"""One trial of a search: a recipe with some of its values replaced, run as far as it is worth it."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import TrainerCallback

from distill.common.folders import written_whole
from distill.data.load import Data
from distill.errors import TrainingDiverged
from distill.evaluation.evaluate import evaluate_model
from distill.evaluation.loading import load_scored
from distill.experiments.footprint import footprint_of, measured, problem_of
from distill.models.load import load_processor
from distill.models.modes import modes_kept
from distill.recipes.finished import is_finished
from distill.recipes.plan import Plan, PlannedStep
from distill.runs.run import run_plan
from distill.training.callbacks import watched_by
from distill.verbs.all import VERBS

RUNGS = 4
"""Into so many parts a training is divided; between them its model is scored on some rows, and may be given up."""
_ROWS_ON_THE_WAY = 512

Report = Callable[[int, float], bool]
"""(rung from 1, metric) → whether to give the training up."""


class GivenUp(Exception):
    """A training that was ended early for what it scored on the way."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    state: str
    """`finished`; `refused`, where it exceeds a limit or can't be; `given up`, where a training was ended early."""
    value: float | None = None
    """The primary metric on the validation rows."""
    metrics: dict[str, float] | None = None
    interval: list[float] | None = None
    mb: float | None = None
    ms: float | None = None
    reason: str | None = None


def run_trial(plan: Plan, name: str, store: Path, limits: Mapping[str, float], report: Report) -> Outcome:
    """Run the steps that a step's model needs, unless it exceeds a limit, and score the model.

    Args:
        plan: of the trial's recipe.
        name: the step whose model is scored.
        store: a folder of finished steps, which trials share.
        limits: `max_mb`, `max_ms`.
        report: is told what the last training scores on the way.
    """
    timed = "max_ms" in limits
    ahead = footprint_of(plan, name, store.parent / "shapes", timed=timed) if limits else None
    exceeds = None if ahead is None else problem_of(ahead, limits)
    if ahead is not None and exceeds:
        return Outcome("refused", mb=ahead.mb, ms=ahead.ms, reason=exceeds)
    needed = _needed(plan, name)
    watched = next((each for each in reversed(needed) if VERBS[each.step.run].trains), None)
    try:
        for planned in needed:
            watch = _Watch(plan.data, planned.plan.tokenizer_location, report) if planned is watched else None
            _make(plan, planned, store, watch)
    except GivenUp:
        return Outcome("given up", mb=ahead.mb if ahead else None, ms=ahead.ms if ahead else None)
    except TrainingDiverged as error:
        return Outcome("refused", reason=str(error))
    folder = plan.steps[name].folder
    found = measured(folder, plan, timed=timed)
    processor = load_processor(str(folder), plan.data.task.kind)
    scored = evaluate_model(load_scored(str(folder), plan.data.task), processor, plan.data, name=name)
    # What the clock said before the training holds: a second look may differ by noise alone.
    exceeds = problem_of(replace(found, ms=ahead.ms if ahead else found.ms), limits)
    return Outcome(
        "refused" if exceeds else "finished",
        value=scored.metrics[plan.data.task.primary_metric],
        metrics=scored.metrics,
        interval=list(scored.interval),
        mb=found.mb,
        ms=found.ms,
        reason=exceeds,
    )


def _needed(plan: Plan, name: str) -> list[PlannedStep]:
    """A step and all that it is made from, in the recipe's order."""
    found, queue = set(), [plan.steps[name]]
    while queue:
        planned = queue.pop()
        found.add(planned.step.name)
        queue += planned.made_from
    return [planned for each, planned in plan.steps.items() if each in found]


def _make(plan: Plan, planned: PlannedStep, store: Path, watch: "TrainerCallback | None") -> None:
    """Have a step finished in the trial's folder: by another trial, or now."""
    place = store / planned.fingerprint[:32]
    with FileLock(f"{place}.lock"):  # who needs the same step waits for it
        if not is_finished(planned) and place.is_dir():
            linked(place, planned.folder)
        if not is_finished(planned):
            with watched_by(*([] if watch is None else [watch])):
                run_plan(plan, only=[planned.step.name])
        if not place.is_dir():
            linked(planned.folder, place)


def linked(source: Path, target: Path) -> None:
    """Put a finished step's folder at another place too, its files as hard links where the disk can.

    Args:
        source: a folder that is whole.
        target: where it appears whole, in place of what is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as folder:
        shutil.copytree(source, folder, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class _Watch(TrainerCallback):
    """Scores a training's model on some validation rows between its parts."""

    def __init__(self, data: Data, tokenizer_location: str, report: Report):
        split = data.task.validation_splits[0][0]
        rows = data.splits[split]
        some = rows.select(range(min(len(rows), _ROWS_ON_THE_WAY)))
        self._data = replace(data, splits={"train": data.splits["train"], split: some})
        self._processor = load_processor(tokenizer_location, data.task.kind, data.max_length)
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Score the model where a part ends, but for the last one."""
        rung = state.global_step * RUNGS / state.max_steps
        if not state.global_step or math.floor(rung) == math.floor((state.global_step - 1) * RUNGS / state.max_steps):
            return
        if rung >= RUNGS:
            return
        model = getattr(given["model"], "student", given["model"])
        with modes_kept([model]):
            found = evaluate_model(model, self._processor, self._data, name=f"step {state.global_step}")
        if self._report(math.floor(rung), found.metrics[self._data.task.primary_metric]):
            raise GivenUp


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Show other processes that a trial is being run, for as long as this process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / ".trial.lock"), blocking=False):
        yield


def is_held(folder: Path) -> bool:
    """Whether a process that lives runs the trial in a folder."""
    lock = FileLock(str(folder / ".trial.lock"), blocking=False)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except TimeoutError:  # filelock's Timeout is one
        return True
    lock.release()
    return False


def overrides_of(params: Mapping[str, Any], steps: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The overrides and the left-out steps that a trial's values stand for.

    Args:
        params: value by path of the recipe, or `present`/`absent` by step.
        steps: of the recipe, by name.
    """
    without = [path for path, value in params.items() if path in steps and value == "absent"]
    gone = tuple(f"{name}." for name in without)
    kept = {path: value for path, value in params.items() if path not in steps and not path.startswith(gone or ("\0",))}
    return {path: json.dumps(value) for path, value in kept.items()}, without
