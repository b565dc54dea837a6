"""Which attention heads and feed-forward neurons a model has, and how each is cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compression.pruning.layouts import LAYOUTS, Layout
from distill.errors import InputError

Kind = Literal["heads", "neurons"]


_POSITIONS = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")
"""More that DeBERTa makes for each head, unless positions share the keys of words."""
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size", "split_size")
"""Attributes of attention modules that say how many heads there are, and how wide they are together."""


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
    """Of heads, the module that holds them."""


@dataclass(frozen=True)
class BlockSizes:
    """What is left in each block, the first one first: what pruning decided."""

    heads: tuple[int, ...]
    """Attention heads; of grouped-query attention the key-value heads, each with its queries."""
    neurons: tuple[int, ...]
    """Of the feed-forward networks."""


class NoHeads(nn.Module):
    """Attention without any head: what is left is the bias of its output layer."""

    def __init__(self, output_name: str | None = None, output: nn.Module | None = None):
        """Take the place of an attention module.

        Args:
            output_name: of the output layer, where it stands inside the attention module; and that layer.
        """
        super().__init__()
        self.output_name = output_name
        if output_name is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        """Give what attention would, and no attention weights."""
        empty = hidden_states.new_empty(*hidden_states.shape[:-1], 0)
        return (empty if self.output_name is None else self.get_submodule(self.output_name)(empty)), None


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
    if getattr(config, "quantization_config", None) is not None:
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
    """Cut a sublayer, in place, to the units of these indices.

    The weights, biases and sizes of its linear layers change; what the other units gave its output is left out.
    """
    cut_block(model.get_submodule(sublayer.block), sublayer, kept)


def cut_block(block: Any, sublayer: Sublayer, kept: Tensor) -> None:
    """`keep_units` for the block alone that holds the sublayer, or a copy of it."""
    for name in sublayer.inputs:
        layer = block.get_submodule(name)
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        per_unit = width // (sublayer.parts * sublayer.units)
        offsets = torch.arange(sublayer.parts) * (width // sublayer.parts)
        _select(layer, "outputs", (offsets[:, None] + columns_of(kept, per_unit)).flatten())
    _select(block.get_submodule(sublayer.output), "inputs", columns_of(kept, sublayer.width))
    if sublayer.kind == "heads":
        _tell_heads(block, sublayer, len(kept))


def cut_to_sizes(model: PreTrainedModel, sizes: BlockSizes) -> None:
    """Cut a model, in place, to the first units of each block: the shape that a pruned model's weights have.

    Raises:
        InputError: more units than there are, or other blocks.
    """
    sublayers = prunable_sublayers(model, ("neurons",))
    wanted = wanted_units(sublayers, sizes)
    for sublayer, units in zip(sublayers, wanted, strict=True):
        if units < sublayer.units:
            keep_units(model, sublayer, torch.arange(units))


def wanted_units(sublayers: Sequence[Sublayer], sizes: BlockSizes) -> list[int]:
    """For each sublayer the units that sizes leave it.

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
    """The indices of columns, each unit having `width` of them, of units of these indices."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def _attention(name: str, block: nn.Module, layout: Layout, config: Any) -> Sublayer:
    place = layout.attention_module
    module: Any = block.get_submodule(place)
    output: Any = block.get_submodule(layout.attention_output)
    if isinstance(module, NoHeads):
        return Sublayer(name, "heads", (), 1, layout.attention_output, 0, 1, layout.removable, place)
    head_size = getattr(module, "attention_head_size", None) or module.head_dim
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = head_size * (config.num_attention_heads // key_value_heads)
    names = {inside for inside, _ in block.named_modules()}
    inputs = (*layout.attention, *(position for position in _POSITIONS if position in names))
    parts = 3 if len(layout.attention) == 1 else 1
    units = _inputs_of(output) // width
    return Sublayer(name, "heads", inputs, parts, layout.attention_output, units, width, layout.removable, place)


def _feed_forward(name: str, block: nn.Module, layout: Layout) -> Sublayer:
    units = _inputs_of(block.get_submodule(layout.feed_forward_output))
    first: Any = block.get_submodule(layout.feed_forward[0])
    made = first.nf if isinstance(first, Conv1D) else first.out_features
    parts = made // units if units else 1  # two: a gated network whose halves are one matrix
    return Sublayer(
        name, "neurons", layout.feed_forward, parts, layout.feed_forward_output, units, 1, layout.removable, ""
    )


def _inputs_of(layer: Any) -> int:
    return layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features


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


def _tell_heads(block: Any, sublayer: Sublayer, units: int) -> None:
    """Let an attention module know how many heads it has, or put one in its place that has none."""
    module: Any = block.get_submodule(sublayer.module)
    if units == 0:
        inside = sublayer.output.startswith(f"{sublayer.module}.")
        name = sublayer.output.removeprefix(f"{sublayer.module}.") if inside else None
        empty = NoHeads(name, module.get_submodule(name) if name else None)
        block.set_submodule(sublayer.module, empty.train(module.training))
        return
    for name in (*_COUNTS, *_WIDTHS):
        if isinstance(before := getattr(module, name, None), int):
            setattr(module, name, before // sublayer.units * units)
