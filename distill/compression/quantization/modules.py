"""Quantized modules in the places of a model's float ones, before there are weights in them."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.private_names import untie
from distill.compression.quantization.embeddings import Int8Embedding, Nf4Embedding, TiedLinear
from distill.compression.quantization.layers import FourBitLinear, Int8Linear
from distill.compression.replacements import FourBit, Int8

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def empty_module(module: Any, replacement: Int8 | FourBit, dtype: torch.dtype) -> Any:
    """The quantized counterpart of a linear layer or embedding, to be filled; it shares the bias.

    Args:
        dtype: of an embedding's rows.
    """
    if isinstance(module, nn.Embedding):
        shape = module.num_embeddings, module.embedding_dim
        if isinstance(replacement, Int8):
            return Int8Embedding(*shape, dtype)
        return Nf4Embedding(*shape, dtype, double_quant=replacement.double_quant, block_size=replacement.block_size)
    out_features, in_features = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    if isinstance(replacement, Int8):
        return Int8Linear(in_features, out_features, module.bias, threshold=replacement.threshold)
    return FourBitLinear(
        in_features,
        out_features,
        module.bias,
        format=replacement.kind,
        double_quant=replacement.double_quant,
        block_size=replacement.block_size,
        compute_dtype=DTYPES[replacement.compute_dtype],
    )


def tie_output(model: PreTrainedModel, head: str) -> None:
    """Let an output layer compute with the quantized word embeddings.

    Args:
        model: is changed; its word embeddings are quantized already.
        head: name of the output layer.
    """
    model.set_submodule(head, TiedLinear(model.get_input_embeddings(), model.get_submodule(head).bias))
    untie(model, f"{head}.weight")  # nothing is left for transformers to tie
