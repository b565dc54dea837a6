"""Check that a model is what a step needs before it runs: by the headers of its weight files, and on meta."""

import copy
from pathlib import Path

from distill.errors import InputError
from distill.models.load import (
    ModelSource,
    model_class,
    set_labels,
)
from distill.models.weights import (
    Fit,
    fit_of,
    fit_problems,
    plain_names,
    prefix_note,
    readable_on_meta,
    stored_shapes,
    weight_files,
    with_head_of_adapters,
)
from distill.tasks.base import Task
from distill.tasks.kinds import KINDS


def has_head(source: ModelSource, task: Task) -> bool:
    """Tell whether a model was saved with a head for a kind of task, by the name of its class and by its weights.

    Args:
        source: of the model; of one whose weights are still on the Hub the name alone is known.
        task: whose kind and labels the head must fit.

    Raises:
        InputError: as `stored_fit`.
    """
    architecture = (source.config.architectures or [""])[0]
    named = architecture.endswith(KINDS[task.kind].architectures)
    of_another_kind = not named and ("For" in architecture or architecture.endswith("LMHeadModel"))
    fit, _ = stored_fit(source, task, new_head=False)
    if fit is None:
        return named or not architecture  # it is looked at again when its weights are here
    return not of_another_kind and not (fit.new_head or fit.reshaped_head)


def stored_fit(source: ModelSource, task: Task, *, new_head: bool) -> tuple[Fit | None, list[str]]:
    """Compare a model's stored weights with its config, by their files' headers alone.

    Args:
        source: of the model.
        task: whose head the model has, or gets.
        new_head: whether the model gets the task's head; a head of another shape is then drawn anew.

    Returns:
        The fit (None of weights that are still on the Hub, or that another package quantized), and notes on it.

    Raises:
        InputError: files that are broken, or a family without models for the task.
    """
    config, files = source.config, weight_files(Path(source.base or source.location))
    if not files or not readable_on_meta(config):
        return None, []
    if new_head:
        config = copy.deepcopy(config)
        set_labels(config, task)
    chosen, stored = model_class(config, task.kind), stored_shapes(files)
    names = plain_names(stored, chosen, config)
    fit = fit_of(stored, chosen, config, names)
    if source.base is not None:
        fit = with_head_of_adapters(fit, Path(source.location))
    note = prefix_note(names)
    notes = [*([note] if note is not None else []), *(fit.notes if new_head else [])]
    return fit, [f"{source.reference}: {each}" for each in notes]


def weights_to_train(source: ModelSource, task: Task) -> list[str]:
    """Check the weights that a training starts from.

    Args:
        source: of the model.
        task: whose head it gets.

    Returns:
        Notes on the weights: on what is drawn anew, and on names that are read otherwise.

    Raises:
        InputError: they are not those of the model's config, its head aside.
    """
    fit, notes = stored_fit(source, task, new_head=True)
    problems = [] if fit is None else fit_problems(fit, task.kind, new_head=True)
    if problems:
        raise InputError(*(f"{source.reference}: {problem}" for problem in problems))
    return notes
