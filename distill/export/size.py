"""The bytes of an export's weights, told from a skeleton of the model before anything is computed."""

from collections.abc import Collection
from typing import Literal

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.export.int4 import block_of
from distill.export.record import Format

_SCALE, _ZERO = 4, 1  # bytes
_BYTES: dict[Format, int] = {"fp32": 4, "fp16": 2, "int8": 4, "int4": 4}
"""Of a weight that stays in float."""


def export_size(
    model: PreTrainedModel,
    format: Format,
    *,
    layers: Collection[str] = (),
    embeddings: Collection[str] = (),
    stored: Literal["int8", "int4"] = "int8",
) -> int:
    """Count the bytes of an export's weights; names and operators of its graph come on top, some kB a block.

    Args:
        model: in float, possibly on meta.
        format: of the export.
        layers: names of the linear layers that are in int8 or int4, as the format says.
        embeddings: names of the embeddings that are, too. One that an output layer shares stays in float there.
        stored: in what.
    """
    weights = {id(parameter): parameter.numel() for parameter in model.parameters()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    size = _BYTES[format] * sum(weights.values())
    for name in [*layers, *embeddings]:
        module = model.get_submodule(name)
        outputs, inputs = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape  # type: ignore[arg-type]
        is_table = name in embeddings
        small = _size(outputs, inputs, stored if is_table else format, is_table=is_table)
        if small is None:  # it stays in float
            continue
        size += small
        if owners[id(module.weight)] == 1:
            size -= _BYTES[format] * outputs * inputs
    return size


def _size(outputs: int, inputs: int, format: Format, *, is_table: bool) -> int | None:
    """The bytes of a matrix; None where the format has none for its width."""
    if format == "int8":
        return outputs * inputs + (_SCALE if is_table else _SCALE + _ZERO) * outputs
    block = block_of(inputs) or (inputs if is_table else None)
    return None if block is None else (outputs * inputs + 1) // 2 + _SCALE * outputs * inputs // block
