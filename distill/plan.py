"""Resolve a recipe against its data and models without training: every problem at once, and what steps will make."""

import ast
import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from distill.data import Data, load_data, tokenizer_fingerprint
from distill.errors import InputError
from distill.models import ModelSource, find_model, label_order, load_tokenizer, no_head_message, set_labels
from distill.recipe import Recipe, Step
from distill.steps import DistillOptions, FinetuneOptions, Options, QuantizeOptions, chosen_layers
from distill.student import student_config
from distill.trainer import resolve_layer_map

# The code that decides what a step makes; a change in it reruns the step.
_TRAINING_CODE = ("readers", "data", "tasks", "models", "student", "losses", "trainer", "steps")
_CODE = {"finetune": _TRAINING_CODE, "distill": _TRAINING_CODE, "quantize": ("models", "student", "quantize", "steps")}

# Options that change what is shown or kept while a step runs, and not what it makes.
_NOT_IN_FINGERPRINT = {
    *("logging_strategy", "logging_steps", "logging_first_step", "report_to", "run_name", "project", "disable_tqdm"),
    *("log_level", "log_level_replica", "log_on_each_node", "save_strategy", "save_steps", "save_total_limit"),
    *("save_on_each_node", "per_device_eval_batch_size", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_prefetch_factor", "push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_private_repo"),
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
    """0-based source layers that seed the student; None for a step that keeps all."""
    layer_pairs: tuple[tuple[int, int], ...] | None
    """(student, teacher) hidden states that a distill step matches."""
    fingerprint: str


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


def make_plan(recipe: Recipe) -> Plan:
    """Resolve everything.

    Raises:
        InputError: with every problem of data, models, layers and labels.
    """
    problems: list[str] = []
    where = str(recipe.path)
    try:
        data = load_data(recipe.task, recipe.data)
    except InputError as error:
        problems += [f"{where}: {problem}" for problem in error.problems]
        data = None
    sources: dict[str, ModelSource] = {}
    planned: dict[str, PlannedStep] = {}
    failed: set[str] = set()
    for step in recipe.steps.values():
        try:
            planned[step.name] = _plan_step(step, recipe, data, planned, failed, sources)
        except _Unplannable as error:
            failed.add(step.name)
            problems += [f"{where}: {problem}" for problem in error.problems]
    baseline = recipe.baseline or _default_baseline(recipe, sources)
    if baseline not in recipe.steps and not problems:
        try:
            sources[baseline] = sources.get(baseline) or find_model(baseline)
            problems += _classifier_problems(sources[baseline], data, _teacher_label_map(recipe, baseline))
        except InputError as error:
            problems += [f"{problem} (the steps are {', '.join(recipe.steps)})" for problem in error.problems]
        problems = [f"{where}: baseline: {problem}" for problem in problems]
    if problems or data is None:
        raise InputError(*problems)
    return Plan(recipe, data, planned, baseline, _teacher_label_map(recipe, baseline), sources)


class _Unplannable(Exception):
    def __init__(self, problems: Sequence[str]):
        self.problems = problems


@dataclass(frozen=True)
class _Input:
    """A model that a step starts from."""

    reference: str
    config: PretrainedConfig
    location: str
    tokenizer_location: str
    fingerprint: str


def _plan_step(
    step: Step,
    recipe: Recipe,
    data: Data | None,
    planned: dict[str, PlannedStep],
    failed: set[str],
    sources: dict[str, ModelSource],
) -> PlannedStep:
    """One step; raises `_Unplannable` with its problems (none of its own where an input has failed already)."""
    options = step.options
    problems: list[str | None] = []
    inputs: dict[str, _Input] = {}
    for option in [name for name in ("teacher", "model") if getattr(options, name, None) is not None]:
        reference = getattr(options, option)
        if reference in failed:
            problems.append(None)  # told already
        elif reference in recipe.steps and reference not in planned:
            problems.append(f"{option}: {reference!r} is not an earlier step; a step refers to steps above it")
        else:
            try:
                inputs[option] = _resolve_input(option, reference, options, data, planned, sources)
            except InputError as error:
                problems += [f"{option}: {problem}" for problem in error.problems]
    if problems:
        raise _Unplannable([f"steps.{step.name}.{problem}" for problem in problems if problem])

    source_option = "model" if "model" in inputs else "teacher"
    source = inputs[source_option]
    config, layers, layer_pairs = copy.deepcopy(source.config), None, None
    try:
        if isinstance(options, FinetuneOptions | DistillOptions):
            layers = tuple(chosen_layers(options, config.num_hidden_layers))
            config = student_config(config, options.student_arch, list(layers))
        if isinstance(options, DistillOptions) and options.hidden_weight:
            num_teacher_layers = inputs["teacher"].config.num_hidden_layers
            layer_pairs = tuple(resolve_layer_map(options.layer_map, config.num_hidden_layers, num_teacher_layers))
    except InputError as error:
        problems += error.problems
    if len({tokenizer_fingerprint(load_tokenizer(model.tokenizer_location)) for model in inputs.values()}) > 1:
        problems.append("model: its tokenizer is not the teacher's, so they would read different tokens")
    for option, model in inputs.items():
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and recipe.data.max_length > longest:
            problems.append(
                f"{option}: takes at most {longest} tokens, but data.max_length is {recipe.data.max_length}"
            )
    if getattr(config, "quantization_config", None) is not None:
        problems.append(f"{source_option}: {source.reference} is quantized; start from the model it was made from")
    if problems:
        raise _Unplannable([f"steps.{step.name}.{problem}" for problem in problems])
    if data is not None:
        set_labels(config, data.task)
    if isinstance(options, QuantizeOptions):
        config.quantization_config = {"format": options.format}
    return PlannedStep(
        step=step,
        folder=recipe.output_dir / step.name,
        inputs={option: model.location for option, model in inputs.items()},
        parents=tuple(model.reference for model in inputs.values()),
        config=config,
        tokenizer_location=source.tokenizer_location,
        layers=layers,
        layer_pairs=layer_pairs,
        fingerprint=_fingerprint(step, {option: model.fingerprint for option, model in inputs.items()}, data),
    )


def _resolve_input(
    option: str,
    reference: str,
    options: Options,
    data: Data | None,
    planned: dict[str, PlannedStep],
    sources: dict[str, ModelSource],
) -> _Input:
    """The earlier step, or else the model from outside, that an option names."""
    if reference in planned:
        made = planned[reference]
        return _Input(reference, made.config, str(made.folder), made.tokenizer_location, made.fingerprint)
    try:
        source = sources[reference] = sources.get(reference) or find_model(reference)
    except InputError as error:
        earlier = f" (earlier steps: {', '.join(planned)})" if planned else ""
        raise InputError(*(f"{problem}{earlier}" for problem in error.problems)) from None
    if option == "teacher" or isinstance(options, QuantizeOptions):
        label_map = options.teacher_label_map if isinstance(options, DistillOptions) else options.label_map
        problems = _classifier_problems(source, data, label_map)
        if problems:
            raise InputError(*problems)
    fingerprint = f"{source.fingerprint} {tokenizer_fingerprint(load_tokenizer(source.location))}"
    return _Input(reference, source.config, source.location, source.location, fingerprint)


def _classifier_problems(source: ModelSource, data: Data | None, label_map: dict[str, str] | None) -> list[str]:
    """What keeps a model from outside from being used as it is: no trained head, or other labels."""
    architecture = (source.config.architectures or ["its architecture"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        return [f"{source.reference} {no_head_message([architecture])}"]
    if data is None:
        return []
    try:
        label_order(source.config, data.task, label_map, where=source.reference)
    except InputError as error:
        return list(error.problems)
    return []


def _default_baseline(recipe: Recipe, sources: dict[str, ModelSource]) -> str:
    """The first distill step's teacher, else the first step's input, or the first step where that has no head yet."""
    steps = list(recipe.steps.values())
    for step in steps:
        if isinstance(step.options, DistillOptions):
            return step.options.teacher
    source = sources.get(str(steps[0].options.model))
    if source is None or _classifier_problems(source, None, None):
        return steps[0].name
    return source.reference


def _teacher_label_map(recipe: Recipe, teacher: str) -> dict[str, str] | None:
    """The label map of the distill step that has this model as its teacher."""
    options = [step.options for step in recipe.steps.values()]
    maps = [o.teacher_label_map for o in options if isinstance(o, DistillOptions) and o.teacher == teacher]
    return maps[0] if maps else None


def _fingerprint(step: Step, inputs: dict[str, str], data: Data | None) -> str:
    """Of everything that decides what the step makes: options, inputs, rows and code."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(type(step.options))
    }
    changed = {
        key: value for key, value in step.given.items() if value != defaults[key] and key not in _NOT_IN_FINGERPRINT
    }
    for name in ("teacher", "model"):
        changed.pop(name, None)  # their fingerprints stand for them
    if data is None:
        rows: Any = None
    elif isinstance(step.options, QuantizeOptions):
        rows = [data.task.label_names, data.max_length]
    else:
        rows = data.fingerprint if step.options.load_best_model_at_end else data.train_fingerprint
    code = [code_fingerprint(module) for module in _CODE[step.run]]
    identity = json.dumps([step.run, changed, inputs, rows, code], sort_keys=True, default=str)
    return hashlib.sha256(identity.encode()).hexdigest()


@cache
def code_fingerprint(module: str) -> str:
    """Of a module of this package, comments, docstrings and layout aside."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
