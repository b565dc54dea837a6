"""Quantize to 8 or 4 bit with bitsandbytes, embeddings included, so that the folder reloads bit for bit.

`import distill` registers the formats with transformers; after it, a plain `AutoModel….from_pretrained` loads them.
"""

from typing import Any, Literal

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from distill.errors import InputError
from distill.student import find_blocks

Format = Literal["int8", "nf4", "fp4"]

# transformers prints these names when it doesn't know them, that is without `import distill`.
_INT8_METHOD = "distill_int8 (first: import distill)"
_4BIT_METHOD = "distill_4bit (first: import distill)"


def quantize_model(model: PreTrainedModel, *, format: Format, double_quant: bool = True) -> PreTrainedModel:
    """Quantize a model in place and return it, ready for `save_pretrained`.

    The linear layers inside the transformer blocks go to `format`, the word embeddings to int8 with a scale per row
    (they are two thirds of a small BERT). Heads, the pooler and everything else outside the blocks stay as they are
    in bfloat16; so do layer norms and biases.

    Args:
        model: a float model.
        format: `int8` (Dettmers et al. 2022, vector-wise, no outlier columns), `nf4` or `fp4` (Dettmers et al. 2023).
        double_quant: quantize the 4-bit block scales too (0.4 bit per weight less).

    Raises:
        InputError: it is quantized already, or has no linear layer in its blocks.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("model: it is quantized already; quantize the model it was made from")
    blocks, _ = find_blocks(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skipped = [name for name in linears if not name.startswith(f"{blocks}.")]
    if len(skipped) == len(linears):
        raise InputError(f"{type(model).__name__}: no linear layers in its blocks, so there is nothing to quantize")
    config = DistillQuantizationConfig(format=format, double_quant=double_quant, skip_modules=skipped)

    float_linears = {name: model.get_submodule(name) for name in linears if name not in skipped}
    float_embedding = model.get_input_embeddings()
    _install_modules(model, config)
    for name, linear in float_linears.items():
        _fill_linear(model.get_submodule(name), linear)
    model.get_input_embeddings().fill(float_embedding.weight.detach())
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params):
            parameter.data = parameter.data.to(torch.bfloat16)

    quantizer = (_Int8Quantizer if format == "int8" else _4BitQuantizer)(config, pre_quantized=True)
    model.config.quantization_config = config
    model.config.dtype = torch.bfloat16
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    return quantizer._process_model_after_weight_loading(model).eval().requires_grad_(False)


def quantized_size(model: PreTrainedModel, *, format: Format, double_quant: bool = True) -> int:
    """Bytes of weights that `quantize_model` will leave, from a float model that may lie on meta; right to 1 %."""
    blocks, _ = find_blocks(model)
    embedding = model.get_input_embeddings()
    size = embedding.num_embeddings * (embedding.embedding_dim + 2)
    quantized = {id(embedding.weight)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks}."):
            quantized.add(id(module.weight))
            count = module.weight.numel()
            scales = 4 * module.out_features if format == "int8" else count / 64 * (1 if double_quant else 4)
            size += count // (1 if format == "int8" else 2) + int(scales)
    return size + sum(2 * parameter.numel() for parameter in model.parameters() if id(parameter) not in quantized)


def weight_memory(model: nn.Module) -> int:
    """Bytes that the loaded weights occupy: parameters, buffers, and the scales that bitsandbytes keeps beside them."""
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


class Int8Embedding(nn.Module):
    """An embedding of int8 rows with one scale per row.

    The rows lie flat in `weight`, a shape that plain transformers refuses to load into a float embedding: a model
    that is loaded without `import distill` raises instead of computing garbage. A scale is rounded up to what
    bfloat16 holds before the rows are rounded, so casting it to another dtype changes nothing.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.register_buffer("weight", torch.zeros(num_embeddings * embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_embeddings, dtype=dtype))

    def fill(self, rows: Tensor) -> None:
        """Quantize float rows V×D: w ≈ scale · q, q = round(w / scale) in −127…127."""
        rows = rows.float()
        scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny)
        rounded = scale.to(torch.bfloat16)
        rounded = torch.where(
            rounded.float() < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded
        )
        quantized = (rows / rounded.float().unsqueeze(1)).round().clamp(-127, 127)
        self.weight = quantized.to(torch.int8).reshape(-1)
        self.scale = rounded.to(self.scale.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of `ids` (any shape …) as …×D in the scale's dtype."""
        rows = nn.functional.embedding(ids, self.weight.view(self.num_embeddings, self.embedding_dim))
        return rows.to(self.scale.dtype) * nn.functional.embedding(ids, self.scale.unsqueeze(1))


class DistillQuantizationConfig(QuantizationConfigMixin):
    """What is saved under `quantization_config` in a quantized model's config.json.

    Args:
        format: int8, nf4 or fp4.
        double_quant: whether the 4-bit block scales are quantized too.
        skip_modules: full names of the linear layers left in bfloat16.
    """

    def __init__(
        self,
        format: Format,
        double_quant: bool = True,
        skip_modules: list[str] | None = None,
        quant_method: str | None = None,
    ):
        self.quant_method = quant_method or (_INT8_METHOD if format == "int8" else _4BIT_METHOD)
        self.format = format
        self.double_quant = double_quant
        self.skip_modules = skip_modules or []

    # Read by transformers' bitsandbytes quantizers; properties, because AutoQuantizationConfig hands every saved
    # config with a `load_in_…` key to bitsandbytes' own quantizer, which knows nothing of the embeddings.
    llm_int8_enable_fp32_cpu_offload = False


register_quantization_config(_INT8_METHOD)(DistillQuantizationConfig)
register_quantization_config(_4BIT_METHOD)(DistillQuantizationConfig)


class _LoadQuantized:
    """What both quantizers do around the loading of weights."""

    quantization_config: DistillQuantizationConfig
    pre_quantized: bool

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise InputError(
                "quantization_config: use distill.quantize_model(model, format=…) to quantize a float model"
            )
        super().validate_environment(*args, **kwargs)  # type: ignore[misc]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _install_modules(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # Else the first eval forward on such a CPU repacks the weight in place, and state_dict() then
                # corrupts both the file and the model.
                module.support_avx512bf16_for_cpu = False
        model._weight_conversions = []  # so that a plain save_pretrained of the loaded model works
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]


@register_quantizer(_INT8_METHOD)
class _Int8Quantizer(_LoadQuantized, Bnb8BitHfQuantizer):
    pass


@register_quantizer(_4BIT_METHOD)
class _4BitQuantizer(_LoadQuantized, Bnb4BitHfQuantizer):
    pass


def _install_modules(model: PreTrainedModel, config: DistillQuantizationConfig) -> None:
    """Put empty quantized modules (on meta) in the places of the float ones."""
    embedding = model.get_input_embeddings()
    for name, module in list(model.named_modules()):
        with torch.device("meta"):
            if module is embedding:
                model.set_submodule(name, Int8Embedding(module.num_embeddings, module.embedding_dim))
            elif type(module) is nn.Linear and name not in config.skip_modules:
                model.set_submodule(name, _quantized_linear(module, config))


def _quantized_linear(linear: nn.Linear, config: DistillQuantizationConfig) -> nn.Linear:
    has_bias = linear.bias is not None
    if config.format == "int8":
        module = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
        module.weight.data = module.weight.data.to(torch.int8)
    else:
        module = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            has_bias,
            compute_dtype=torch.bfloat16,
            compress_statistics=config.double_quant,
            quant_type=config.format,
        )
        module.weight.data = module.weight.data.to(torch.uint8)
    return module.requires_grad_(False)


def _fill_linear(module: Any, linear: nn.Linear) -> None:
    weight = linear.weight.detach()
    if isinstance(module, bnb.nn.Linear8bitLt):
        module.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    else:
        module.weight = bnb.nn.Params4bit(
            weight.float(),
            requires_grad=False,
            compress_statistics=module.weight.compress_statistics,
            quant_type=module.weight.quant_type,
            module=module,
        ).to(weight.device)
        module.weight.quant_state.dtype = torch.bfloat16  # what it is expanded to; the scales come from float32
    module.bias = linear.bias


def _quant_state_tensors(state: QuantState | None) -> list[Tensor | None]:
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, *_quant_state_tensors(state.state2)]
