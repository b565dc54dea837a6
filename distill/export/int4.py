"""An ONNX graph with 4-bit weights: linear layers in blocks that engines multiply as they are, and embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compression.moments import input_moments
from distill.compression.quantization.gptq import damped_inverse
from distill.export.int8 import drop_unread, is_turned, module_of, products_of

if TYPE_CHECKING:
    import onnx

OPSET = 21
"""The first with tensors of 4 bit and scales for blocks of them."""

_BLOCKS = (32, 16)
"""Weights that share a scale: the first of these that divides a layer's inputs; engines have kernels for no others."""
_ZERO = 8
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Blocks:
    """A weight O×I (or a table V×D) in 4 bit: `(levels - 8) * scales`, a scale for each block of a row."""

    levels: NDArray
    """O×I, 0 to 15."""
    scales: NDArray
    """O×(I/block), in float32."""

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.levels.shape[1] // self.scales.shape[1]

    def values(self) -> NDArray:
        """What they stand for, O×I."""
        return (self.levels.astype(np.float32) - _ZERO) * np.repeat(self.scales, self.block, axis=1)


def int4_weights(
    model: PreTrainedModel, layers: Iterable[str], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Blocks]:
    """The weights of linear layers in 4 bit, rounded so that their errors cancel out on calibration rows.

    Layers whose inputs no block divides are left out.

    Args:
        model: in float32.
        layers: names of its modules.
        batches: its inputs.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    weights = {name: each.weight.T if isinstance(each, Conv1D) else each.weight for name, each in modules.items()}  # type: ignore[union-attr, operator]
    weights = {name: weight.detach() for name, weight in weights.items() if block_of(weight.shape[1])}  # type: ignore[union-attr]
    moments = input_moments(model, {name: modules[name] for name in weights}, batches)
    return {name: rounded_together(weight, moments[name]) for name, weight in weights.items() if name in moments}


def block_of(width: int) -> int | None:
    """How many weights share a scale in a layer with so many inputs; None where no block divides them."""
    return next((block for block in _BLOCKS if width % block == 0), None)


def rounded_together(weight: Tensor, moments: Tensor) -> Blocks:
    """A weight in 4 bit that changes the layer's outputs little (GPTQ, Frantar et al. 2023, equations 2 and 3).

    Inputs are rounded one after the other, and the weights of later ones make up for the error; a block gets its scale
    when its turn comes.

    Args:
        weight: O×I; one of `_BLOCKS` divides I.
        moments: I×I sums of products of the layer's inputs.
    """
    rest, width = weight.double().clone(), weight.shape[1]
    block = block_of(width)
    if block is None:
        raise ValueError(f"no block divides {width} inputs")
    upper = torch.linalg.cholesky(damped_inverse(moments), upper=True)
    levels, scales = torch.empty_like(rest), rest.new_empty(len(rest), width // block)
    for start in range(0, width, block):
        stop = start + block
        scale = _scales(rest[:, start:stop])
        errors = torch.empty_like(rest[:, start:stop])
        for column in range(start, stop):
            levels[:, column] = (rest[:, column] / scale).round().clamp(-_ZERO, _ZERO - 1)
            error = (rest[:, column] - levels[:, column] * scale) / upper[column, column]
            rest[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
        scales[:, start // block] = scale
    return Blocks((levels + _ZERO).numpy().astype(np.uint8), scales.numpy().astype(np.float32))


def int4_rows(table: Tensor) -> Blocks:
    """A table V×D in 4 bit, rounded to the nearest; rows that no block divides have one scale each."""
    width = table.shape[1]
    block = block_of(width) or width
    blocks = table.double().reshape(-1, block)
    scales = _scales(blocks)[:, None]
    levels = (blocks / scales).round().clamp(-_ZERO, _ZERO - 1) + _ZERO
    return Blocks(levels.reshape(table.shape).numpy().astype(np.uint8), scales.reshape(len(table), -1).float().numpy())


def _scales(blocks: Tensor) -> Tensor:
    """Of blocks N×B the scales N with the least squared error; the largest weight lies at −8, so some are below 0."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    least = torch.full_like(largest, torch.inf)
    chosen = torch.ones_like(largest)
    for share in _SHARES:
        scales = torch.where(largest == 0, 1.0, share * largest / -_ZERO)
        error = ((blocks / scales).round().clamp(-_ZERO, _ZERO - 1) * scales - blocks).square().sum(1, keepdim=True)
        chosen = torch.where(error < least, scales, chosen)
        least = torch.minimum(error, least)
    return chosen[:, 0]


def with_int4_layers(graph: onnx.ModelProto, layers: Collection[str], weights: Mapping[str, Blocks]) -> onnx.ModelProto:
    """A copy of a float graph in which some linear layers have 4-bit weights; activations stay in float.

    They are tensors of 4 bit that `DequantizeLinear` expands by blocks, as ONNX has it. ONNX Runtime fuses that with
    the product (MatMulNBits), OpenVINO decompresses them as it multiplies; neither keeps the weights in float.

    Args:
        layers: names of the model's modules.
        weights: of these at least.
    """
    from onnx import helper, numpy_helper  # of an extra

    copied = type(graph)()
    copied.CopyFrom(graph)
    next(each for each in copied.opset_import if not each.domain).version = OPSET
    products = {node.name for node in products_of(copied, layers)}
    nodes, expanded = [], set()
    for node in copied.graph.node:
        if node.name in products:
            blocks, name = weights[module_of(node.name)], node.input[1]
            if name not in expanded:
                levels, scales = np.ascontiguousarray(blocks.levels.T), np.ascontiguousarray(blocks.scales.T)
                copied.graph.initializer.extend(
                    [
                        _four_bit(f"{name}_int4", levels),
                        _four_bit(f"{name}_zeros", np.full(scales.shape, _ZERO, np.uint8)),
                        numpy_helper.from_array(scales, f"{name}_scales"),
                    ]
                )
                parts = [f"{name}_int4", f"{name}_scales", f"{name}_zeros"]
                options: dict[str, Any] = {"axis": 0, "block_size": blocks.block, "name": f"{node.name}_weight"}
                nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}_float"], **options))
                expanded.add(name)
            node.input[1] = f"{name}_float"
            if is_turned(node):
                next(each for each in node.attribute if each.name == "transB").i = 0
        nodes.append(node)
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    drop_unread(copied)
    return copied


def with_int4_embeddings(graph: onnx.ModelProto, embeddings: Iterable[str]) -> onnx.ModelProto:
    """Copy a graph, with embeddings stored in 4 bit; only the rows that a batch has are looked up and expanded.

    Two halves of a row share its bytes: the first lies in their lower bits.

    Args:
        graph: in float32; it stays as it is.
        embeddings: names of the model's modules.
    """
    from onnx import TensorProto, helper, numpy_helper  # of an extra

    copied = type(graph)()
    copied.CopyFrom(graph)
    chosen, tables = set(embeddings), {each.name: each for each in copied.graph.initializer}
    nodes, stored = [], set()
    for node in copied.graph.node:
        reads = node.op_type == "Gather" and module_of(node.name) in chosen and node.input[0] in tables
        if not reads or tables[node.input[0]].dims[1] % 2:
            nodes.append(node)
            continue
        name, ids = node.input
        if name not in stored:
            blocks = int4_rows(torch.from_numpy(numpy_helper.to_array(tables[name]).copy()))
            half = blocks.levels.shape[1] // 2
            constants = {
                "int4": blocks.levels[:, :half] | blocks.levels[:, half:] << 4,
                "scales": blocks.scales.astype(np.float16),
                "blocks": np.repeat(np.arange(blocks.scales.shape[1]), blocks.block),
                "lower": np.array(15, np.uint8),
                "upper": np.array(240, np.uint8),
                "sixteenth": np.array(1 / 16, np.float32),
                "zero": np.array(_ZERO, np.float32),
            }
            copied.graph.initializer.extend(
                numpy_helper.from_array(each, f"{name}_{key}") for key, each in constants.items()
            )
            stored.add(name)
        steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
            ("Gather", ["table_int4", ids], "packed", {}),
            ("BitwiseAnd", ["packed", "table_lower"], "first_bits", {}),
            ("Cast", ["first_bits"], "first", {"to": TensorProto.FLOAT}),
            ("BitwiseAnd", ["packed", "table_upper"], "second_bits", {}),
            ("Cast", ["second_bits"], "sixteenfold", {"to": TensorProto.FLOAT}),
            ("Mul", ["sixteenfold", "table_sixteenth"], "second", {}),  # OpenVINO's BitShift rounds up
            ("Concat", ["first", "second"], "levels", {"axis": -1}),
            ("Sub", ["levels", "table_zero"], "centred", {}),
            ("Gather", ["table_scales", ids], "scale", {}),
            ("Cast", ["scale"], "scale_float", {"to": TensorProto.FLOAT}),
            ("Gather", ["scale_float", "table_blocks"], "scale_each", {"axis": -1}),
            ("Mul", ["centred", "scale_each"], node.output[0], {}),
        ]
        for operator, inputs, output, options in steps:
            given = [each if each == ids else _within(node.output[0], name, each) for each in inputs]
            made = output if output == node.output[0] else _within(node.output[0], name, output)
            nodes.append(helper.make_node(operator, given, [made], name=f"{node.name}_{output}", **options))
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    drop_unread(copied)
    return copied


def _within(output: str, table: str, part: str) -> str:
    """The name of a tensor: one of the table's, or one on the way to an output."""
    return f"{table}_{part.removeprefix('table_')}" if part.startswith("table_") else f"{output}_{part}"


def _four_bit(name: str, levels: NDArray) -> onnx.TensorProto:
    """Levels from 0 to 15 as an ONNX tensor of 4-bit numbers, two in each byte, the first in its lower bits."""
    from onnx import TensorProto

    flat = np.append(levels.reshape(-1), np.zeros(levels.size % 2, np.uint8))
    packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
    return TensorProto(name=name, data_type=TensorProto.UINT4, dims=levels.shape, raw_data=packed.tobytes())
