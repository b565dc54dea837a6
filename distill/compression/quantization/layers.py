"""bitsandbytes' quantized linear layers, made to keep and give back what is stored bit for bit."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type, quantize_4bit
from torch import Tensor, nn

_SCALES_IN_A_BLOCK = 256  # of double quantization, fixed by bitsandbytes' kernels


class Int8Linear(bnb.nn.Linear8bitLt):
    """LLM.int8 (Dettmers et al. 2022): rows of int8 weights with a float32 scale each, activations rounded likewise.

    In files the weights lie flat, a shape that plain transformers refuses to load into a float layer; int8 weights in
    the float shape it would take for floats. They are quantized on the CPU whatever device they come from, so that
    the bits don't depend on it.

    Args:
        threshold: inputs from this size on are multiplied unquantized; 0 for none. None for 0 on a CPU, where that
            takes longer than float32 does, and the paper's 6 elsewhere.
    """

    SCB: Tensor

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, *, threshold: float | None):
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=False, has_fp16_weights=False)
            weight = torch.empty(out_features * in_features, dtype=torch.int8)
            self.weight = bnb.nn.Int8Params(weight, requires_grad=False)
            self.register_buffer("SCB", torch.empty(out_features, dtype=torch.float32))
        self.bias = bias
        self.threshold = threshold

    def fill(self, weight: Tensor) -> None:
        """Quantize float weights, out×in."""
        quantized = bnb.nn.Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False).to("cpu")
        self.weight, self.SCB = nn.Parameter(quantized.data, requires_grad=False), quantized.SCB
        self.to(weight.device)

    def link(self) -> None:
        """Hand the stored tensors to bitsandbytes, on whichever device they lie now."""
        weight = self.weight.data.view(self.out_features, self.in_features)
        self.weight = bnb.nn.Int8Params(weight, requires_grad=False, SCB=self.SCB)
        self.state.CB, self.state.SCB = weight, self.SCB

    def forward(self, x: Tensor) -> Tensor:
        """…×in to …×out; unlike bitsandbytes' own, it leaves the stored bias in its dtype."""
        self.state.is_training = self.training
        self.state.threshold = (0.0 if x.device.type == "cpu" else 6.0) if self.threshold is None else self.threshold
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bnb.matmul(x, self.weight, bias=bias, state=self.state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].detach().reshape(-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].view_as(self.weight)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        move_without_cast(self, fn)
        if not self.weight.is_meta:
            self.link()
        return self


class FourBitLinear(bnb.nn.Linear4bit):
    """Blocks of 4-bit weights (Dettmers et al. 2023), their scales in 8 bit too where `double_quant` is set.

    bitsandbytes' own layer repacks its weights in place at the first evaluation on a CPU with AVX512-bf16, which
    corrupts what is saved afterwards and can't be trained through; this one never does. Scales are buffers, so a file
    holds tensors alone and every loader fills them. Quantized on the CPU, as `Int8Linear`.

    Args:
        compute_dtype: what the weights are expanded to, and the inputs cast to.
    """

    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        *,
        format: Literal["nf4", "fp4"],
        double_quant: bool,
        block_size: int,
        compute_dtype: torch.dtype,
    ):
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=False, compute_dtype=compute_dtype, quant_type=format)
            weight = torch.empty((out_features * in_features + 1) // 2, 1, dtype=torch.uint8)
            self.weight = bnb.nn.Params4bit(weight, requires_grad=False, bnb_quantized=True)
        register_scales(self, -(-out_features * in_features // block_size), double_quant)
        self.bias = bias
        self.format = format
        self.double_quant = double_quant
        self.block_size = block_size
        self.support_avx512bf16_for_cpu = False  # for who calls bitsandbytes' forward

    def fill(self, weight: Tensor) -> None:
        """Quantize float weights, out×in."""
        packed, state = quantize_4bit(
            weight.detach().float().cpu().contiguous(),
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type=self.format,
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        keep_scales(self, state)
        self.to(weight.device)

    def link(self) -> None:
        """Hand the stored tensors to bitsandbytes, on whichever device they lie now."""
        shape = torch.Size((self.out_features, self.in_features))
        state = quant_state(self, shape, self.format, self.block_size, self.compute_dtype)
        self.weight = bnb.nn.Params4bit(
            self.weight.data,
            requires_grad=False,
            quant_state=state,
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type=self.format,
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = state

    def forward(self, x: Tensor) -> Tensor:
        """…×in to …×out in the input's dtype; the stored bias stays in its own."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        weight, inputs = self.weight, x.to(self.compute_dtype)
        if self._expands_wrongly():
            return nn.functional.linear(inputs, self.dense(), bias).to(x.dtype)
        return bnb.matmul_4bit(inputs, weight, bias=bias, quant_state=weight.quant_state).to(x.dtype)

    def dense(self) -> Tensor:
        """The weights as they are computed with, out×in in the compute dtype."""
        state = self.weight.quant_state
        if self._expands_wrongly():
            state = copy.copy(state)
            state.shape = torch.Size((1, self.out_features * self.in_features))
        return bnb.functional.dequantize_4bit(self.weight.data, state).view(self.out_features, self.in_features)

    def _expands_wrongly(self) -> bool:
        """Where blocks go on in the next row bitsandbytes' kernel for CPUs takes wrong scales (seen with 0.50.2)."""
        return self.weight.device.type == "cpu" and self.in_features % self.block_size != 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FourBitLinear":
        move_without_cast(self, fn)
        if not self.weight.is_meta:
            self.link()
        return self


def dequantized(module: Int8Linear | FourBitLinear) -> Tensor:
    """The weights that a layer computes with, out×in: 4-bit ones in its compute dtype, int8 ones in float32."""
    if isinstance(module, Int8Linear):
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.SCB)
    return module.dense()


# --- 4-bit scales, of linear layers and embeddings ------------------------------------------------------------------


def register_scales(module: nn.Module, num_blocks: int, double_quant: bool) -> None:
    """Register buffers on meta for the scales of 4-bit blocks.

    Args:
        module: gets the buffers `absmax`, and with `double_quant` `nested_absmax` and `nested_offset`.
        num_blocks: one scale each.
        double_quant: a byte for each scale and a float32 for 256 of them, instead of a float32 for each.
    """
    dtype = torch.uint8 if double_quant else torch.float32
    module.register_buffer("absmax", torch.empty(num_blocks, dtype=dtype, device="meta"))
    if double_quant:
        num_floats = -(-num_blocks // _SCALES_IN_A_BLOCK)
        module.register_buffer("nested_absmax", torch.empty(num_floats, dtype=torch.float32, device="meta"))
        module.register_buffer("nested_offset", torch.empty((), dtype=torch.float32, device="meta"))


def keep_scales(module: Any, state: QuantState) -> None:
    """Put the scales that `quantize_4bit` found into a module's buffers.

    Args:
        module: one to which `register_scales` gave its buffers.
        state: of `quantize_4bit`.
    """
    module.absmax = state.absmax
    if state.nested:
        module.nested_absmax, module.nested_offset = state.state2.absmax, state.offset


def quant_state(module: Any, shape: torch.Size, format: str, block_size: int, dtype: torch.dtype) -> QuantState:
    """What bitsandbytes needs beside the packed weights, over the module's own buffers.

    Args:
        module: with the buffers of `register_scales` and `double_quant`.
        shape: of the weights before they were packed: out×in, of an embedding V×D.
        format: nf4 or fp4.
        block_size: weights that share a scale.
        dtype: what weights are expanded to.
    """
    device = module.absmax.device
    nested = None
    if module.double_quant:
        code = _scale_code(device)
        nested = QuantState(module.nested_absmax, code=code, blocksize=_SCALES_IN_A_BLOCK, dtype=torch.float32)
    return QuantState(
        module.absmax,
        shape=shape,
        code=get_4bit_type(format, device=device),
        blocksize=block_size,
        quant_type=format,
        dtype=dtype,
        offset=module.nested_offset if nested else None,
        state2=nested,
    )


def scales_size(num_blocks: int, double_quant: bool) -> int:
    """Bytes of the scales of 4-bit blocks.

    Args:
        num_blocks: one scale each.
        double_quant: whether scales are kept in 8 bits, as for `register_scales`.
    """
    return num_blocks + 4 * (-(-num_blocks // _SCALES_IN_A_BLOCK) + 1) if double_quant else 4 * num_blocks


@cache
def _scale_code(device: torch.device) -> Tensor:
    return create_dynamic_map().to(device)


def move_without_cast(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Do what `Module._apply` does, but leave a quantized module's buffers, such as scales, in their dtypes.

    Args:
        module: the quantized module itself; none is within it.
        fn: as torch passes it, which may move a tensor and cast it.
    """
    before = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.numel()}
    nn.Module._apply(module, fn)
    for name, buffer in before.items():
        moved = module.get_buffer(name)
        if moved.dtype != buffer.dtype:
            setattr(module, name, buffer.to(moved.device))
