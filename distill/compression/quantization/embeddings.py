"""Embeddings in 8 and 4 bit, and output layers that share their weights."""

from collections.abc import Callable

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from torch import Tensor, nn

from distill.compression.quantization.layers import (
    keep_scales,
    move_without_cast,
    quant_state,
    register_scales,
)


class QuantizedEmbedding(nn.Module):
    """What int8 and 4-bit embeddings share.

    The rows lie flat in `weight`, a shape that plain transformers refuses to load into a float embedding: a model
    that is loaded without `import distill` raises instead of computing garbage.

    Args:
        dtype: of the looked-up rows; it follows the model's.
    """

    weight: Tensor
    like: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def fill(self, rows: Tensor) -> None:
        """Quantize float rows V×D."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Float32 rows of `ids` (any shape …) as …×D."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """All rows, V×D: the same bits as `forward` gives."""
        return self(torch.arange(self.num_embeddings, device=self.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of `ids` (any shape …) as …×D in the model's dtype."""
        return self.rows(ids).to(self.like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedEmbedding":
        move_without_cast(self, fn)
        return self


class Int8Embedding(QuantizedEmbedding):
    """Rows of int8 with a bfloat16 scale each, rounded up before the rows are: w ≈ scale · q, q in −127…127."""

    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__(num_embeddings, embedding_dim, dtype)
        self.register_buffer("weight", torch.empty(num_embeddings * embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(num_embeddings, dtype=torch.bfloat16))

    def fill(self, rows: Tensor) -> None:
        """Quantize float rows V×D."""
        rows = rows.detach().float()
        scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny)
        rounded = scale.to(torch.bfloat16)
        rounded = torch.where(
            rounded.float() < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded
        )
        quantized = (rows / rounded.float().unsqueeze(1)).round().clamp(-127, 127)
        self.weight, self.scale = quantized.to(torch.int8).reshape(-1), rounded
        self.to(rows.device)

    def rows(self, ids: Tensor) -> Tensor:
        """Float32 rows of `ids` (any shape …) as …×D."""
        rows = nn.functional.embedding(ids, self.weight.view(self.num_embeddings, self.embedding_dim))
        return rows.float() * nn.functional.embedding(ids, self.scale.float().unsqueeze(1))


class Nf4Embedding(QuantizedEmbedding):
    """NF4 (Dettmers et al. 2023, appendix E) in blocks that begin anew with every row, two weights a byte.

    Where `block_size` divides D these are the bits that bitsandbytes makes of the whole table. Quantized on the CPU.
    """

    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        double_quant: bool = True,
        block_size: int = 64,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype)
        self.double_quant = double_quant
        self.block_size = block_size
        self.blocks = -(-embedding_dim // block_size)
        bytes_of_a_row = (embedding_dim + 1) // 2
        self.register_buffer("weight", torch.empty(num_embeddings * bytes_of_a_row, dtype=torch.uint8))
        register_scales(self, num_embeddings * self.blocks, double_quant)

    def fill(self, rows: Tensor) -> None:
        """Quantize float rows V×D."""
        padding = self.blocks * self.block_size - self.embedding_dim
        padded = nn.functional.pad(rows.detach().float().cpu(), (0, padding)).contiguous()
        packed, state = quantize_4bit(
            padded, blocksize=self.block_size, compress_statistics=self.double_quant, quant_type="nf4"
        )
        bytes_of_a_row = (self.embedding_dim + 1) // 2
        self.weight = packed.view(self.num_embeddings, -1)[:, :bytes_of_a_row].reshape(-1)
        keep_scales(self, state)
        self.to(rows.device)

    def rows(self, ids: Tensor) -> Tensor:
        """Float32 rows of `ids` (any shape …) as …×D."""
        packed = nn.functional.embedding(ids, self.weight.view(self.num_embeddings, -1))
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)[..., : self.embedding_dim]
        values = get_4bit_type("nf4", device=codes.device)[codes.int()]
        scales = self._scales(ids).repeat_interleave(self.block_size, dim=-1)[..., : self.embedding_dim]
        return values * scales

    def dense(self) -> Tensor:
        """All rows, V×D: the same bits as `forward` gives."""
        if self.embedding_dim % self.block_size:
            return super().dense()
        return dequantize_4bit(self.weight, self._state()).to(self.like.dtype)

    def _scales(self, ids: Tensor) -> Tensor:
        """Scales of the rows' blocks, …×blocks."""
        stored = nn.functional.embedding(ids, self.absmax.view(self.num_embeddings, self.blocks))
        if not self.double_quant:
            return stored
        nested = self._state().state2
        blocks = ids.unsqueeze(-1) * self.blocks + torch.arange(self.blocks, device=ids.device)
        return nested.code[stored.int()] * nested.absmax[blocks // nested.blocksize] + self.nested_offset

    def _state(self) -> QuantState:
        shape = torch.Size((self.num_embeddings, self.embedding_dim))
        return quant_state(self, shape, "nf4", self.block_size, torch.float32)


class TiedLinear(nn.Module):
    """An output layer over a quantized embedding's own weights, expanded for each call; it stores a bias at most."""

    def __init__(self, embedding: QuantizedEmbedding, bias: nn.Parameter | None):
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is no submodule and is saved once
        self.bias = bias
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings

    @property
    def weight(self) -> Tensor:
        """V×D, the embedding's."""
        return self._embedding[0].dense()

    def forward(self, x: Tensor) -> Tensor:
        """…×D to …×V."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
