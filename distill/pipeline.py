"""Run a plan: skip what is finished, resume what was cut off, and leave one model folder per step."""

import json
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from distill.benchmark import environment
from distill.card import inherited, write_model_card
from distill.console import log
from distill.errors import InputError, nearest_name
from distill.folders import written_whole
from distill.hardware import allocator
from distill.models import fetch_weights, size_on_disk
from distill.options import StudentOptions
from distill.plan import Plan, PlannedStep
from distill.processes import forget_precision, on_main_process, process_state, wait_for_everyone
from distill.recipe import Recipe
from distill.records import json_text, read_record
from distill.representations import show_pairs
from distill.steps import Made, run_step
from distill.yaml12 import dump_yaml


def run_plan(plan: Plan, *, only: list[str] | None = None, force: bool = False, profile: bool = False) -> list[str]:
    """Make every model of the plan that is not finished.

    Args:
        only: run these steps alone; what they start from must be finished.
        force: run them even if they are finished, from their beginning.
        profile: write where the time of their training steps goes into the run folders.

    Returns:
        Names of the steps that ran.

    Raises:
        InputError: unknown names in `only`, an unfinished input of theirs, or a folder that no run made.
    """
    steps = _chosen(plan, only)
    _check_folders(plan.recipe.output_dir, steps)
    _fetch_weights(plan, [planned for planned in steps if force or not is_finished(planned)])
    on_main_process(lambda: save_recipe(plan.recipe))
    ran = []
    for number, planned in enumerate(steps, start=1):
        name = planned.step.name
        todo = force or not is_finished(planned)
        wait_for_everyone()  # nobody writes step.json before all have read it
        if not todo:
            _say(f"[{number}/{len(steps)}] {name}: finished already")
            continue
        _say(f"[{number}/{len(steps)}] {name}: {planned.step.run}{_parameters(planned)}")
        if read_record(planned.folder).get("status") == "finished" and not force:
            _say("      made anew: its options, inputs, rows or code have changed since")
        clock = time.perf_counter()
        whole = planned.step.run == "quantize" and process_state().is_main_process  # no checkpoints to resume from
        with written_whole(planned.folder) if whole else nullcontext(planned.folder) as folder:
            _run(plan, replace(planned, folder=folder), discard=force, profile=profile)
        _say(f"      {name}: finished in {time.perf_counter() - clock:.0f} s → {planned.folder}")
        wait_for_everyone()
        ran.append(name)
    return ran


def _run(plan: Plan, planned: PlannedStep, *, discard: bool, profile: bool) -> None:
    """One step, from an empty folder to a record that it is finished."""
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    on_main_process(partial(_prepare_folder, planned, discard=discard))
    forget_precision()
    made = run_step(planned.step.options, planned.inputs, plan.data, planned.folder, profile=profile)
    wait_for_everyone()
    seconds = time.perf_counter() - clock
    on_main_process(partial(_finish, plan, planned, made, started=started, seconds=seconds))


def is_finished(planned: PlannedStep) -> bool:
    """Whether the step's folder holds the model that the plan would make."""
    record = read_record(planned.folder)
    same = record.get("status") == "finished" and record.get("fingerprint") == planned.fingerprint
    return same and size_on_disk(planned.folder) > 0


def save_recipe(recipe: Recipe) -> None:
    """Write the recipe with its overrides into the output folder, where `distill report` finds it; no tokens."""
    content: dict[str, Any] = {"task": recipe.task} if recipe.task else {}
    content |= {"output_dir": str(recipe.output_dir)}
    for key, options in (("data", recipe.data), ("benchmark", recipe.benchmark)):
        content[key] = {name: value for name, value in asdict(options).items() if value is not None}
    published = {key: getattr(recipe, key) for key in ("baseline", "base_model", "license", "language", "push")}
    content |= {key: list(value) if isinstance(value, tuple) else value for key, value in published.items() if value}
    content["steps"] = {
        step.name: {"run": step.run, **{key: value for key, value in step.given.items() if not key.endswith("_token")}}
        for step in recipe.steps.values()
    }
    text = dump_yaml(json.loads(json.dumps(content, default=str)))
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(recipe.output_dir / "recipe.yaml", text)
    except OSError as error:
        raise InputError(f"output_dir: {recipe.output_dir} cannot be written ({error.strerror})") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _chosen(plan: Plan, only: list[str] | None) -> list[PlannedStep]:
    if only is None:
        return list(plan.steps.values())
    problems = [
        f"--only {name}: no such step; {nearest_name(name, plan.steps)}" for name in only if name not in plan.steps
    ]
    chosen = [planned for name, planned in plan.steps.items() if name in only]
    for planned in chosen:
        for parent in planned.parents:
            if parent in plan.steps and parent not in only and not is_finished(plan.steps[parent]):
                problems.append(
                    f"--only {planned.step.name}: starts from {parent}, which is not finished; add it to --only"
                )
    if problems:
        raise InputError(*problems)
    return chosen


def _check_folders(output_dir: Path, steps: list[PlannedStep]) -> None:
    problems = []
    if output_dir.exists() and not output_dir.is_dir():
        problems.append(f"output_dir: {output_dir} is a file, and the run folders would go there")
    for planned in steps:
        folder = planned.folder
        if folder.exists() and not folder.is_dir():
            problems.append(f"{folder}: is a file, and step {planned.step.name} would write a folder there")
        elif folder.is_dir() and any(folder.iterdir()) and not (folder / "step.json").is_file():
            problems.append(f"{folder}: holds files that no run made (no step.json); move them, or change output_dir")
    if problems:
        raise InputError(*problems)


def _fetch_weights(plan: Plan, steps: list[PlannedStep]) -> None:
    """Have what the steps start from, all of it before the first one runs."""
    needed = {
        parent
        for planned in steps
        for option, parent in zip(planned.inputs, planned.parents, strict=True)
        if not (option == "model" and planned.step.given.get("from_scratch"))
    }
    for source in plan.sources.values():
        if source.reference in needed:
            fetch_weights(source)


def _prepare_folder(planned: PlannedStep, *, discard: bool) -> None:
    """An empty folder marked as running; checkpoints of the same step stay, for it to resume from."""
    record = read_record(planned.folder)
    same = record.get("fingerprint") == planned.fingerprint and record.get("status") == "running"
    if planned.folder.is_dir():
        for path in planned.folder.iterdir():
            if path.name == "checkpoints" and same and not discard:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    planned.folder.mkdir(parents=True, exist_ok=True)
    _write_record(planned, {"name": planned.step.name, "fingerprint": planned.fingerprint, "status": "running"})


def _finish(plan: Plan, planned: PlannedStep, made: Made, *, started: datetime, seconds: float) -> None:
    """A folder as others may take it: no checkpoints, a card, and the record that says it is finished."""
    shutil.rmtree(planned.folder / "checkpoints", ignore_errors=True)
    for weights in planned.folder.glob("*.safetensors"):  # safetensors writes them for the owner alone
        shutil.copymode(planned.folder / "step.json", weights)
    record = _record(plan, planned) | asdict(made)
    record |= {"started": started.isoformat(timespec="seconds"), "wall_seconds": round(seconds, 2)}
    if made.learning_rate is not None:
        record["options"]["learning_rate"] = made.learning_rate
    write_model_card(planned.folder, record)
    _write_record(planned, {**record, "status": "finished"})


def _write_record(planned: PlannedStep, record: dict[str, Any]) -> None:
    write_atomically(planned.folder / "step.json", json_text(record) + "\n")


def _record(plan: Plan, planned: PlannedStep) -> dict[str, Any]:
    options = planned.step.options
    resolved = options.to_dict() if hasattr(options, "to_dict") else asdict(options)
    resolved = {key: value for key, value in resolved.items() if not key.endswith("_token") and key != "output_dir"}
    return {
        "schema": 1,
        "name": planned.step.name,
        "run": planned.step.run,
        "fingerprint": planned.fingerprint,
        "parents": list(planned.parents),
        "lineage": lineage(plan, planned),
        "ancestors": {name: plan.steps[name].step.run for name in lineage(plan, planned) if name in plan.steps},
        "sources": {name: plan.sources[name].revision for name in lineage(plan, planned) if name in plan.sources},
        "root": _root(plan, planned),
        "layers": planned.layers,
        "layer_pairs": planned.layer_pairs,
        "task": plan.data.task.name,
        "kind": plan.data.task.kind,
        "text": plan.data.task.text,
        "labels": plan.data.task.label_names,
        "scored": plan.data.scored_splits(),
        "data": asdict(plan.recipe.data),
        "data_revision": plan.data.revision,
        "rows": {split: len(rows) for split, rows in plan.data.splits.items()},
        "options": resolved,
        "environment": {**environment(), "allocator": allocator()},
    }


def lineage(plan: Plan, planned: PlannedStep) -> list[str]:
    """Every model this one was made from, nearest first."""
    found: list[str] = []
    queue = list(planned.parents)
    while queue:
        name = queue.pop(0)
        if name not in found:
            found.append(name)
            queue += plan.steps[name].parents if name in plan.steps else ()
    return found


def _root(plan: Plan, planned: PlannedStep) -> dict[str, Any]:
    """The model outside the recipe that the weights come from in the end, with what its card says."""
    reference = planned.parents[-1 if "model" in planned.inputs else 0]
    if reference in plan.steps:
        return _root(plan, plan.steps[reference])
    source = plan.sources[reference]
    found = {"reference": reference, "hub_id": source.hub_id, "revision": source.revision}
    return found | inherited(Path(source.location))


def _parameters(planned: PlannedStep) -> str:
    parts = []
    if planned.layers is not None:
        parts.append(f"source layers {', '.join(map(str, planned.layers))}")
    elif isinstance(planned.step.options, StudentOptions):
        parts.append("new weights")
    for teacher, pairs in planned.layer_pairs.items():
        parts += [f"{part} {show_pairs(layers)} of {teacher}" for part, layers in pairs.items()]
    return f" ({'; '.join(parts)})" if parts else ""


def _say(text: str) -> None:
    if process_state().is_main_process:
        log.print(text)
