"""The structure of a model: its blocks, its width and depth, the inputs that it takes."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from distill.errors import InputError
from distill.tasks.outputs import plain_model
from distill.tasks.targets import SPAN_LABELS

LayerPairs = dict[str, list[tuple[int, int]]]
"""For each loss that matches layers, its (student, teacher) pairs; 0 is the embeddings."""

_WIDTH_UNKNOWN = 384  # MobileNetV2 tells none; it decides a default learning rate alone


def width_of(config: PretrainedConfig) -> int:
    """Give the size of a model's hidden states, of the last ones where they grow (convolutional networks)."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else getattr(config, "hidden_size", _WIDTH_UNKNOWN)


def depth_of(config: PretrainedConfig) -> int:
    """Count the transformer blocks of a model; 0 for convolutional networks, which have none."""
    return getattr(config, "num_hidden_layers", 0)


def input_names(model: PreTrainedModel) -> list[str]:
    """List the arguments of a model's forward, labels aside."""
    parameters = inspect.signature(plain_model(model).forward).parameters
    return [name for name in parameters if name not in ("labels", *SPAN_LABELS)]


def accepted_inputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the inputs that the model takes, labels aside (DistilBERT has no `token_type_ids`, but swallows them).

    Args:
        model: plain, or in PEFT's wrapper.
        inputs: of a batch.
    """
    names = input_names(model)
    return {name: value for name, value in inputs.items() if name in names}


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the name and the list of the model's transformer blocks.

    Raises:
        InputError: they don't stand in one `ModuleList`.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__}: its blocks don't stand in one ModuleList, so no layers can be chosen"
        )
    return found[0]
