"""What transformers needs to load and save a compressed model: its description in config.json, and the quantizer.

A user of a compressed folder imports this much of the package, and what its replacements need when the folder is
loaded (bitsandbytes for quantized modules alone); what else the package needs (peft, datasets, pydantic, …) need not
be installed there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from distill.compression.replacements import REPLACEMENTS
from distill.errors import InputError
from distill.models.description import METHOD, Description, entries_of
from distill.models.replacements import is_quantized, resolve_name, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNMENT = 64  # bytes, of torch's own memory on a CPU

register_quantization_config(METHOD)(Description)


@register_quantizer(METHOD)
class DistillQuantizer(HfQuantizer):
    """Puts the modules that a config describes into a model, empty, before its weights are loaded.

    All that they store are parameters and buffers, so transformers loads and saves them as any others.
    """

    quantization_config: Description
    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise an `InputError` for a model that isn't quantized yet."""
        if not self.pre_quantized:
            raise InputError(
                "quantization_config: use distill.quantize_model(model, format=…) to quantize a float model"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for entry in entries_of(model.config):
            if entry.kind not in REPLACEMENTS:
                raise InputError(
                    f"quantization_config: no kind {entry.kind!r}; there are {', '.join(REPLACEMENTS)} "
                    "(a newer distill-transformers may have it)"
                )
            replacement = REPLACEMENTS[entry.kind](**entry.fields)
            for name in entry.names:
                found = resolve_name(name, model)
                if found is not None:
                    with torch.device("meta"):
                        replacement.put(model, found)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if structure_of(model.config):
            _align(model)
        if not is_quantized(model.config):  # Trainer, PEFT and `model.float()` are to see the float model that it is
            del model.hf_quantizer, model.quantization_method
            model.is_quantized = False
            return model
        from distill.compression.quantization.layers import FourBitLinear, Int8Linear

        kinds = set()
        for module in model.modules():
            if isinstance(module, Int8Linear | FourBitLinear):
                module.link()
                kinds.add(type(module))
        model.is_loaded_in_8bit = Int8Linear in kinds  # peft and Trainer ask for these
        model.is_loaded_in_4bit = FourBitLinear in kinds
        return model

    def is_serializable(self) -> bool:
        """It can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it can be trained."""
        return True


def _align(model: PreTrainedModel) -> None:
    """Copy weights to where torch would have put them: layers of odd sizes shift all that follow them in a file, and
    products on a CPU round otherwise there.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
