"""Load the models that are scored and timed: into torch, or, of exports, into their engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from distill.common.private_names import model_from_config, set_attention_of_config
from distill.errors import InputError
from distill.export.record import ENGINES
from distill.export.runtime import ExportedModel, load_exported
from distill.models.adapters import with_stored_adapters
from distill.models.description import entries_in
from distill.models.folders import is_export
from distill.models.labels import label_order, set_labels
from distill.models.load import base_folder, load_classifier, load_config, saved_class
from distill.models.replacements import put_structure, structure_of, without_replacements
from distill.models.weights import load_weights
from distill.tasks.base import Task
from distill.tasks.kinds import KINDS


def load_scored(
    location: str, task: Task, *, label_map: Mapping[str, str] | None = None
) -> PreTrainedModel | ExportedModel:
    """Load a trained model whose outputs stand in the order of the task's labels; an export with torch's threads.

    Args:
        location: folder or Hub id; of an export a folder.
        task: whose labels it predicts.
        label_map: the model's label names → the task's, where they differ.

    Raises:
        InputError: as `load_classifier` and `load_exported`, or an export of another kind of model.
    """
    if not is_export(Path(location)):
        return load_classifier(location, task, label_map=label_map)
    model = _in_its_engine(location)
    architecture, endings = model.record.architecture, KINDS[task.kind].architectures
    if not architecture.endswith(endings):
        raise InputError(f"{location}: is an export of {architecture}; {task.kind} is scored with …{endings[0]}")
    order = label_order(model.config, task, label_map, where=location)
    if order is not None:
        model.reorder_labels(order)
    set_labels(model.config, task)
    return model


def load_timed(location: str) -> PreTrainedModel | ExportedModel:
    """Load a model in the class that it was saved as; an export with torch's threads.

    Args:
        location: folder or Hub id; of an export a folder.

    Raises:
        InputError: weights that are not those of its config, or an engine that is not installed.
    """
    if is_export(Path(location)):
        return _in_its_engine(location)
    config, base = load_config(location), base_folder(Path(location), weights=True)
    model, fit = load_weights(str(base or location), saved_class(location, config), config, "auto")
    if fit.problem is not None:
        raise InputError(f"{location}: {fit.problem}")
    return model if base is None else with_stored_adapters(model, Path(location))


def skeleton_of(model: PreTrainedModel | ExportedModel) -> PreTrainedModel:
    """Build the unquantized model on meta: its parameters and operations without its weights.

    Args:
        model: as `load_timed` gives it; the skeleton of an export is that of the model that was exported.
    """
    if isinstance(model, ExportedModel):
        made_by, structure = getattr(transformers, model.record.architecture), entries_in(model.record.structure)
    else:
        made_by, structure = type(model), structure_of(model.config)
    plain_config = without_replacements(model.config)
    set_attention_of_config(plain_config, "eager")  # matrix products that the FLOP counter sees
    with torch.device("meta"):
        return put_structure(model_from_config(made_by, plain_config), structure)


def engine_of(model: PreTrainedModel | ExportedModel) -> tuple[str, int | None]:
    """Name what computes a model (`torch`, or an inference engine), and the threads that it has on the CPU.

    Args:
        model: on its device, where it computes; no threads are told of one on another.
    """
    if isinstance(model, ExportedModel):
        return model.record.engine, model.threads
    return "torch", torch.get_num_threads() if model.device.type == "cpu" else None


def engine_versions(names: Collection[str] = ENGINES) -> dict[str, str]:
    """List the versions of inference engines, of those that are installed.

    Args:
        names: of the engines; torch is none of them.
    """
    return {name: version(name) for name in ENGINES if name in names and find_spec(name) is not None}


def _in_its_engine(location: str) -> ExportedModel:
    return load_exported(location, threads=torch.get_num_threads())
