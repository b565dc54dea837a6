"""A temperature folded into a model's head: other probabilities, the same labels, and nothing else to know."""

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.errors import InputError


def fold_temperature(model: PreTrainedModel, temperature: float) -> PreTrainedModel:
    """Divide a classifier's logits by a temperature, in the weight and bias of its output layer (Guo et al. 2017).

    Args:
        model: is changed; its output layer is a plain linear one in float32, as rounding a scaled one in bfloat16
            could change labels.
        temperature: above 0; above 1 makes the model less sure.

    Raises:
        InputError: no such layer.
    """
    head = _output_layer(model)
    with torch.no_grad():
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                parameter.div_(temperature)
    return model


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer with an output for each label."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not layers or type(layers[-1]) is not nn.Linear or layers[-1].weight.dtype != torch.float32:
        raise InputError(
            f"calibrate: {type(model).__name__} has no plain output layer in float32 that a temperature could go into"
        )
    return layers[-1]
