"""Training mode, evaluation mode and attention of models for the length of a block, then as they were before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from distill.common.private_names import attention_of_config


@contextmanager
def modes_kept(models: Sequence[nn.Module]) -> Iterator[None]:
    """Restore whether each module is in training or in evaluation mode."""
    before = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; modules that were in training mode are so again afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


_LONGEST_EAGER = 128


@contextmanager
def attention_of(models: Sequence[PreTrainedModel | PeftModel], implementation: str) -> Iterator[None]:
    """Compute the attention of models by another implementation; each has its own again afterwards.

    Args:
        models: any number.
        implementation: transformers' name of it (`eager`, `sdpa`).
    """
    before = [attention_of_config(model.config) for model in models]
    try:
        for model in models:
            _set_attention(model, implementation)
        yield
    finally:
        for model, attention in zip(models, before, strict=True):
            _set_attention(model, attention)


@contextmanager
def fast_attention(models: Sequence[PreTrainedModel | PeftModel], longest: int, device: torch.device) -> Iterator[None]:
    """Compute plain attention on the CPU where rows are short enough for it to be faster.

    torch's fused attention takes twice as long in training for short rows there (recipes/README.md); for long ones it
    saves memory. The models have their own attention again afterwards.

    Args:
        models: those with fused attention are changed.
        longest: tokens of the longest row.
        device: that computes.
    """
    plain_is_faster = device.type == "cpu" and longest <= _LONGEST_EAGER
    fused = [model for model in models if plain_is_faster and attention_of_config(model.config) == "sdpa"]
    with attention_of(fused, "eager"):
        yield


def _set_attention(model: PreTrainedModel | PeftModel, implementation: str) -> None:
    if attention_of_config(model.config) != implementation:
        model.set_attn_implementation(implementation)
