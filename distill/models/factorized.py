"""Linear layers and embeddings whose weight is the product of two smaller matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:  # the quantizer is registered while they are being imported
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Factorized:
    """A linear layer (or `Conv1D`) or embedding whose weight is a product of two.

    Args:
        rank: how many columns the first factor has, and rows the second.
    """

    kind: ClassVar[str] = "factorized"

    rank: int

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put two empty factors into a model, beside the bias if there was one.

        Args:
            model: is changed.
            name: of the layer or embedding that they take the place of.
        """
        before: Any = model.get_submodule(name)
        model.set_submodule(name, _factors(before, self.rank).to(before.weight.dtype))


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
        self.register_buffer("weight", torch.zeros((), dtype=torch.uint8))
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
        self.register_buffer("weight", torch.zeros((), dtype=torch.uint8))
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


def factors_of(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """The factors of a linear layer or embedding, empty and on meta, by their names inside of what holds them."""
    with torch.device("meta"):
        return {name: each for name, each in _factors(module, rank).named_parameters() if name != "bias"}


def _factors(module: Any, rank: int) -> FactorizedLinear | FactorizedEmbedding:
    if isinstance(module, nn.Embedding):
        shape = module.num_embeddings, module.embedding_dim
        return FactorizedEmbedding(*shape, rank, padding_idx=module.padding_idx)
    shape = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    return FactorizedLinear(*shape, rank, bias=module.bias is not None)
