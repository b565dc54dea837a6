"""Modules whose weights are products of two smaller matrices, or those of another block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class FactorizedLinear(nn.Module):
    """A linear layer of two: …×in to …×rank to …×out.

    Under the name of the weight it stores one byte without dimensions, a shape that plain transformers refuses to load.

    Args:
        in_features: of the layer.
        out_features: of the layer.
        rank: between the two.
        bias: whether it has one.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool):
        super().__init__()
        store_bytes(self, ["weight"])
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def in_features(self) -> int:
        """How many features go in."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """How many features come out."""
        return self.up.out_features

    def forward(self, x: Tensor) -> Tensor:
        """…×in to …×out."""
        output = self.up(self.down(x))
        return output if self.bias is None else output + self.bias.to(output.dtype)


class FactorizedEmbedding(nn.Module):
    """An embedding of narrow rows, and their projection: ids to …×rank to …×D (Lan et al. 2020, section 3.1).

    Under the name of the weight it stores one byte without dimensions, a shape that plain transformers refuses to load.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        rank: of the rows.
        padding_idx: as of `nn.Embedding`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, *, padding_idx: int | None = None):
        super().__init__()
        store_bytes(self, ["weight"])
        self.table = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx)
        self.projection = nn.Linear(rank, embedding_dim, bias=False)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        """How many rows there are."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """How wide they are once they are projected."""
        return self.projection.out_features

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of `ids` (any shape …) as …×D."""
        return self.projection(self.table(ids))


class SharedLayer(nn.Module):
    """In place of a layer that computes with the weights of another one, which stores them.

    The other is looked up at each call, so whatever takes its place there (a quantized layer, one with an adapter)
    does so here too.

    Args:
        parent: of the other layer.
        name: of the other layer inside of its parent.
        before: the layer that is left out; its weights may lie on meta.
    """

    def __init__(self, parent: nn.Module, name: str, before: nn.Module):
        super().__init__()
        self._source = (parent, name)  # in a tuple, so that it is no submodule and is saved once
        store_bytes(self, list(before.state_dict()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the other layer's."""
        parent, name = self._source
        return parent.get_submodule(name)(*args, **kwargs)


def store_bytes(module: nn.Module, names: Sequence[str]) -> None:
    """Store a byte without dimensions under each name, a shape that plain transformers refuses to load.

    Where a name is merely missing, it draws random weights.

    Args:
        module: is changed.
        names: of weights that it does not have; modules inside of it are made where they aren't there.
    """
    for name in names:
        parent = module
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_buffer(last, torch.zeros((), dtype=torch.uint8))


def factors_of(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """The factors of a linear layer or embedding, empty and on meta, by their names inside of what holds them."""
    with torch.device("meta"):
        return {name: each for name, each in empty_factors(module, rank).named_parameters() if name != "bias"}


def empty_factors(module: Any, rank: int) -> FactorizedLinear | FactorizedEmbedding:
    """The module that holds two empty factors in place of a linear layer or embedding, with a bias if there was one."""
    if isinstance(module, nn.Embedding):
        shape = module.num_embeddings, module.embedding_dim
        return FactorizedEmbedding(*shape, rank, padding_idx=module.padding_idx)
    shape = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    return FactorizedLinear(*shape, rank, bias=module.bias is not None)
