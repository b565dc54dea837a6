"""What transformers needs to load and save a quantized model: its description in config.json, and the quantizer.

A user of a quantized folder imports this much of the package, and `modules` when the folder is loaded; what else the
package needs (peft, datasets, pydantic, …) need not be installed there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from distill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.compression.quantization.formats import BlockSize, ComputeDtype, Format

# transformers prints this name when it doesn't know it, that is without `import distill`.
METHOD = "distill (first: import distill)"


class DistillQuantizationConfig(QuantizationConfigMixin):
    """What is saved under `quantization_config` in a quantized model's config.json.

    No key may start with `load_in_`: AutoQuantizationConfig hands every such config to bitsandbytes' own quantizer,
    which knows nothing of the embeddings.

    Args:
        formats: for every quantized module, by its full name, its format.
        tied_head: the output layer that computes with the quantized word embeddings, if there is one.
        double_quant: whether the 4-bit block scales are quantized too.
        block_size: weights that share a scale in the 4-bit formats.
        compute_dtype: what 4-bit weights are expanded to.
        threshold: of `Int8Linear`.
    """

    def __init__(
        self,
        formats: dict[str, Format],
        tied_head: str | None = None,
        double_quant: bool = True,
        block_size: BlockSize = 64,
        compute_dtype: ComputeDtype = "bf16",
        threshold: float | None = None,
        quant_method: str = METHOD,
    ):
        self.quant_method = quant_method
        self.formats = formats
        self.tied_head = tied_head
        self.double_quant = double_quant
        self.block_size = block_size
        self.compute_dtype = compute_dtype
        self.threshold = threshold


register_quantization_config(METHOD)(DistillQuantizationConfig)


@register_quantizer(METHOD)
class DistillQuantizer(HfQuantizer):
    """Puts empty quantized modules into a model before its weights are loaded.

    All that they store are parameters and buffers, so transformers loads and saves them as any others.
    """

    quantization_config: DistillQuantizationConfig
    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise an `InputError` for a model that isn't quantized yet."""
        if not self.pre_quantized:
            raise InputError(
                "quantization_config: use distill.quantize_model(model, format=…) to quantize a float model"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from distill.compression.quantization.modules import empty_module, resolve_name, tie_output

        config = self.quantization_config
        modules = dict(model.named_modules())
        dtype = model.dtype
        for name, format in config.formats.items():
            found = resolve_name(name, modules, model.base_model_prefix)
            if found is not None:
                with torch.device("meta"):
                    module = empty_module(modules[found], format, config, dtype)
                model.set_submodule(found, module.requires_grad_(False))
        tie_output(model, config.tied_head if config.tied_head in modules else None)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
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
