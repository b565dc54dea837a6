"""Quantized modules in the places of a model's float ones, before there are weights in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.private_names import untie
from distill.compression.quantization.embeddings import Int8Embedding, Nf4Embedding, TiedLinear
from distill.compression.quantization.layers import FourBitLinear, Int8Linear

if TYPE_CHECKING:
    from distill.compression.quantization.formats import Format, QuantizationSettings
    from distill.compression.quantization.loading import DistillQuantizationConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def empty_module(
    module: Any, format: Format, settings: QuantizationSettings | DistillQuantizationConfig, dtype: torch.dtype
) -> Any:
    """The quantized counterpart of a linear layer or embedding, to be filled; it shares the bias."""
    if isinstance(module, nn.Embedding):
        shape = module.num_embeddings, module.embedding_dim
        if format == "int8":
            return Int8Embedding(*shape, dtype)
        return Nf4Embedding(*shape, dtype, double_quant=settings.double_quant, block_size=settings.block_size)
    out_features, in_features = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    if format == "int8":
        return Int8Linear(in_features, out_features, module.bias, threshold=settings.threshold)
    return FourBitLinear(
        in_features,
        out_features,
        module.bias,
        format=format,
        double_quant=settings.double_quant,
        block_size=settings.block_size,
        compute_dtype=DTYPES[settings.compute_dtype],
    )


def tie_output(model: PreTrainedModel, head: str | None) -> None:
    """Let an output layer compute with the quantized word embeddings."""
    if head is not None:
        model.set_submodule(head, TiedLinear(model.get_input_embeddings(), model.get_submodule(head).bias))
        untie(model, f"{head}.weight")  # nothing is left for transformers to tie


def resolve_name(name: str, modules: Mapping[str, nn.Module], prefix: str) -> str | None:
    """The name of a module in a model of the same family, with another head or none; None where it lacks it.

    Args:
        prefix: the base model's, such as `bert`.
    """
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in modules), None)
