"""Resolve a recipe against its data and models without training: every problem at once, and what steps will make."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from distill.compression.student import is_fresh, student_config
from distill.data.load import Data, load_data, token_fingerprint
from distill.errors import InputError
from distill.models.load import ModelSource, load_processor, longest_input, set_labels
from distill.models.replacements import is_quantized
from distill.models.structure import depth_of
from distill.models.weights import fit_problems
from distill.recipes.fingerprint import code_fingerprint
from distill.recipes.inputs import ModelInput, baseline_problems, default_baseline, label_map_of, resolve_outside
from distill.recipes.recipe import Recipe, Step, located
from distill.recipes.stored_models import check_student, reading_problems, stored_fit
from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS
from distill.tasks.metrics import computed
from distill.training.config import is_on
from distill.training.teachers import FROM_DATA, comparable, layer_pairs
from distill.verbs.all import VERBS
from distill.verbs.options import (
    DistillOptions,
    FinetuneOptions,
    chosen_layers,
    cuts_student,
    is_adapter,
    is_teacher,
    referenced_models,
    teachers_of,
    width_of_student,
)

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
    """A step whose inputs, student and fingerprint are known."""

    step: Step
    folder: Path
    inputs: dict[str, str]
    """For each option that names a model, where `from_pretrained` will find it."""
    parents: tuple[str, ...]
    """The same as the user wrote them: steps' names, or models."""
    config: PretrainedConfig
    """Of the model that the step makes."""
    tokenizer_location: str
    layers: tuple[int, ...] | None
    """0-based source layers that seed the student; None where no layers do."""
    layer_pairs: dict[str, dict[str, list[tuple[int, int]]]]
    """For each teacher of a distill step the (student, teacher) layers that its losses match."""
    fingerprint: str
    """Of options, inputs and rows."""
    code: str
    """A hash of the code that makes the step."""
    described: dict[str, Any]
    """Of options, inputs and rows what step.json will say, to be compared with one whose fingerprint is of another
    version."""
    made_from: tuple["PlannedStep", ...] = ()
    """The earlier steps among `parents`."""
    notes: tuple[str, ...] = ()
    """What is to be said of the models that it starts from."""


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


StepCheck = Callable[[PlannedStep, Mapping[str, PretrainedConfig], Data | None], list[str]]


def make_plan(recipe: Recipe, *, check_step: StepCheck | None = None) -> Plan:
    """Resolve everything.

    Args:
        recipe: may be a draft.
        check_step: tells more problems of a step, from its plan, the configs of the models that it refers to, and
            the data.

    Raises:
        InputError: with every problem of the recipe, its data, models, layers and labels.
    """
    problems: list[str] = []
    data = None
    if recipe.data_is_readable:
        try:
            data = load_data(recipe.task, recipe.data)
        except InputError as error:
            problems += error.problems
    sources: dict[str, ModelSource] = {}
    planned: dict[str, PlannedStep] = {}
    failed: set[str] = set()
    for name in recipe.given:
        try:
            step = planned[name] = _plan_step(name, recipe, data, planned, failed, sources)
            if check_step is not None:
                configs = {each: (planned.get(each) or sources[each]).config for each in step.parents}
                problems += check_step(step, configs, data)
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
    options = step.options
    kind = data.task.kind if data is not None else None
    source_option = "model" if "model" in inputs else "teacher"
    source = inputs[source_option]
    config, layers = copy.deepcopy(source.config), None
    pairs: dict[str, dict[str, list[tuple[int, int]]]] = {}
    try:
        if isinstance(options, FinetuneOptions | DistillOptions):
            problems += _adapter_problems(options, source)
            problems += [] if data is None else _best_metric_problems(options, data)
            chosen, width = chosen_layers(options, depth_of(config)), width_of_student(options)
            if not options.from_scratch and not is_fresh(config, width):
                layers = tuple(chosen)
            cut = cuts_student(options, config) or source_option == "teacher"
            if cut and kind is not None and layers is not None:
                check_student(options, source.config, kind)
            if cuts_student(options, config):
                config = student_config(config, options.student_arch, chosen, width)
        if isinstance(options, DistillOptions):
            for teacher in [model for option, model in inputs.items() if is_teacher(option)]:
                same = _reads(teacher, kind) == _reads(source, kind)
                if not same and kind is not None and not KINDS[kind].pairs:
                    what = "image processor" if KINDS[kind].reads == "images" else "tokenizer"
                    problems.append(
                        f"{source_option}: its {what} is not that of {teacher.reference}, and {kind} compares what "
                        "both read piece by piece; start from a model that reads the same"
                    )
                problems += comparable(options, [config, teacher.config], same_tokens=same)
                pairs[teacher.reference] = layer_pairs(options, depth_of(config), depth_of(teacher.config))
                problems += reading_problems(options, pairs[teacher.reference], teacher.config, config, kind)
    except InputError as error:
        problems += error.problems
    for option, model in inputs.items():
        longest = longest_input(model.config)
        if longest is not None and recipe.data_is_readable and recipe.data.max_length > longest:
            problems.append(
                f"{option}: takes at most {longest} tokens, but data.max_length is {recipe.data.max_length}"
            )
    if is_quantized(config) and getattr(options, "lora", None) is None:
        problems.append(
            f"{source_option}: {source.reference} is quantized; start from the model it was made from, or train "
            "adapters of it (lora: {})"
        )
    if problems:
        raise _Unplannable(problems)
    if data is not None:
        set_labels(config, data.task)
    try:
        VERBS[step.run].complete(options, config, kind)
    except InputError as error:
        raise _Unplannable(error.problems) from None
    return PlannedStep(
        step=step,
        folder=recipe.output_dir / step.name,
        inputs={option: model.location for option, model in inputs.items()},
        parents=tuple(model.reference for model in inputs.values()),
        config=config,
        tokenizer_location=source.tokenizer_location,
        layers=layers,
        layer_pairs=pairs,
        fingerprint=_fingerprint(step, {option: model.fingerprint for option, model in inputs.items()}, data),
        code=code_fingerprint(VERBS[step.run].module),
        described=_described(step, inputs, sources, recipe, data),
        made_from=tuple(planned[model.reference] for model in inputs.values() if model.is_step),
        notes=tuple(dict.fromkeys(note for model in inputs.values() for note in model.notes)),
    )


def _reads(model: ModelInput, kind: TaskKind | None) -> str:
    """A fingerprint of the tokens (or pixels) that a model reads of rows."""
    return token_fingerprint(load_processor(model.tokenizer_location, kind))


def _adapter_problems(options: FinetuneOptions | DistillOptions, source: ModelInput) -> list[str]:
    """What keeps a step from training adapters, or from starting from what it names."""
    problems = []
    if options.from_scratch and options.model is None:
        problems.append("from_scratch: needs a `model`, whose config the student gets")
    if options.merge and options.lora is None:
        problems.append("merge: there are no adapters to merge; say lora: {} too, or leave it out")
    if options.lora is None:
        return problems
    if options.merge and is_quantized(source.config):
        problems.append("merge: adapters merged into quantized weights would be rounded away; leave it out")
    changed = options.model is None or options.from_scratch or cuts_student(options, source.config)
    if not options.merge and changed:
        problems.append(
            "lora: the adapter alone would not tell the model that it belongs to, which is made here; name a trained "
            "`model` and keep its layers and sizes, or say merge: true, which saves the whole model"
        )
    elif not options.merge and not source.has_head:
        problems.append(
            f"lora: {source.reference} has no head for this task, and an adapter is loaded into a model that has one; "
            "say merge: true, which saves the whole model, or fine-tune it first"
        )
    return problems


def _best_metric_problems(options: FinetuneOptions | DistillOptions, data: Data) -> list[str]:
    """Whether evaluations compute the metric that the best checkpoint is chosen by."""
    wanted = (options.metric_for_best_model or "loss").removeprefix("eval_")
    parts = options.loss_weights if isinstance(options, DistillOptions) else {"hard": 1.0}
    known = [*computed(data.task), "loss", *(f"loss/{part}" for part, weight in parts.items() if is_on(weight))]
    if wanted in known:
        return []
    return [f"metric_for_best_model: {wanted!r} is not computed for {data.task.kind}; there are {', '.join(known)}"]


def _made_by(made: PlannedStep, option: str) -> ModelInput:
    """The model of an earlier step, as an option of a later one names it.

    Raises:
        InputError: it is an adapter, where a whole model is needed.
    """
    if not is_teacher(option) and is_adapter(made.step.options):
        whole = "merge: true makes a whole model there"
        if is_quantized(made.config):
            whole = "it belongs to a quantized one; go on from the model before that"
        raise InputError(f"{made.step.name} makes an adapter, and this starts from a whole model; {whole}")
    return ModelInput(made.step.name, made.config, str(made.folder), made.tokenizer_location, made.fingerprint, True)


def check_fetched(plan: Plan, planned: PlannedStep) -> None:
    """Look at the weights of a step's models from the Hub, which were not here when it was planned.

    Raises:
        InputError: they are not those of their config, or lack a head that is needed.
    """
    problems: list[str] = []
    for option, reference in zip(planned.inputs, planned.parents, strict=True):
        source = plan.sources.get(reference)
        if source is None or (option == "model" and planned.step.given.get("from_scratch")):
            continue
        new_head = not is_teacher(option) and not VERBS[planned.step.run].needs_head
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
) -> dict[str, Any]:
    """Options, inputs and rows as step.json says them."""
    parents = [model.reference for model in inputs.values()]
    found: dict[str, Any] = {
        "run": step.run,
        "parents": parents,
        "sources": {name: sources[name].revision for name in parents if name in sources},
        "options": resolved_options(step),
    }
    if data is not None:
        found |= {"task": data.task.name, "kind": data.task.kind, "text": data.task.text}
        found |= {"labels": data.task.label_names, "data": asdict(recipe.data), "data_revision": data.revision}
        found |= {"rows": {split: len(rows) for split, rows in data.splits.items()}}
    return json.loads(json.dumps(found, default=str))


def resolved_options(step: Step) -> dict[str, Any]:
    """The options of a step, defaults too, without tokens and without its folder."""
    resolved = VERBS[step.run].resolved(step.options)
    return {key: value for key, value in resolved.items() if not key.endswith("_token") and key != "output_dir"}
