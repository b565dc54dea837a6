"""What float weights become when they are quantized and expanded again, bit for bit as `quantize_model` leaves them.

Whatever device the weights lie on, the bits are those of the CPU, where all weights are quantized.
"""

from functools import cache
from typing import Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from distill.compression.quantization.embeddings import Int8Embedding
from distill.compression.quantization.formats import Format, QuantizationSettings
from distill.compression.quantization.modules import DTYPES

_CELLS = 512
"""Cells of the table from −1 to 0, and from 0 to 1; narrower than two bounds of a format are ever apart."""


def fake_linear_weight(weight: Tensor, format: Format, settings: QuantizationSettings) -> Tensor:
    """The weight of a linear layer as the layer in `format` computes with it, in float32.

    A 4-bit layer expands its weights to the settings' `compute_dtype`, so these are values of that.

    Args:
        weight: out×in.
    """
    if format == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to("cpu", torch.float16))
        return bnb.functional.int8_vectorwise_dequant(codes, scales).to(weight.device)
    flat, size = weight.float().reshape(-1), settings.block_size
    blocks = nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    scales = blocks.abs().amax(-1)
    kept = twice_quantized(scales) if settings.double_quant else scales
    expanded = _expanded(blocks, scales, kept, format).to(DTYPES[settings.compute_dtype]).float()
    return expanded.flatten()[: len(flat)].view(weight.shape)


def fake_int8_rows(rows: Tensor, settings: QuantizationSettings) -> Tensor:
    """Rows of an embedding as `Int8Embedding` looks them up, in float32 with values of the rest's dtype.

    Args:
        rows: …×D.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    quantized = Int8Embedding(len(flat), flat.shape[1], DTYPES[settings.rest_dtype])
    quantized.fill(flat)
    return quantized.dense().float().view(rows.shape)


def fake_nf4_rows(rows: Tensor, scales: Tensor, settings: QuantizationSettings) -> Tensor:
    """Rows …×D of an embedding as `Nf4Embedding` looks them up, in float32 with values of the rest's dtype.

    Args:
        scales: …×blocks, these rows' part of `row_scales`.
    """
    blocks = _row_blocks(rows, settings)
    expanded = _expanded(blocks, blocks.abs().amax(-1), scales, "nf4").flatten(-2)[..., : rows.shape[-1]]
    return expanded.to(DTYPES[settings.rest_dtype]).float()


def row_scales(table: Tensor, settings: QuantizationSettings) -> Tensor:
    """The scale of each block in each row of an embedding, as `Nf4Embedding` keeps them: V×blocks.

    Args:
        table: V×D.
    """
    scales = _row_blocks(table, settings).abs().amax(-1)
    return twice_quantized(scales.flatten()).view_as(scales) if settings.double_quant else scales


def twice_quantized(scales: Tensor) -> Tensor:
    """Scales of 4-bit blocks as they come back from 8 bits (Dettmers et al. 2023, section 3, double quantization)."""
    on_cpu = scales.cpu()
    offset = on_cpu.mean()
    codes, state = bnb.functional.quantize_blockwise(on_cpu - offset, blocksize=256)
    return (bnb.functional.dequantize_blockwise(codes, state) + offset).to(scales.device)


def _row_blocks(rows: Tensor, settings: QuantizationSettings) -> Tensor:
    """…×D as …×blocks×block_size: blocks begin anew with every row, the last one filled up with zeros."""
    size = settings.block_size
    return nn.functional.pad(rows.float(), (0, -rows.shape[-1] % size)).unflatten(-1, (-1, size))


def _expanded(blocks: Tensor, scales: Tensor, kept_scales: Tensor, format: Literal["nf4", "fp4"]) -> Tensor:
    """Blocks …×block_size over their scales (…), rounded to the nearest of 16 values, times the scales that are kept.

    bitsandbytes searches the bounds between the values for every weight; here a table of cells tells them at once, in
    a third of the time and with the same result.
    """
    shares = (blocks * (1.0 / scales.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1).flatten()
    below, bound, above = (part.to(blocks.device) for part in _cells(format))
    cell = (shares * _CELLS).floor_().add_(_CELLS).to(torch.int32)
    values = torch.where(shares > bound.index_select(0, cell), above.index_select(0, cell), below.index_select(0, cell))
    return values.view_as(blocks).mul_(kept_scales.unsqueeze(-1))


@cache
def _cells(format: Literal["nf4", "fp4"]) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell of −1 … 1: the format's value below the bound in it, that bound (inf for none), the value above.

    A bound lies midway between two neighbouring values, and belongs to the lower one.
    """
    values = bnb.functional.get_4bit_type(format, device="cpu").sort().values
    bounds = (values[:-1] + values[1:]) / 2
    edges = torch.arange(-_CELLS, _CELLS + 2) / _CELLS  # the last cell holds 1 alone
    lower = torch.searchsorted(bounds, edges)  # bounds below each edge
    holds_one = lower[1:] > lower[:-1]
    lower = lower[:-1]
    bound = torch.where(holds_one, bounds[lower.clamp(max=len(bounds) - 1)], torch.inf)
    return values[lower], bound, values[(lower + 1).clamp(max=len(values) - 1)]
