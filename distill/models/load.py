"""Load a model that a recipe names: its weights, in the class for the task and with the task's label order."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from distill.common.sources import reason_of
from distill.errors import InputError
from distill.models.adapters import with_stored_adapters
from distill.models.folders import (
    ModelSource,
    base_folder,
    fetch_weights,
    find_model,
    load_config,
    size_on_disk,
)
from distill.models.labels import label_order, set_labels
from distill.models.processors import (
    POSITIONS_AFTER_PADDING,
    fit_to_tokenizer,
    holds_tokenizer,
    load_processor,
    load_tokenizer,
)
from distill.models.replacements import put_structure, structure_of, without_replacements
from distill.models.weights import (
    fit_of,
    fit_problems,
    load_weights,
    on_meta,
    plain_names,
    readable_on_meta,
    refuse_not_finite,
    stored_shapes,
    weight_files,
    with_head_of_adapters,
)
from distill.tasks.base import Task, TaskKind
from distill.tasks.kinds import KINDS

__all__ = [
    "ModelSource",
    "auto_class",
    "base_folder",
    "fetch_weights",
    "find_model",
    "fit_to_tokenizer",
    "from_config",
    "label_order",
    "load_classifier",
    "load_config",
    "load_for_finetuning",
    "load_processor",
    "load_tokenizer",
    "longest_input",
    "model_class",
    "saved_class",
    "set_labels",
    "size_on_disk",
]

logger = logging.getLogger(__name__)


def auto_class(kind: TaskKind) -> Any:
    """The Auto class that loads models for a kind of task."""
    return getattr(transformers, KINDS[kind].auto_class)


def load_classifier(
    location: str,
    task: Task,
    *,
    label_map: Mapping[str, str] | None = None,
    dtype: torch.dtype | str = "auto",
    merge: bool = False,
) -> PreTrainedModel:
    """Load a trained model whose outputs stand in the order of the task's labels.

    Args:
        location: folder or Hub id.
        task: whose labels it predicts.
        label_map: the model's label names → the task's, where they differ.
        dtype: of the weights; the stored one by default.
        merge: add adapters to the weights, so that layers can be taken from it.

    Raises:
        InputError: the labels differ, the weights are not those of its config or not finite, or the head has none.
    """
    config = load_config(location)
    order = label_order(config, task, label_map, where=location)
    _read_tokenizer(config, location, task.kind)
    base = base_folder(Path(location), weights=True)
    model, fit = load_weights(str(base or location), model_class(config, task.kind), config, dtype)
    if base is not None:
        model = with_stored_adapters(model, Path(location), merge=merge)
        fit = with_head_of_adapters(fit, Path(location))
    problems = fit_problems(fit, task.kind, new_head=False)
    if problems:
        raise InputError(*(f"{location}: {problem}" for problem in problems))
    refuse_not_finite(model, location)
    if order is not None:
        _permute_head(model, order)
    set_labels(model.config, task)
    return model.eval()


def load_for_finetuning(location: str, task: Task, *, from_scratch: bool = False) -> PreTrainedModel:
    """Load a pretrained model with a head for the task in float32; a head that is missing or of another shape is new.

    What is new is drawn from torch's global generator: seed it first.

    Args:
        location: folder or Hub id.
        task: whose labels it will predict.
        from_scratch: all of it is new.

    Raises:
        InputError: the weights are not those of its config, its head aside, or not finite.
    """
    config = load_config(location)
    set_labels(config, task)
    _read_tokenizer(config, location, task.kind)
    if from_scratch:
        return from_config(config, task.kind)
    model, fit = load_weights(location, model_class(config, task.kind), config, torch.float32)
    problems = fit_problems(fit, task.kind, new_head=True)
    if problems:
        raise InputError(*(f"{location}: {problem}" for problem in problems))
    for note in fit.notes:
        logger.warning("%s: %s", location, note)
    refuse_not_finite(model, location)
    return model


def _read_tokenizer(config: PretrainedConfig, location: str, kind: TaskKind) -> None:
    """Fit a config to the tokenizer that lies beside it, if one does."""
    if KINDS[kind].reads != "images" and holds_tokenizer(location):
        fit_to_tokenizer(config, load_tokenizer(location), location)


def model_class(config: PretrainedConfig, kind: TaskKind) -> type[PreTrainedModel]:
    """Find the class of models of a config for a kind of task.

    Args:
        config: of the model, whose family decides.
        kind: of the task, whose head the class has.

    Raises:
        InputError: its family has none.
    """
    try:
        with on_meta():
            return type(from_config(config, kind))
    except ValueError as error:
        raise InputError(f"{config.model_type} makes no model for {kind} ({reason_of(error)})") from error


def saved_class(location: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """Find the class that a model was saved as: the one in its config, or else the first that all its weights fit.

    Args:
        location: the model's folder.
        config: of the model.

    Raises:
        InputError: weight files that are broken.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        return named
    stored = stored_shapes(weight_files(Path(location))) if readable_on_meta(config) else {}
    for kind in KINDS if stored else ():
        with contextlib.suppress(InputError):  # a family without models for this kind
            chosen = model_class(config, kind)
            fit = fit_of(stored, chosen, config, plain_names(stored, chosen, config))
            if not (fit.problem or fit.untrained or fit.unread):
                return chosen
    with on_meta():
        return type(transformers.AutoModel.from_config(config, trust_remote_code=False))


def from_config(config: PretrainedConfig, kind: TaskKind) -> PreTrainedModel:
    """Make a float32 model of a config with new weights (from torch's global generator), none of them quantized.

    Args:
        config: of the model; modules of other sizes that it describes are put in.
        kind: of the task, whose head the model gets.
    """
    copied = without_replacements(config)
    copied.architectures = copied.architectures or []  # DeiT has two heads, and `from_config` looks here which is meant
    model = auto_class(kind).from_config(copied, dtype=torch.float32, trust_remote_code=False)
    return put_structure(model, structure_of(config))


def longest_input(config: PretrainedConfig) -> int | None:
    """Give the most tokens that the model's position embeddings hold; None where they set no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or config.model_type not in POSITIONS_AFTER_PADDING:
        return positions
    return positions - config.pad_token_id - 1


def _permute_head(model: PreTrainedModel, order: list[int]) -> None:
    """Reorder the rows of the last linear layer, so that logits and label names follow `order`."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(order)]
    if not heads:
        raise InputError(f"{type(model).__name__}: no output layer found whose labels could be reordered")
    head = heads[-1]
    with torch.no_grad():
        head.weight.copy_(head.weight[order].clone())
        if head.bias is not None:
            head.bias.copy_(head.bias[order].clone())
