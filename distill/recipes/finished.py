"""Whether a run folder holds the model that a plan would make, and what a user should know of it if it does.

A finished model is made anew where its options, inputs or rows have changed, and never for a change of code: that is
said instead, and `--rerun` makes it anew.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from distill.common.records import StepRecord, read_step
from distill.data.load import DataOptions
from distill.models.load import size_on_disk
from distill.models.structure import width_of
from distill.recipes.plan import FINGERPRINT_VERSION, NOT_IN_FINGERPRINT, PlannedStep
from distill.training.config import default_learning_rate
from distill.verbs.all import VERBS

_OF_THE_MACHINE = {"bf16", "fp16", "use_cpu", "dataloader_pin_memory"}
"""Options that are resolved by the hardware where the user does not say them."""
RERUNS = ".rerun"
"""In the output folder: the steps that are still to be made anew, as a run was asked to."""


def pending_reruns(output_dir: Path) -> set[str]:
    """Read which steps a run was asked to make anew (`--rerun`) and has not yet."""
    file = output_dir / RERUNS
    return set(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else set()


def is_finished(planned: PlannedStep) -> bool:
    """Tell whether the step's folder holds the model that the plan would make."""
    return _fits(planned, read_step(planned.folder)) and size_on_disk(planned.folder) > 0


def remarks_on(planned: PlannedStep) -> list[str]:
    """List what a user should know of a finished step that is kept."""
    record = read_step(planned.folder) or StepRecord()
    rerun = f"`distill run … --rerun {planned.step.name}` makes it anew"
    if record.fingerprint_version != FINGERPRINT_VERSION:
        return [f"kept: made by an earlier version of distill, with these options, inputs and numbers of rows; {rerun}"]
    remarks = [f"kept: the code has changed since it was made; {rerun}"] if record.code != planned.code else []
    started = {parent.step.name: (read_step(parent.folder) or StepRecord()).started for parent in planned.made_from}
    others = [name for name, when in started.items() if record.made_from.get(name) not in (None, when)]
    return remarks + [f"kept: made from {name} before that was made anew; {rerun}" for name in others]


def _fits(planned: PlannedStep, record: StepRecord | None) -> bool:
    if record is None or record.status != "finished":
        return False
    if record.fingerprint_version == FINGERPRINT_VERSION:
        return record.fingerprint == planned.fingerprint
    earlier = [(parent, read_step(parent.folder)) for parent in planned.made_from]
    return _is_as_described(planned, record) and all(
        its is not None and _fits(parent, its) and _time(its) <= _time(record) for parent, its in earlier
    )


def _time(record: StepRecord) -> datetime:
    return datetime.fromisoformat(record.started)


def _is_as_described(planned: PlannedStep, record: StepRecord) -> bool:
    """Tell whether options, inputs and rows are those of the plan, as far as step.json says."""
    now = planned.described
    inputs = {name: record.sources.get(name) for name in now.sources}
    same = (record.run, record.parents, record.kind, record.labels) == (now.run, now.parents, now.kind, now.labels)
    return same and inputs == now.sources and _same_options(planned, record.options) and _same_rows(planned, record)


def _same_options(planned: PlannedStep, recorded: dict[str, Any]) -> bool:
    given, now = planned.step.given, planned.described.options
    if recorded.get("learning_rate") is not None and now.get("learning_rate", 0) is None:
        now = now | {"learning_rate": default_learning_rate(width_of(planned.plan.config))}
    passed_over = NOT_IN_FINGERPRINT | {"teacher", "model"} | (_OF_THE_MACHINE - given.keys())
    names = now.keys() - passed_over
    return all(recorded[name] == now[name] for name in names & recorded.keys()) and not given.keys() & (
        names - recorded.keys()
    )


def _same_rows(planned: PlannedStep, record: StepRecord) -> bool:
    now, step = planned.described, planned.step
    recorded = {**json.loads(json.dumps(DataOptions().__dict__)), **record.data}
    splits = VERBS[step.run].splits(step.options, now.rows)
    if not splits:
        return recorded["max_length"] == now.data["max_length"]
    passed_over = {"max_eval_rows"} if "validation" not in splits else set()
    return (
        (record.task, record.text, record.data_revision) == (now.task, now.text, now.data_revision)
        and all(_expanded(recorded[key]) == _expanded(now.data[key]) for key in now.data.keys() - passed_over)
        and all(record.rows.get(split) == now.rows.get(split) for split in splits)
    )


def _expanded(value: Any) -> Any:
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value
