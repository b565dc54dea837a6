"""The affine scheme of quantization: a real number is a scale times an integer less a zero point."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError


@dataclass(frozen=True)
class Affine:
    """r = S · (q − Z), with codes q from `lowest` to `highest` (Jacob et al. 2018, equation 1).

    Several scales are in the shape that broadcasts against the values; with groups, against …×G×group_size.
    """

    scale: Tensor
    """S > 0, in float32."""
    zero_point: Tensor
    """Z, the code of 0, as whole numbers in float32; in the scale's shape."""
    lowest: int
    highest: int
    group_size: int | None = None
    """Neighbours in the last dimension that share a scale."""

    @property
    def dtype(self) -> torch.dtype:
        """The smallest type of torch that holds the codes."""
        if self.lowest >= 0 and self.highest <= 255:
            return torch.uint8
        return torch.int8 if self.lowest >= -128 and self.highest <= 127 else torch.int32


def value_range(values: Tensor, *, axis: int | None = None, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value, of each part of a tensor that gets a scale of its own.

    Args:
        values: any shape.
        axis: one range a channel along this axis (1×…×C×…×1); by default one of the whole tensor (a scalar).
        group_size: one range for this many neighbours in the last dimension (…×G×1).

    Raises:
        InputError: `axis` beside `group_size`, or a last dimension that is no multiple of `group_size`.
    """
    if group_size is not None:
        if axis is not None:
            raise InputError("group_size: groups lie in the last dimension, so leave axis out")
        values = _in_groups(values, group_size)
        return values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if axis is None:
        lowest, highest = torch.aminmax(values)
        return lowest, highest
    others = [each for each in range(values.dim()) if each != axis % values.dim()]
    return values.amin(others, keepdim=True), values.amax(others, keepdim=True)


def affine_from_range(
    low: Tensor, high: Tensor, *, bits: int = 8, symmetric: bool = False, group_size: int | None = None
) -> Affine:
    """The scheme whose codes span a range.

    Asymmetric: codes 0 … 2^bits − 1 span the range, widened so far that it holds 0, and Z is rounded, so that 0 has a
    code of its own (Jacob et al. 2018, section 3; ONNX's DynamicQuantizeLinear does the same). Symmetric: Z = 0 and
    codes ±(2^(bits−1) − 1), the most negative code unused. A range of nothing but 0 gets the smallest scale there is.

    Args:
        low, high: as `value_range` gives them.
        bits: 2 to 16.
        group_size: as it was given to `value_range`.

    Raises:
        InputError: `bits` out of range.
    """
    if not 2 <= bits <= 16:
        raise InputError(f"bits: should be 2 to 16; got {bits}")
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    smallest = torch.finfo(torch.float32).tiny
    if symmetric:
        highest = 2 ** (bits - 1) - 1
        scale = (torch.maximum(-low, high) / highest).clamp(min=smallest)
        return Affine(scale, torch.zeros_like(scale), -highest, highest, group_size)
    highest = 2**bits - 1
    scale = ((high - low) / highest).clamp(min=smallest)
    return Affine(scale, (-low / scale).round().clamp(0, highest), 0, highest, group_size)


def affine_of(
    values: Tensor, *, bits: int = 8, symmetric: bool = False, axis: int | None = None, group_size: int | None = None
) -> Affine:
    """The scheme that spans a tensor's own values: per tensor, per channel (`axis`) or per group.

    Args:
        values: any shape.
        bits: 2 to 16.
        symmetric: Z = 0, as for `affine_from_range`.
        axis, group_size: as for `value_range`.

    Raises:
        InputError: as `value_range` and `affine_from_range`.
    """
    low, high = value_range(values, axis=axis, group_size=group_size)
    return affine_from_range(low, high, bits=bits, symmetric=symmetric, group_size=group_size)


def quantize(values: Tensor, affine: Affine) -> Tensor:
    """Codes q = clamp(round(r / S) + Z), halves to the even code; in the values' shape and the scheme's dtype.

    Args:
        values: r, of a shape that the scheme's scales fit.
        affine: S, Z and the range of q.

    Raises:
        InputError: a last dimension that is no multiple of the scheme's group size.
    """
    return _codes(_in_groups(values, affine.group_size), affine).to(affine.dtype).view(values.shape)


def dequantize(codes: Tensor, affine: Affine) -> Tensor:
    """The real numbers S · (q − Z) that codes stand for, in float32.

    Args:
        codes: q, as `quantize` gives them.
        affine: the scheme by which they were made.

    Raises:
        InputError: a last dimension that is no multiple of the scheme's group size.
    """
    grouped = _in_groups(codes, affine.group_size).float()
    return (affine.scale * (grouped - affine.zero_point)).view(codes.shape)


def fake_quantize(values: Tensor, affine: Affine) -> Tensor:
    """Values as they come back from their codes, in their own dtype; differentiable by the values.

    The gradient goes straight through (Bengio et al. 2013) for values inside the range that the codes reach, its ends
    included, and is 0 outside, where the value is clipped (Jacob et al. 2018, section 3; Esser et al. 2020, LSQ, has
    the same gradient by the values). Scale and zero point get none.

    Args:
        values: of a shape that the scheme's scales fit.

    Raises:
        InputError: a last dimension that is no multiple of the scheme's group size.
    """
    return _FakeQuantize.apply(values, affine)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, affine: Affine) -> Tensor:
        grouped = _in_groups(values, affine.group_size).float()
        low = affine.scale * (affine.lowest - affine.zero_point)
        high = affine.scale * (affine.highest - affine.zero_point)
        ctx.save_for_backward(((grouped >= low) & (grouped <= high)).view(values.shape))
        real = affine.scale * (_codes(grouped, affine) - affine.zero_point)
        return real.view(values.shape).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


def _codes(grouped: Tensor, affine: Affine) -> Tensor:
    return ((grouped.float() / affine.scale).round() + affine.zero_point).clamp(affine.lowest, affine.highest)


def _in_groups(values: Tensor, group_size: int | None) -> Tensor:
    """…×D as …×G×group_size."""
    if group_size is None:
        return values
    if values.dim() == 0 or values.shape[-1] % group_size:
        raise InputError(f"group_size: {group_size} does not divide the last dimension of {tuple(values.shape)}")
    return values.unflatten(-1, (-1, group_size))
