"""Quantize to 8 or 4 bit with bitsandbytes, embeddings included, so that the folder reloads bit for bit.

`import distill` registers the formats with transformers; after it, a plain `AutoModel….from_pretrained` loads them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.private_names import finish_loading
from distill.compression.loading import DistillQuantizer
from distill.compression.quantization.formats import (
    Format,
    FormatOrBf16,
    QuantizationSettings,
    choose_formats,
)
from distill.compression.quantization.gptq import compensate
from distill.compression.quantization.modules import DTYPES, empty_module, tie_output
from distill.compression.replacements import Tied, quantized_as
from distill.errors import InputError
from distill.models.adapters import on_another_base
from distill.models.description import describe, grouped
from distill.models.modes import evaluating
from distill.models.replacements import is_quantized, structure_of
from distill.models.weights import refuse_not_finite


def quantize_model(
    model: PreTrainedModel | PeftModel,
    settings: QuantizationSettings | None = None,
    *,
    format: FormatOrBf16 | None = None,
    double_quant: bool | None = None,
    calibration: Sequence[Mapping[str, Tensor]] | None = None,
) -> PreTrainedModel | PeftModel:
    """Quantize a model in place and return it, ready for `save_pretrained`.

    The linear layers inside the transformer blocks go to `format`, the embeddings by default to int8 with a scale per
    row (they are two thirds of a small BERT). Heads, the pooler, layer norms, biases and everything else outside the
    blocks go to bfloat16. Where the output layer shares its weights with the word embeddings, it goes on to. With
    `bf16` the whole model goes to bfloat16 and stays one that plain transformers loads.

    Args:
        model: a float model; of one with adapters the model beneath them is quantized, and they stay as they are.
        settings: all that can be chosen; the others are short for two of them.
        format: `int8` (Dettmers et al. 2022, vector-wise), `nf4` or `fp4` (Dettmers et al. 2023), or `bf16`.
        double_quant: quantize the 4-bit block scales too (0.4 bit per weight less); by default it is done.
        calibration: batches of the model's inputs, on which 4-bit weights are rounded by GPTQ.

    Raises:
        InputError: it is quantized already, has no linear layer in its blocks or weights that are NaN or infinite, or a
            setting is wrong.
    """
    if settings is None:
        settings = QuantizationSettings(format=format, double_quant=double_quant is not False)
    elif format is not None or double_quant is not None:
        raise InputError("format, double_quant: stand in the settings; leave them out beside these")
    refuse_quantized(model)
    if isinstance(model, PeftModel):
        choose_formats(model.get_base_model(), settings)  # before its adapters are taken off
        return on_another_base(model, lambda base: quantize_model(base, settings, calibration=calibration))
    refuse_not_finite(model, "model")
    formats = choose_formats(model, settings)
    if calibration is not None:
        with evaluating(model):
            compensate(model, formats, settings, calibration)
    return apply_formats(model, formats, settings)


def refuse_quantized(model: PreTrainedModel | PeftModel) -> None:
    """Raise an `InputError` for a model that is quantized already."""
    if is_quantized(model.config):
        raise InputError("model: it is quantized already; quantize the model it was made from")


def apply_formats(
    model: PreTrainedModel, formats: Mapping[str, Format], settings: QuantizationSettings
) -> PreTrainedModel:
    """Quantize the named modules in place, each to its format; the rest goes to `settings.rest_dtype`.

    Args:
        model: a float model without adapters; afterwards it is in eval mode, and no weight asks for a gradient.
        formats: by full name of module, as `choose_formats` gives them; empty for a model that is only cast.
        settings: how the formats are stored and computed with.
    """
    if not formats:
        return _plain(model, DTYPES[settings.rest_dtype])
    embedding = model.get_input_embeddings()
    head = _tied_head(model) if any(model.get_submodule(name) is embedding for name in formats) else None
    replacements: dict[str, Any] = {name: quantized_as(format, settings) for name, format in formats.items()}
    replacements |= {} if head is None else {head: Tied()}
    description = describe([*structure_of(model.config), *grouped(replacements)])
    dtype = DTYPES[settings.rest_dtype]
    floats = {name: model.get_submodule(name) for name in formats}
    for name, module in floats.items():
        model.set_submodule(name, quantized_module(module, formats[name], settings, dtype))
    if head is not None:
        tie_output(model, head)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.quantization_config = description
    model.config.dtype = dtype
    model.hf_quantizer = DistillQuantizer(description, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = description.quant_method
    return finish_loading(model).eval().requires_grad_(False)


def _plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model with all that is in its file in a dtype; tables that it computes when it is made stay float32."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def quantized_module(module: Any, format: Format, settings: QuantizationSettings, dtype: torch.dtype) -> nn.Module:
    """A quantized linear layer or embedding in place of a float one.

    Args:
        dtype: of an embedding's rows.
    """
    quantized = empty_module(module, quantized_as(format, settings), dtype)
    weight = module.weight.detach()
    quantized.fill(weight.T if isinstance(module, Conv1D) else weight)
    return quantized.requires_grad_(False)


def weight_memory(model: nn.Module) -> int:
    """Bytes that the loaded weights occupy: parameters, buffers, and what bitsandbytes keeps beside them."""
    storages = {}
    for module in model.modules():
        tensors: list[Tensor | None] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for weight in module.parameters(recurse=False):
            if isinstance(weight, bnb.nn.Params4bit):
                tensors += _quant_state_tensors(weight.quant_state)
            elif isinstance(weight, bnb.nn.Int8Params):
                tensors += [weight.CB, weight.SCB]
        if isinstance(module, bnb.nn.Linear8bitLt):
            tensors += [module.state.CB, module.state.SCB]
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tied_head(model: PreTrainedModel) -> str | None:
    """The name of an output layer whose weights are the word embeddings, in a float model."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight is not model.get_input_embeddings().weight:
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _quant_state_tensors(state: QuantState | None) -> list[Tensor | None]:
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, *_quant_state_tensors(state.state2)]
