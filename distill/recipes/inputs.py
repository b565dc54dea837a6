"""The models from outside a recipe that it names: what its steps start from, and what the report compares with."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data.fingerprints import tokenizer_fingerprint
from distill.data.load import Data
from distill.errors import InputError, near_name
from distill.models.load import ModelSource, find_model, fit_to_tokenizer, label_order, load_processor, size_on_disk
from distill.models.replacements import is_quantized
from distill.models.weights import fit_problems, no_head_message
from distill.recipes.recipe import Recipe
from distill.recipes.stored_models import has_head, stored_fit, weights_to_train
from distill.training.teachers import FROM_DATA
from distill.verbs.all import VERBS
from distill.verbs.base import ModelInput
from distill.verbs.references import is_teacher, referenced_models, teachers_of


def resolve_outside(
    option: str,
    reference: str,
    step_name: str,
    recipe: Recipe,
    data: Data | None,
    sources: dict[str, ModelSource],
) -> ModelInput:
    """Find the model from outside the recipe that an option of a step names, and check that it is what the step needs.

    Args:
        option: a key of `referenced_models`.
        reference: what the option says: a folder, `package:…`, or a Hub id.
        step_name: of the step.
        recipe: may be a draft; its other steps' names are compared with a reference that is not found.
        data: None where it can't be read, and then no label is checked.
        sources: the model's source is added here.

    Raises:
        InputError: it can't be found, or lacks what the step needs of it.
    """
    given = recipe.given[step_name]
    weights = is_teacher(option) or not given.get("from_scratch", False)
    others = [name for name in recipe.given if name != step_name]
    source = _find_outside(reference, others, sources, weights=weights, adapters=is_teacher(option))
    trained, notes = True, []
    if needs_head(option, given["run"]):
        problems = _classifier_problems(source, data, _label_map(given, given["run"]))
        if problems:
            raise InputError(*problems)
        if data is not None:
            notes = stored_fit(source, data.task, new_head=False)[1]
    elif data is not None:
        trained = has_head(source, data.task)
        notes = weights_to_train(source, data.task) if weights else []
    kind = data.task.kind if data is not None else None
    processor = load_processor(source.location, kind)
    config = copy.deepcopy(source.config)
    if isinstance(processor, PreTrainedTokenizerBase):
        fit_to_tokenizer(config, processor, reference)
    fingerprint = f"{source.fingerprint} {tokenizer_fingerprint(processor)}"
    quantized = is_quantized(config)
    return ModelInput(
        reference,
        config,
        source.location,
        source.location,
        fingerprint,
        has_head=trained,
        weight_bytes=size_on_disk(Path(source.location)) if quantized else None,
        notes=tuple(notes),
    )


def _find_outside(
    reference: str,
    steps: list[str],
    sources: dict[str, ModelSource],
    *,
    weights: bool = True,
    adapters: bool = False,
    exports: bool = False,
) -> ModelSource:
    """Find a model from outside, and keep it in `sources`; a mistyped step's name is told without asking the Hub."""
    if reference not in sources or (sources[reference].base is not None and not adapters):
        near = near_name(reference, steps, similarity=0.75)
        if near and "/" not in reference and not Path(reference).exists():
            raise InputError(f"no step {reference!r}; did you mean {near!r}?")
        try:
            sources[reference] = find_model(reference, weights=weights, adapters=adapters, exports=exports)
        except InputError as error:
            others = f" (steps: {', '.join(steps)})" if steps else ""
            raise InputError(*(f"{problem}{others}" for problem in error.problems)) from None
    return sources[reference]


def _classifier_problems(source: ModelSource, data: Data | None, label_map: dict[str, str] | None) -> list[str]:
    """List what keeps a model from outside from being used as it is: no trained head, or other labels."""
    if data is None:
        return []
    fit, _ = stored_fit(source, data.task, new_head=False)
    problems = [] if fit is None else fit_problems(fit, data.task.kind, new_head=False)
    if problems:
        return [f"{source.reference}: {problem}" for problem in problems]
    if not has_head(source, data.task):
        return [f"{source.reference} {no_head_message([(source.config.architectures or ['its class'])[0]])}"]
    try:
        label_order(source.config, data.task, label_map, where=source.reference)
    except InputError as error:
        return list(error.problems)
    return []


def baseline_problems(
    baseline: str,
    label_map: dict[str, str] | None,
    recipe: Recipe,
    data: Data | None,
    sources: dict[str, ModelSource],
) -> list[str]:
    """List what is wrong with a baseline that is no step.

    Args:
        baseline: a folder, `package:…`, or a Hub id.
        label_map: the model's label names → the task's; None where they are alike.
        recipe: may be a draft; its steps' names are compared with a reference that is not found.
        data: None where it can't be read, and then no label is checked.
        sources: the model's source is added here.
    """
    try:
        return _classifier_problems(
            _find_outside(baseline, list(recipe.given), sources, adapters=True, exports=True), data, label_map
        )
    except InputError as error:
        return list(error.problems)


def default_baseline(recipe: Recipe, data: Data | None, sources: dict[str, ModelSource]) -> str:
    """Choose the baseline where a recipe names none: the first teacher, else the first step's input, else the first
    step.

    Args:
        recipe: without problems.
        data: None where it can't be read, and then no label is checked.
        sources: of the models from outside, by reference; an input without a head for the task can be no baseline.
    """
    steps = list(recipe.steps.values())
    for step in steps:
        teachers = [name for name in teachers_of(step.given) if name != FROM_DATA]
        if teachers:
            return teachers[0]
    source = sources.get(str(steps[0].options.model))
    if source is None or _classifier_problems(source, data, label_map_of(recipe, source.reference)):
        return steps[0].name
    return source.reference


def label_map_of(recipe: Recipe, reference: str) -> dict[str, str] | None:
    """Find the label map that a recipe gives to a model: that of the first step that takes it with its head.

    Args:
        recipe: its steps take a model with its head as a teacher, or to quantize it.
        reference: the model, as the steps name it.
    """
    for step in recipe.steps.values():
        for option, named in referenced_models(step.given).items():
            if named == reference and needs_head(option, step.run):
                return _label_map(step.given, step.run)
    return None


def needs_head(option: str, run: str) -> bool:
    """Tell whether the model that an option of a verb names must have a head trained for the task.

    Args:
        option: a key of `referenced_models`; `teacher 2` is a value of `teacher`.
        run: the verb.
    """
    return option.partition(" ")[0] in VERBS[run].needs_head


def _label_map(given: Mapping[str, Any], run: str) -> dict[str, str] | None:
    """The label map that a step's options give to the models that it takes with their heads."""
    option = VERBS[run].label_map
    return None if option is None else given.get(option)
