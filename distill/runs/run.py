"""Run a plan: skip what is finished, resume what was cut off, and leave one model folder per step."""

import json
import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from distill.common.console import log
from distill.common.distributed import (
    forget_precision,
    on_main_process,
    process_state,
    wait_for_everyone,
)
from distill.common.folders import (
    locked,
    settle,
    told_of_a_full_disk,
    unfinished,
    write_atomically,
    written_whole,
)
from distill.common.hardware import allocator
from distill.common.records import Root, StepRecord, read_step
from distill.common.serialized import as_json
from distill.errors import InputError, nearest_name
from distill.evaluation.benchmark import environment
from distill.evaluation.options import ReportOptions
from distill.models.load import fetch_weights
from distill.recipes.finished import (
    RERUNS,
    is_finished,
    pending_reruns,
    remarks_on,
)
from distill.recipes.plan import (
    FINGERPRINT_VERSION,
    Plan,
    PlannedStep,
    check_fetched,
    resolved_options,
    rows_as_recorded,
    settled,
)
from distill.recipes.recipe import Recipe
from distill.recipes.seeds import unexpanded
from distill.recipes.yaml12 import dump_yaml
from distill.runs.card import inherited, write_model_card
from distill.training.checkpoints import CHECKPOINTS, drop_half_made, last_checkpoint
from distill.verbs.all import VERBS
from distill.verbs.base import StepResult

_BEGUN = ".begun"
"""In a step's folder: what its checkpoints are of."""


def run_plan(
    plan: Plan,
    *,
    only: list[str] | None = None,
    rerun: list[str] | None = None,
    force: bool = False,
    profile: bool = False,
) -> list[str]:
    """Make every model of the plan that is not finished.

    A finished model stays until its successor is whole. What a run that was cut off was to make anew (`rerun`) is made
    anew by the next one.

    Args:
        plan: of the recipe.
        only: run these steps alone; what they start from must be finished.
        rerun: run these steps, and those that depend on them, from their beginning even if they are finished.
        force: the same for all steps that are run.
        profile: write where the time of their training steps goes into the run folders.

    Returns:
        Names of the steps that ran.

    Raises:
        InputError: unknown names in `only` or `rerun`, an unfinished input, or a folder that no run made.
        FolderInUse: another process runs into the same folder.
        DiskFull: the steps so far are whole, and the next run goes on.
    """
    folder = plan.recipe.output_dir
    steps, again = chosen_steps(plan, only, (only or list(plan.steps)) if force else rerun or [])
    _check_folders(folder, steps)
    asked = again | pending_reruns(folder)
    _fetch_weights(plan, [planned for planned in steps if planned.step.name in asked or not is_finished(planned)])
    with told_of_a_full_disk(folder), ExitStack() as held:
        on_main_process(lambda: held.enter_context(locked(folder)))
        on_main_process(lambda: _begin(plan, again))
        reruns = pending_reruns(folder)
        todo = {planned.step.name: planned.step.name in reruns or not is_finished(planned) for planned in steps}
        wait_for_everyone()  # nobody writes before all have read
        for number, planned in enumerate(steps, start=1):
            name, place = planned.step.name, f"[{number}/{len(steps)}]"
            if not todo[name]:
                _say("\n      ".join([f"{place} {name}: finished already", *remarks_on(planned)]))
                on_main_process(partial(_drop_checkpoints, planned.folder))
                continue
            planned = settled(planned, plan.data)
            lines = VERBS[planned.step.run].lines(planned.step.options, planned.plan)
            _say("\n      ".join([f"{place} {name}: {planned.step.run}", *lines]))
            if _holds_model(planned.folder):
                reason = "as --rerun asked" if name in reruns else "as its options, inputs or rows have changed since"
                _say(f"      made anew, {reason}; the model that is there stays until this one is whole")
            clock = time.perf_counter()
            _run(plan, planned, profile=profile)
            on_main_process(partial(_note_reruns, folder, pending_reruns(folder) - {name}))
            _say(f"      {name}: finished in {time.perf_counter() - clock:.0f} s → {planned.folder}")
    return [name for name, ran in todo.items() if ran]


def _run(plan: Plan, planned: PlannedStep, *, profile: bool) -> None:
    """One step, beside what is in its folder, which it replaces once it is whole."""
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    code = on_main_process(partial(_prepare_folder, planned))
    forget_precision()
    folder = unfinished(planned.folder)
    with written_whole(planned.folder) if process_state().is_main_process else nullcontext():
        wait_for_everyone()
        made = VERBS[planned.step.run].run(planned.step.options, planned.plan, plan.data, folder, profile=profile)
        wait_for_everyone()
        seconds = time.perf_counter() - clock
        finish = partial(_finish, plan, replace(planned, folder=folder), made)
        on_main_process(lambda: finish(code=code, started=started, seconds=seconds))
    wait_for_everyone()


def _begin(plan: Plan, again: set[str]) -> None:
    """What stands in the output folder before the first step: the recipe, and which steps will be made anew."""
    for planned in plan.steps.values():
        settle(planned.folder)
        if planned.step.name in again:
            shutil.rmtree(planned.folder / CHECKPOINTS, ignore_errors=True)
    save_recipe(plan.recipe)
    _note_reruns(plan.recipe.output_dir, again | pending_reruns(plan.recipe.output_dir) & plan.steps.keys())


def _drop_checkpoints(folder: Path) -> None:
    """Of a training that was to replace a finished model, and is not asked for any more."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / _BEGUN).unlink(missing_ok=True)


def _note_reruns(output_dir: Path, names: set[str]) -> None:
    if names:
        write_atomically(output_dir / RERUNS, json.dumps(sorted(names)))
    else:
        (output_dir / RERUNS).unlink(missing_ok=True)


def save_recipe(recipe: Recipe) -> None:
    """Write the recipe with its overrides into the output folder, where `distill report` finds it."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(recipe.output_dir / "recipe.yaml", recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML, with its overrides; no tokens."""
    content: dict[str, Any] = {"task": recipe.task} if recipe.task else {}
    content |= {"output_dir": str(recipe.output_dir)}
    for key, options in (("data", recipe.data), ("benchmark", recipe.benchmark)):
        content[key] = {name: value for name, value in asdict(options).items() if value is not None}
    if recipe.report != ReportOptions():
        content["report"] = {name: value for name, value in asdict(recipe.report).items() if value is not None}
    published = {key: getattr(recipe, key) for key in ("baseline", "base_model", "license", "language", "push")}
    content |= {key: list(value) if isinstance(value, tuple) else value for key, value in published.items() if value}
    content |= {"seeds": list(recipe.seeds)} if recipe.seeds else {}
    if recipe.search is not None:
        content["search"] = {key: value for key, value in asdict(recipe.search).items() if value is not None}
    steps = {
        step.name: {"run": step.run, **{key: value for key, value in step.given.items() if not key.endswith("_token")}}
        for step in recipe.steps.values()
    }
    content["steps"] = unexpanded(steps, recipe.copies)
    return dump_yaml(json.loads(json.dumps(content, default=str)))


def chosen_steps(plan: Plan, only: list[str] | None, rerun: list[str]) -> tuple[list[PlannedStep], set[str]]:
    """Choose the steps to run.

    Args:
        plan: of the recipe.
        only: names of the steps to choose from; None for all.
        rerun: names of steps that are made anew though they are finished.

    Returns:
        The steps in their order, and the names of those among them that are made anew: those of `rerun`, and those that
            start from them.

    Raises:
        InputError: unknown names, or an unfinished input.
    """
    given = {"--only": only or [], "--rerun": rerun}
    problems = [
        f"{flag} {name}: no such step; {nearest_name(name, plan.steps)}"
        for flag, names in given.items()
        for name in names
        if name not in plan.steps
    ]
    chosen = [planned for name, planned in plan.steps.items() if only is None or name in only]
    names = {planned.step.name for planned in chosen}
    problems += [f"--rerun {name}: is not among --only" for name in rerun if name in plan.steps and name not in names]
    again: set[str] = set()
    for planned in chosen:
        if planned.step.name in rerun or again & set(planned.parents):
            again.add(planned.step.name)
        for parent in planned.parents:
            if parent in plan.steps and parent not in names and not is_finished(plan.steps[parent]):
                problems.append(
                    f"--only {planned.step.name}: starts from {parent}, which is not finished; add it to --only"
                )
    if problems:
        raise InputError(*problems)
    return chosen, again


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
        model.reference
        for planned in steps
        for option, model in planned.plan.inputs.items()
        if not (option == "model" and planned.step.given.get("from_scratch"))
    }
    for source in plan.sources.values():
        if source.reference in needed:
            fetch_weights(source)
    for planned in steps:
        check_fetched(plan, planned)


def _prepare_folder(planned: PlannedStep) -> str | None:
    """A folder that a training writes its checkpoints into, beside the finished model if there is one.

    Returns:
        The hash of the code that the step was begun with, if it goes on from a checkpoint; else of this one.
    """
    folder, checkpoints = planned.folder, planned.folder / CHECKPOINTS
    if not VERBS[planned.step.run].trains:
        return planned.code
    begun = read_step(folder, _BEGUN) or StepRecord()
    if (begun.fingerprint, begun.fingerprint_version) != (planned.fingerprint, FINGERPRINT_VERSION):
        if last_checkpoint(checkpoints) is not None:
            _say("      begun anew: the checkpoints are of other options, inputs or rows, or of an earlier version")
        shutil.rmtree(checkpoints, ignore_errors=True)
    drop_half_made(checkpoints)
    resumes = last_checkpoint(checkpoints) is not None
    code = begun.code if resumes else planned.code
    if code != planned.code:
        _say(f"      begun by other code; `distill run … --rerun {planned.step.name}` begins it anew")
    folder.mkdir(parents=True, exist_ok=True)
    record = as_json(
        StepRecord(
            name=planned.step.name,
            run=planned.step.run,
            fingerprint=planned.fingerprint,
            fingerprint_version=FINGERPRINT_VERSION,
            code=code,
            status="running",
        )
    )
    if not _holds_model(folder):  # first, as a folder without it is taken for somebody else's
        write_atomically(folder / "step.json", record)
    write_atomically(folder / _BEGUN, record)
    return code


def _holds_model(folder: Path) -> bool:
    """Whether a run folder holds a finished model, of whatever plan."""
    record = read_step(folder)
    return record is not None and record.status == "finished"


def _finish(
    plan: Plan, planned: PlannedStep, made: StepResult, *, code: str | None, started: datetime, seconds: float
) -> None:
    """A folder as others may take it: a card, and the record that says it is finished."""
    record = replace(
        _record(plan, planned),
        code=code,
        **vars(made),
        started=started.isoformat(timespec="milliseconds"),
        wall_seconds=round(seconds, 2),
        status="finished",
    )
    if made.learning_rate is not None:
        record.options["learning_rate"] = made.learning_rate
    write_model_card(planned.folder, record)
    write_atomically(planned.folder / "step.json", as_json(record))
    for weights in planned.folder.glob("*.safetensors"):  # safetensors writes them for the owner alone
        shutil.copymode(planned.folder / "step.json", weights)


def _record(plan: Plan, planned: PlannedStep) -> StepRecord:
    """What is known of a step before it runs."""
    models, layers = lineage(plan, planned), planned.plan.layers
    return StepRecord(
        name=planned.step.name,
        run=planned.step.run,
        fingerprint=planned.fingerprint,
        fingerprint_version=FINGERPRINT_VERSION,
        made_from={
            parent.step.name: (read_step(parent.folder) or StepRecord()).started for parent in planned.made_from
        },
        parents=list(planned.parents),
        lineage=models,
        ancestors={name: plan.steps[name].step.run for name in models if name in plan.steps},
        sources={name: plan.sources[name].revision for name in models if name in plan.sources},
        root=_root(plan, planned),
        layers=None if layers is None else list(layers),
        layer_pairs={
            teacher: {part: [list(pair) for pair in pairs] for part, pairs in matched.items()}
            for teacher, matched in planned.plan.layer_pairs.items()
        },
        scored=[list(each) for each in plan.data.scored_splits()],
        options=resolved_options(planned.step),
        environment={**environment(), "allocator": allocator()},
        **rows_as_recorded(plan.recipe, plan.data),
    )


def lineage(plan: Plan, planned: PlannedStep) -> list[str]:
    """List every model that a step's model is made from, nearest first.

    Args:
        plan: of the recipe.
        planned: one of its steps.
    """
    found: list[str] = []
    queue = list(planned.parents)
    while queue:
        name = queue.pop(0)
        if name not in found:
            found.append(name)
            queue += plan.steps[name].parents if name in plan.steps else ()
    return found


def _root(plan: Plan, planned: PlannedStep) -> Root:
    """The model outside the recipe that the weights come from in the end, with what its card says."""
    reference = planned.plan.source.reference
    if reference in plan.steps:
        return _root(plan, plan.steps[reference])
    source = plan.sources[reference]
    return Root(reference, source.hub_id, source.revision, **inherited(Path(source.location)))


def _say(text: str) -> None:
    if process_state().is_main_process:
        log.print(text)
