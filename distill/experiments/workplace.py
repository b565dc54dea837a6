"""Where a compression works: the recipe of its candidates, what was decided and scored so far, and the time left."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distill.common.console import log
from distill.common.folders import write_atomically
from distill.common.records import read_step
from distill.common.serialized import as_json, from_json
from distill.data.load import Data
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_model
from distill.evaluation.fidelity import halves
from distill.evaluation.loading import load_scored
from distill.experiments.asked import Asked
from distill.experiments.candidates import TEACHER, Candidate, Shape, Steps, trained_name
from distill.experiments.choice import score
from distill.experiments.footprint import Footprint, measured
from distill.models.load import fetch_weights, find_model, load_processor
from distill.recipes.dry_run import runnable_plan
from distill.recipes.finished import is_finished
from distill.recipes.plan import Plan, make_plan
from distill.recipes.recipe import load_recipe
from distill.recipes.stored_models import has_head
from distill.recipes.yaml12 import dump_yaml
from distill.runs.run import run_plan
from distill.tasks.base import is_better_lower
from distill.verbs.all import VERBS

FOLDER = "candidates"
"""In the output folder: the models that were tried, and the state."""
_STATE = "compress.json"
_OF_ONE = ("budget", "output_dir")
"""What another call may ask otherwise."""


@dataclass
class Round:
    """Trainings of some shapes, of as many steps each."""

    steps: int
    shapes: list[dict[str, Any]]

    def parsed(self) -> list[Shape]:
        """The shapes."""
        return [Shape(**each) for each in self.shapes]


@dataclass
class State:
    """What was decided so far; it is written whenever something is."""

    asked: dict[str, Any] = field(default_factory=dict)
    spent: float = 0.0
    """Seconds."""
    teacher_steps: int | None = None
    """Of fine-tuning, where that is needed."""
    shapes: list[dict[str, Any]] | None = None
    ahead: dict[str, dict[str, Any]] | None = None
    """Footprints of candidates from untrained models."""
    rounds: list[Round] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    """Candidates in their formats."""
    done: bool = False
    """Whether all is made that will be."""
    after: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Footprints of models that are there."""


def begun(asked: Asked) -> "Workplace":
    """Begin, or go on with what an earlier call has left in the folder.

    Raises:
        InputError: that call asked for something else.
    """
    now = json.loads(as_json(asked))
    for name in _OF_ONE:
        now.pop(name)
    file = asked.output_dir / FOLDER / _STATE
    state = from_json(State, json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else State(asked=now)
    changed = [name for name in now if state.asked.get(name) != now[name]]
    if changed:
        raise InputError(
            f"output_dir: {asked.output_dir} holds what was compressed with {changed[0]} "
            f"{state.asked.get(changed[0])!r}, not {now[changed[0]]!r}; say another output_dir, or "
            f"remove its folder {FOLDER}"
        )
    return Workplace(asked, state, clock=time.monotonic() - state.spent)


@dataclass
class Workplace:
    """A compression's folder, state and clock."""

    asked: Asked
    state: State
    clock: float
    teacher: str = ""
    """The step, or the model from outside."""
    finetunes: bool = False
    candidates: dict[str, Candidate] = field(default_factory=dict)
    values: dict[Shape, float] = field(default_factory=dict)
    """The metric of each trained shape on the rows that choose."""
    steps_an_epoch: int = 1
    _data: Data | None = None

    @property
    def folder(self) -> Path:
        """Where the candidates are made."""
        return self.asked.output_dir / FOLDER

    @property
    def cache(self) -> Path:
        """Of footprints."""
        return self.folder / ".shapes"

    @property
    def limits(self) -> dict[str, float]:
        """`max_mb`, `max_ms`, `min_retention`, as far as they were given."""
        return dict(self.asked.limits)

    @property
    def data(self) -> Data:
        """The rows; known once something was planned."""
        if self._data is None:
            raise RuntimeError("nothing was planned yet")
        return self._data

    @property
    def metric(self) -> str:
        """The task's primary one."""
        return self.data.task.primary_metric

    # --- time and state ---

    def spent(self) -> float:
        """Seconds so far, of earlier calls too."""
        return time.monotonic() - self.clock

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.asked.budget - self.spent()

    def save(self) -> None:
        """Write the state, with which another call goes on."""
        self.state.spent = self.spent()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / _STATE, as_json(self.state))

    def say(self, text: str) -> None:
        """Show what was done, what is left of the time, and the best so far."""
        trained = {shape: value for shape, value in self.values.items() if not shape.is_whole}
        best = (min if is_better_lower(self.metric) else max)(trained, key=lambda shape: trained[shape], default=None)
        so_far = "" if best is None else f"; best so far {best.name} ({trained[best]:.4f})"
        left = max(self.left(), 0.0)
        log.print(f"      {text}; {left:.0f} of {self.asked.budget:.0f} s left{so_far}")

    def add_round(self, following: Round) -> None:
        """Keep which trainings are next."""
        self.state.rounds.append(following)
        self.save()
        names = ", ".join(shape.name for shape in following.parsed())
        self.say(f"next: {following.steps} steps of {names}")

    # --- recipes ---

    def content(self, steps: Steps, output_dir: Path) -> dict[str, Any]:
        """A recipe of some steps."""
        of_task = {"task": self.asked.task} if self.asked.task else {}
        blocks = {"data": dict(self.asked.data), "benchmark": dict(self.asked.benchmark)}
        given = {key: block for key, block in blocks.items() if block}
        return {**of_task, "output_dir": str(output_dir), **given, "steps": steps}

    def teacher_steps(self) -> Steps:
        """The step that fine-tunes the model, where that is needed."""
        if not self.finetunes:
            return {}
        length = {"max_steps": self.state.teacher_steps} if self.state.teacher_steps else {}
        return {TEACHER: {"run": "finetune", "model": self.asked.model, **length}}

    def plan(self, steps: Steps, *, rehearsed: bool = False) -> Plan:
        """Plan the teacher and some steps on top of it.

        Args:
            steps: by name.
            rehearsed: whether what keeps a training from running is looked for too.

        Raises:
            InputError: with every problem.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "candidates.yaml"
        write_atomically(file, dump_yaml(self.content({**self.teacher_steps(), **steps}, self.folder)))
        try:
            plan = (runnable_plan if rehearsed else make_plan)(load_recipe(file, draft=True))
        except InputError as error:  # of a file that the user has not written
            raise InputError(*(problem.removeprefix(f"{file}: ") for problem in error.problems)) from None
        self._data = plan.data
        benchmark = plan.recipe.benchmark  # latencies alone are measured here
        benchmark = replace(benchmark, throughput_batch_size=benchmark.latency_batch_size)
        return replace(plan, recipe=replace(plan.recipe, benchmark=benchmark))

    def find_teacher(self) -> None:
        """Find out whether the model has a head for the task; one without is fine-tuned first.

        Raises:
            InputError: a model or rows that can't be.
        """
        source = find_model(self.asked.model)
        self.teacher, self.finetunes = TEACHER, True
        plan = self.plan({})
        if has_head(source, plan.data.task):
            self.teacher, self.finetunes = self.asked.model, False
        else:
            log.print(f"      {self.asked.model} has no head for the task: it is fine-tuned first")
        options = plan.steps[TEACHER].step.options
        batch = getattr(options, "per_device_train_batch_size", 32)
        self.steps_an_epoch = max(1, len(plan.data.splits["train"]) // batch)

    def affordable_steps(self, plan: Plan, name: str, share: float) -> int:
        """The steps of a training: all that it would have, or as many as a share of the time allows."""
        planned = plan.steps[name]
        estimate = VERBS[planned.step.run].estimate(planned.step.options, planned.plan, plan.data)
        steps, seconds = estimate.optimizer_steps or 1, estimate.seconds or 0.0
        most = share * self.asked.budget
        return steps if seconds <= most else max(1, int(steps * most / seconds))

    def run(self, plan: Plan, *names: str) -> None:
        """Make the steps that are not finished."""
        todo = [name for name in names if not is_finished(plan.steps[name])]
        if todo:
            run_plan(plan, only=todo)

    # --- models ---

    def location(self, plan: Plan, name: str) -> Path:
        """The folder of a step's model, or of one from outside, with its weights."""
        if name in plan.steps:
            return plan.steps[name].folder
        fetch_weights(plan.sources[name])
        return Path(plan.sources[name].location)

    def predictions(self, plan: Plan, name: str) -> list:
        """A model's predictions for the first validation split, computed once."""
        inside = name in plan.steps
        made = plan.steps[name].fingerprint if inside else plan.sources[name].fingerprint
        file = self.folder / ".scores" / f"{name if inside else TEACHER}.json"
        key = [made, plan.data.fingerprint]
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if before.get("of") == key:
            return before["predictions"]
        location, task = str(self.location(plan, name)), plan.data.task
        model, processor = load_scored(location, task), load_processor(location, task.kind, plan.data.max_length)
        found = evaluate_model(model, processor, plan.data, name=name).predictions
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"of": key, "predictions": found}))
        return found

    def footprint(self, plan: Plan, name: str, *, timed: bool) -> Footprint:
        """What a model that is there takes, measured once."""
        if name not in self.state.after:
            self.state.after[name] = asdict(measured(self.location(plan, name), plan, timed=timed))
            self.save()
        return Footprint(**self.state.after[name])

    # --- shapes ---

    def lengths(self, shape: Shape, rounds: int | None = None) -> list[int]:
        """Steps of a shape's trainings, in so many rounds from the first."""
        return [each.steps for each in self.state.rounds[:rounds] if shape in each.parsed()]

    def seconds_of(self, shape: Shape) -> tuple[float, float] | None:
        """What a shape's last training took: seconds around it, and of each step; None where there was none."""
        lengths = self.lengths(shape)
        record = read_step(self.folder / trained_name(shape, len(lengths))) if lengths else None
        if record is None or record.train_seconds is None or record.wall_seconds is None:
            return None
        return max(record.wall_seconds - record.train_seconds, 0.0), record.train_seconds / lengths[-1]

    def score(self, shape: Shape, predictions: list) -> None:
        """Keep a shape's metric on the rows that choose."""
        labels = self.data.labels(self.data.task.validation_splits[0][0])
        rows, _ = halves(len(predictions))
        self.values[shape] = score(self.data.task, [predictions[row] for row in rows], [labels[row] for row in rows])

    def ranked(self, shapes: Iterable[Shape]) -> list[Shape]:
        """The shapes that were scored, the best first."""
        sign = 1 if is_better_lower(self.metric) else -1
        return sorted((each for each in shapes if each in self.values), key=lambda each: sign * self.values[each])
