"""Which attention heads and feed-forward neurons a model has, and how each is cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.private_names import model_from_config
from distill.compression.pruning.layouts import LAYOUTS, Layout
from distill.errors import InputError
from distill.models.description import describe, grouped
from distill.models.modules import FactorizedLinear, SharedLayer
from distill.models.replacements import (
    Removed,
    RemovedModule,
    Resized,
    count_heads,
    is_quantized,
    structure_of,
    without_replacements,
)

Kind = Literal["heads", "neurons"]

POSITIONS = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")
"""More that DeBERTa makes for each head, unless positions share the keys of words."""


@dataclass(frozen=True)
class Sublayer:
    """The attention or the feed-forward network of one block."""

    block: str
    kind: Kind
    inputs: tuple[str, ...]
    """The linear layers that make its units; empty where none is left."""
    parts: int
    """How many pieces, each with all units, stand one after the other in an input layer's outputs."""
    output: str
    """The linear layer that reads its units."""
    units: int
    """Neurons, or attention heads; of grouped-query attention the key-value heads, each with its queries."""
    width: int
    """Columns of the output layer for each unit."""
    removable: bool
    """Whether none may be left."""
    module: str
    """What is left out, with the output layer, where none is."""


@dataclass(frozen=True)
class BlockSizes:
    """What is left in each block, the first one first: what pruning decided."""

    heads: tuple[int, ...]
    """Attention heads; of grouped-query attention the key-value heads, each with its queries."""
    neurons: tuple[int, ...]
    """Of the feed-forward networks."""


def prunable_sublayers(model: PreTrainedModel, kinds: Sequence[Kind] = ("heads", "neurons")) -> list[Sublayer]:
    """Every attention and feed-forward network of a model (which may lie on meta), block by block.

    Args:
        kinds: of what is to be cut.

    Raises:
        InputError: a model from which these can't be cut.
    """
    config = model.config
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise InputError(
            f"model: heads and neurons of {config.model_type} can't be cut; those of these can: {', '.join(LAYOUTS)}"
        )
    if is_quantized(config):
        raise InputError("model: it is quantized, and its weights can't be cut; prune the model it was made from")
    if getattr(config, "add_cross_attention", False):
        raise InputError("model: it attends to an encoder too, and such blocks can't be cut")
    if "heads" in kinds and not layout.own_heads:
        raise InputError(
            f"heads: all blocks of {config.model_type} share one position bias with a column for each head, so no "
            "block can lose heads; prune neurons alone"
        )
    found = []
    for name, block in model.named_modules():
        names = {inside for inside, _ in block.named_modules()}
        if {layout.attention_output, layout.feed_forward_output} <= names:
            if any(isinstance(module, FactorizedLinear | SharedLayer) for module in block.modules()):
                raise InputError(
                    "model: its layers are factorized or shared, and heads and neurons can't be cut from them; prune "
                    "the model before that"
                )
            found += [_attention(name, block, layout, config), _feed_forward(name, block, layout)]
    return found


def block_sizes(sublayers: Sequence[Sublayer], units: Sequence[int] | None = None) -> BlockSizes:
    """What a model's blocks have, or are left with.

    Args:
        units: of each sublayer; by default those it has now.
    """
    units = [each.units for each in sublayers] if units is None else units
    of_kinds: dict[Kind, list[int]] = {"heads": [], "neurons": []}
    for sublayer, count in zip(sublayers, units, strict=True):
        of_kinds[sublayer.kind].append(count)
    return BlockSizes(tuple(of_kinds["heads"]), tuple(of_kinds["neurons"]))


def keep_units(model: PreTrainedModel, sublayer: Sublayer, kept: Tensor) -> None:
    """Cut a sublayer, in place, to the units of these indices; without any, the bias of its output is what is left.

    Args:
        model: that holds the sublayer; its config stays as it is (see `record_sizes`).
        sublayer: as it is before the cut.
        kept: indices of the units that stay (int64).
    """
    cut_block(model.get_submodule(sublayer.block), sublayer, kept)


def cut_block(block: Any, sublayer: Sublayer, kept: Tensor) -> None:
    """Cut a sublayer as `keep_units` does, given only the block that holds it, or a copy of that block.

    Args:
        block: is changed.
        sublayer: as it is before the cut.
        kept: indices of the units that stay (int64).
    """
    if not len(kept):
        _remove(block, sublayer)
        return
    for name in sublayer.inputs:
        layer = block.get_submodule(name)
        width = _features(layer)[1]
        per_unit = width // (sublayer.parts * sublayer.units)
        offsets = torch.arange(sublayer.parts) * (width // sublayer.parts)
        _select(layer, "outputs", (offsets[:, None] + columns_of(kept, per_unit)).flatten())
    _select(block.get_submodule(sublayer.output), "inputs", columns_of(kept, sublayer.width))
    if sublayer.kind == "heads":
        count_heads(block.get_submodule(sublayer.module))


def cut_to_sizes(model: PreTrainedModel, sizes: BlockSizes) -> None:
    """Cut a model, in place, to the first units of each block: the shape that a pruned model's weights have.

    Args:
        model: may lie on meta; its config stays as it is (see `record_sizes`).
        sizes: how many units are left in each block.

    Raises:
        InputError: more units than there are, or other blocks; else as `prunable_sublayers`.
    """
    sublayers = prunable_sublayers(model, ("neurons",))
    wanted = wanted_units(sublayers, sizes)
    for sublayer, units in zip(sublayers, wanted, strict=True):
        if units < sublayer.units:
            keep_units(model, sublayer, torch.arange(units))


def record_sizes(model: PreTrainedModel) -> None:
    """Let a model's config say the sizes of its blocks, so that the model loads again.

    Where all blocks have the same number of neurons, and all their heads, plain transformers can read it.
    """
    config, sublayers = model.config, prunable_sublayers(model, ("neurons",))
    neurons = set(block_sizes(sublayers).neurons) - {0}
    if len(neurons) == 1:
        setattr(config, LAYOUTS[config.model_type].size_name, neurons.pop())
    with torch.device("meta"):
        plain = model_from_config(type(model), without_replacements(config))
    own: set[str] = set()
    replacements: dict[str, Resized | Removed] = {}
    for sublayer in sublayers:
        block = model.get_submodule(sublayer.block)
        removed = removal(block, sublayer)
        names = [f"{sublayer.block}.{name}" for name in (*sublayer.inputs, sublayer.output)]
        own |= {*names, *(f"{sublayer.block}.{name}" for name in removed)}
        if not sublayer.units:
            replacements |= {f"{sublayer.block}.{name}": each for name, each in removed.items()}
            continue
        sizes = {name: _features(model.get_submodule(name)) for name in names}
        replacements |= {
            name: Resized(*each) for name, each in sizes.items() if each != _features(plain.get_submodule(name))
        }
    entries = [
        replace(entry, names=tuple(name for name in entry.names if name not in own)) for entry in structure_of(config)
    ]
    entries = [*(entry for entry in entries if entry.names), *grouped(replacements)]
    if entries:
        config.quantization_config = describe(entries)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def wanted_units(sublayers: Sequence[Sublayer], sizes: BlockSizes) -> list[int]:
    """For each sublayer the units that sizes leave it.

    Args:
        sublayers: of the whole model, as `prunable_sublayers` lists them.

    Raises:
        InputError: more units than there are, none where some must stay, or other blocks.
    """
    left = {"heads": list(sizes.heads), "neurons": list(sizes.neurons)}
    wanted = []
    for kind, counts in left.items():
        blocks = [each for each in sublayers if each.kind == kind]
        if len(counts) != len(blocks):
            raise InputError(f"{kind}: {len(counts)} sizes, and the model has {len(blocks)} blocks")
        for number, (each, count) in enumerate(zip(blocks, counts, strict=True)):
            if not (0 if each.removable else min(1, each.units)) <= count <= each.units:
                least = 0 if each.removable else 1
                raise InputError(
                    f"{kind}: block {number} has {each.units}, and {least} to as many can be left: {count}"
                )
    for each in sublayers:
        wanted.append(left[each.kind].pop(0))
    return wanted


def columns_of(units: Tensor, width: int) -> Tensor:
    """The indices of the columns that belong to units of these indices: N units give N · width columns.

    Args:
        units: N indices (int64).
        width: columns of each unit, which stand side by side.
    """
    return (units[:, None] * width + torch.arange(width)).flatten()


def _attention(name: str, block: nn.Module, layout: Layout, config: Any) -> Sublayer:
    module: Any = block.get_submodule(layout.attention_module)
    place, output, removable = layout.attention_module, layout.attention_output, layout.removable
    if isinstance(module, RemovedModule):
        return Sublayer(name, "heads", (), 1, output, 0, 1, removable, place)
    head_size = getattr(module, "attention_head_size", None) or module.head_dim
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = head_size * (config.num_attention_heads // key_value_heads)
    names = {inside for inside, _ in block.named_modules()}
    inputs = (*layout.attention, *(position for position in POSITIONS if position in names))
    parts = 3 if len(layout.attention) == 1 else 1
    units = _features(block.get_submodule(output))[0] // width
    return Sublayer(name, "heads", inputs, parts, output, units, width, removable, place)


def _feed_forward(name: str, block: nn.Module, layout: Layout) -> Sublayer:
    place, output, removable = layout.feed_forward_module, layout.feed_forward_output, layout.removable
    if isinstance(block.get_submodule(place), RemovedModule):
        return Sublayer(name, "neurons", (), 1, output, 0, 1, removable, place)
    units = _features(block.get_submodule(output))[0]
    made = _features(block.get_submodule(layout.feed_forward[0]))[1]
    parts = made // units  # two: a gated network whose halves are one matrix
    return Sublayer(name, "neurons", layout.feed_forward, parts, output, units, 1, removable, place)


def _features(layer: Any) -> tuple[int, int]:
    """Of a linear layer, how many go in and come out."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def _select(layer: Any, side: Literal["inputs", "outputs"], indices: Tensor) -> None:
    """Cut a linear layer to some of its inputs or outputs."""
    transposed = isinstance(layer, Conv1D)
    indices = indices.to(layer.weight.device)
    axis = 1 if (side == "inputs") != transposed else 0
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, indices), layer.weight.requires_grad)
    if side == "outputs" and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().index_select(0, indices), layer.bias.requires_grad)
    size = {"inputs": "nx" if transposed else "in_features", "outputs": "nf" if transposed else "out_features"}[side]
    setattr(layer, size, len(indices))


def _remove(block: Any, sublayer: Sublayer) -> None:
    """Leave a sublayer out of its block, but for the bias of its output layer."""
    for name, removed in removal(block, sublayer).items():
        before = block.get_submodule(name)
        trained = all(parameter.requires_grad for parameter in before.parameters())
        bias = None if removed.bias is None else before.get_parameter(removed.bias)
        like = next(before.parameters())
        removed.put(block, name)
        after = block.get_submodule(name).to(like.device).train(before.training)
        if bias is not None:
            after.get_parameter(removed.bias).data = bias.detach().clone()
        after.requires_grad_(trained)


def removal(block: nn.Module, sublayer: Sublayer) -> dict[str, Removed]:
    """What takes the place of a block's modules where a sublayer is left out, by their names inside of the block.

    Args:
        block: that holds the sublayer, or where it stood; it stays as it is.
        sublayer: of this block.
    """
    output: Any = block.get_submodule(sublayer.output)
    is_attention = sublayer.kind == "heads"
    has_bias = "bias" in output.state_dict()
    if sublayer.output.startswith(f"{sublayer.module}."):
        bias = f"{sublayer.output.removeprefix(f'{sublayer.module}.')}.bias" if has_bias else None
        return {sublayer.module: Removed(attention=is_attention, bias=bias)}
    return {
        sublayer.module: Removed(attention=is_attention),
        sublayer.output: Removed(bias="bias" if has_bias else None),
    }
