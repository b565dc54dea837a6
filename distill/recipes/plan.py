"""Resolve a recipe against its data and models without training: every problem at once, and what steps will make."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from distill.common.records import StepRecord, read_step
from distill.common.serialized import as_json, from_json
from distill.data.load import Data, load_data
from distill.errors import InputError
from distill.models.folders import export_problem
from distill.models.load import ModelSource, longest_input
from distill.models.replacements import is_quantized
from distill.models.weights import fit_problems
from distill.recipes.fingerprint import code_fingerprint
from distill.recipes.inputs import baseline_problems, default_baseline, label_map_of, needs_head, resolve_outside
from distill.recipes.recipe import Recipe, Step, located
from distill.recipes.seeds import told_once
from distill.recipes.stored_models import stored_fit
from distill.training.teachers import FROM_DATA
from distill.verbs.all import VERBS
from distill.verbs.base import ModelInput, StepPlan, source_of
from distill.verbs.references import is_teacher, referenced_models, teachers_of

FINGERPRINT_VERSION = 2
"""Of how fingerprints are made. Raise it with any change of that: folders made before are then compared with the plan
by what their step.json says (`finished.is_finished`), and not made anew."""

# Options that change what is shown or kept while a step runs, and not what it makes.
NOT_IN_FINGERPRINT = {
    *("logging_strategy", "logging_steps", "logging_first_step", "report_to", "run_name", "project", "disable_tqdm"),
    *("log_level", "log_level_replica", "log_on_each_node", "save_strategy", "save_steps", "save_total_limit"),
    *("save_on_each_node", "per_device_eval_batch_size", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_prefetch_factor", "cache_dir", "cache_limit_gb"),
}


@dataclass(frozen=True)
class PlannedStep:
    """A step with all that is known before it runs: what it starts from, what it will make, and its fingerprint."""

    step: Step
    folder: Path
    plan: StepPlan
    """What its verb decided; the step is handed this."""
    fingerprint: str
    """Of options, inputs and rows."""
    code: str
    """A hash of the code that makes the step."""
    described: StepRecord
    """Of options, inputs and rows what step.json will say, to be compared with one whose fingerprint is of another
    version."""
    made_from: tuple["PlannedStep", ...] = ()
    """The earlier steps among `parents`."""

    @property
    def parents(self) -> tuple[str, ...]:
        """The models that it starts from, as the user wrote them: steps' names, or models."""
        return tuple(model.reference for model in self.plan.inputs.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the models that it starts from, to be shown."""
        return tuple(dict.fromkeys(note for model in self.plan.inputs.values() for note in model.notes))


@dataclass(frozen=True)
class Plan:
    """A recipe that can run."""

    recipe: Recipe
    data: Data
    steps: dict[str, PlannedStep]
    baseline: str
    """The step or model that the report compares with."""
    baseline_label_map: dict[str, str] | None
    """The baseline's label names → the task's, where it is a teacher from outside whose names differ."""
    sources: dict[str, ModelSource]
    """Models outside the recipe, by the reference that the user wrote."""


StepCheck = Callable[[PlannedStep, Data | None], list[str]]


def make_plan(recipe: Recipe, *, check_step: StepCheck | None = None) -> Plan:
    """Resolve a recipe against its data and models: layers, sizes, labels and fingerprints of every step.

    Args:
        recipe: may be a draft.
        check_step: tells more problems of a step, from its plan and the data.

    Raises:
        InputError: with every problem of the recipe, its data, models, layers and labels.
    """
    problems: list[str] = []
    data = None
    if recipe.data_is_readable:
        try:
            data = load_data(recipe.task, recipe.data, slices=recipe.report.slices)
        except InputError as error:
            problems += error.problems
    sources: dict[str, ModelSource] = {}
    planned: dict[str, PlannedStep] = {}
    failed: set[str] = set()
    for name in recipe.given:
        try:
            step = planned[name] = _plan_step(name, recipe, data, planned, failed, sources)
            if check_step is not None:
                problems += check_step(step, data)
        except _Unplannable as error:
            failed.add(name)
            problems += [f"steps.{name}.{problem}" for problem in error.problems]
    baseline, label_map = recipe.baseline, None
    if baseline is None and not problems and not recipe.problems:
        baseline = default_baseline(recipe, data, sources)
    if baseline is not None:
        label_map = label_map_of(recipe, baseline)
        if baseline not in recipe.given:
            problems += [
                f"baseline: {problem}" for problem in baseline_problems(baseline, label_map, recipe, data, sources)
            ]
    if problems or recipe.problems or data is None or baseline is None:
        problems = told_once(problems, recipe.copies)
        raise InputError(*recipe.problems, *(located(problem, recipe.path, recipe.flags) for problem in problems))
    return Plan(recipe, data, planned, baseline, label_map, sources)


class _Unplannable(Exception):
    def __init__(self, problems: Sequence[str]):
        self.problems = problems


def _plan_step(
    name: str,
    recipe: Recipe,
    data: Data | None,
    planned: dict[str, PlannedStep],
    failed: set[str],
    sources: dict[str, ModelSource],
) -> PlannedStep:
    """One step; raises `_Unplannable` with its problems (none of its own where an input has failed already)."""
    given = recipe.given[name]
    problems: list[str] = []
    inputs: dict[str, ModelInput] = {}
    for option, reference in referenced_models(given).items():
        if reference in failed:
            failed.add(name)  # told already
        elif reference in recipe.given and reference not in planned:
            problems.append(f"{option}: {reference!r} is not an earlier step; a step refers to steps above it")
        else:
            try:
                inputs[option] = (
                    _made_by(planned[reference], option)
                    if reference in planned
                    else resolve_outside(option, reference, name, recipe, data, sources)
                )
            except InputError as error:
                problems += [f"{option}: {problem}" for problem in error.problems]
    step = recipe.steps.get(name)
    if problems or step is None or name in failed:
        raise _Unplannable(problems)

    if not inputs:
        raise _Unplannable(["model: missing; with teacher: data, say what the student starts from"])
    verb, source, made = VERBS[step.run], source_of(inputs), None
    try:
        made = verb.plan(step.options, inputs, data)
    except InputError as error:
        problems += error.problems
    for option, model in inputs.items():
        longest = longest_input(model.config)
        if longest is not None and recipe.data_is_readable and recipe.data.max_length > longest:
            problems.append(
                f"{option}: takes at most {longest} tokens, but data.max_length is {recipe.data.max_length}"
            )
    if is_quantized(source.config) and not verb.takes_quantized(step.options):
        option = "model" if "model" in inputs else "teacher"
        parent = _parent(source, planned)
        made_from = f" ({parent})" if parent else ""
        adapters = ", or train adapters of it (lora: {})" if verb.trains else ""
        problems.append(
            f"{option}: {source.reference} is quantized; start from the model it was made from{made_from}{adapters}"
        )
    if problems or made is None:
        raise _Unplannable(problems)
    return PlannedStep(
        step=step,
        folder=recipe.output_dir / step.name,
        plan=made,
        fingerprint=_fingerprint(step, {option: model.fingerprint for option, model in inputs.items()}, data),
        code=code_fingerprint(verb.module),
        described=_described(step, inputs, sources, recipe, data),
        made_from=tuple(planned[model.reference] for model in inputs.values() if model.is_step),
    )


def _parent(source: ModelInput, planned: Mapping[str, PlannedStep]) -> str | None:
    """What a model was made from, as far as the recipe or its own step.json says."""
    if source.is_step:
        return planned[source.reference].plan.source.reference
    return next(iter((read_step(Path(source.location)) or StepRecord()).parents), None)


def _made_by(made: PlannedStep, option: str) -> ModelInput:
    """The model of an earlier step, as an option of a later one names it.

    Raises:
        InputError: it is an export, or an adapter, where a whole model is needed.
    """
    if made.plan.is_export:
        raise InputError(f"{made.step.name} {export_problem(made.plan.source.reference)}")
    if not is_teacher(option) and made.plan.is_adapter:
        whole = "merge: true makes a whole model there"
        if is_quantized(made.plan.config):
            whole = "it belongs to a quantized one; go on from the model before that"
        raise InputError(f"{made.step.name} makes an adapter, and this starts from a whole model; {whole}")
    return ModelInput(
        made.step.name,
        made.plan.config,
        str(made.folder),
        made.plan.tokenizer_location,
        made.fingerprint,
        is_step=True,
        weight_bytes=made.plan.weight_bytes,
    )


def settled(planned: PlannedStep, data: Data) -> PlannedStep:
    """A step whose plan is of the models that the steps before it made, where these decided sizes themselves.

    Args:
        planned: a step whose inputs are finished.
        data: of the recipe.

    Raises:
        InputError: no such model can be made of what was decided.
    """
    if not any(_is_open(each) for each in planned.made_from):
        return planned
    made = {each.step.name: each for each in planned.made_from}
    inputs = {
        option: replace(model, config=_made_config(made[model.reference])) if model.is_step else model
        for option, model in planned.plan.inputs.items()
    }
    return replace(planned, plan=VERBS[planned.step.run].plan(planned.step.options, inputs, data))


def _is_open(planned: PlannedStep) -> bool:
    """Whether the config of what a step makes hangs on what a step decided."""
    return planned.plan.is_bound or any(_is_open(each) for each in planned.made_from)


def _made_config(planned: PlannedStep) -> PretrainedConfig:
    """The config of the model that a finished step made; an adapter's is that of the model beneath it."""
    if not planned.plan.is_adapter:
        return AutoConfig.from_pretrained(planned.folder)
    beneath = {each.step.name: each for each in planned.made_from}.get(planned.plan.source.reference)
    return planned.plan.config if beneath is None else _made_config(beneath)


def check_fetched(plan: Plan, planned: PlannedStep) -> None:
    """Check the weights of a step's models from the Hub, which were not here when it was planned.

    Args:
        plan: of the recipe.
        planned: one of its steps, whose models' weights are here by now.

    Raises:
        InputError: they are not those of their config, or lack a head that is needed.
    """
    problems: list[str] = []
    for option, model in planned.plan.inputs.items():
        reference = model.reference
        source = plan.sources.get(reference)
        if source is None or (option == "model" and planned.step.given.get("from_scratch")):
            continue
        new_head = not needs_head(option, planned.step.run)
        fit, _ = stored_fit(source, plan.data.task, new_head=new_head)
        found = [] if fit is None else fit_problems(fit, plan.data.task.kind, new_head=new_head)
        problems += [f"steps.{planned.step.name}.{option}: {reference}: {problem}" for problem in found]
    if problems:
        raise InputError(*problems)


def _fingerprint(step: Step, inputs: dict[str, str], data: Data | None) -> str:
    """Of everything that a user decides of what the step makes: options, inputs and rows."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(type(step.options))
    }
    changed = {
        key: value for key, value in step.given.items() if value != defaults[key] and key not in NOT_IN_FINGERPRINT
    }
    for name in ("teacher", "model"):
        changed.pop(name, None)  # their fingerprints stand for them
    if FROM_DATA in teachers_of(step.given):
        inputs = {**inputs, FROM_DATA: FROM_DATA}
    rows = None if data is None else VERBS[step.run].rows(step.options, data)
    identity = json.dumps([FINGERPRINT_VERSION, step.run, changed, inputs, rows], sort_keys=True, default=str)
    return hashlib.sha256(identity.encode()).hexdigest()


def _described(
    step: Step, inputs: Mapping[str, ModelInput], sources: Mapping[str, ModelSource], recipe: Recipe, data: Data | None
) -> StepRecord:
    """Options, inputs and rows as step.json says them."""
    parents = [model.reference for model in inputs.values()]
    found = StepRecord(
        name=step.name,
        run=step.run,
        parents=parents,
        sources={name: sources[name].revision for name in parents if name in sources},
        options=resolved_options(step),
    )
    if data is not None:
        found = replace(found, **rows_as_recorded(recipe, data))
    return from_json(StepRecord, json.loads(as_json(found)))


def rows_as_recorded(recipe: Recipe, data: Data) -> dict[str, Any]:
    """Describe the rows as step.json does, in fields of a `StepRecord`.

    Args:
        recipe: its `data` options are recorded.
        data: the rows that were read with them.
    """
    return {
        "task": data.task.name,
        "kind": data.task.kind,
        "text": data.task.text,
        "labels": data.task.label_names,
        "data": asdict(recipe.data),
        "data_revision": data.revision,
        "rows": {split: len(rows) for split, rows in data.splits.items()},
    }


def resolved_options(step: Step) -> dict[str, Any]:
    """List the options of a step, defaults too, without tokens and without its folder."""
    resolved = VERBS[step.run].resolved(step.options)
    return {key: value for key, value in resolved.items() if not key.endswith("_token") and key != "output_dir"}
