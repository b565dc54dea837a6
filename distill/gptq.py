"""Rounding 4-bit weights so that their errors cancel out on real inputs: GPTQ (Frantar et al. 2023)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.console import progress
from distill.fake_weights import twice_quantized
from distill.formats import QuantizationSettings
from distill.representations import accepted_inputs

_DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean (Frantar et al. 2023, section 3.3)."""
_COLUMNS = 128
"""Inputs whose errors are handed on to later ones together (the paper's lazy batches)."""


def compensate(
    model: PreTrainedModel,
    formats: Mapping[str, str],
    settings: QuantizationSettings,
    batches: Sequence[Mapping[str, Tensor]],
) -> None:
    """Move the weights of the linear layers that go to 4 bit, in place, onto the values that GPTQ rounds them to.

    Quantizing the model afterwards keeps these values: the scales of blocks stay what they were.

    Args:
        model: a float32 model.
        formats: of its modules, by name; embeddings and int8 layers stay as they are.
        batches: inputs of calibration rows, without labels.
    """
    linears: dict[str, Any] = {
        name: model.get_submodule(name)
        for name, format in formats.items()
        if format in ("nf4", "fp4") and not isinstance(model.get_submodule(name), nn.Embedding)
    }
    with _second_moments(linears) as moments, torch.inference_mode():
        for batch in progress(batches, "Reading the inputs of layers"):
            batch = {name: values.to(model.device) for name, values in batch.items()}
            moments.counted = batch.get("attention_mask")
            model(**accepted_inputs(model, batch))
    for name, linear in progress(linears.items(), "Rounding weights"):
        weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
        rounded = round_together(weight, moments.of[name], formats[name], settings)  # type: ignore[arg-type]
        linear.weight.data = (rounded.T if isinstance(linear, Conv1D) else rounded).to(linear.weight)


def round_together(
    weight: Tensor, moments: Tensor, format: Literal["nf4", "fp4"], settings: QuantizationSettings
) -> Tensor:
    """A weight (out×in) on values of a 4-bit format that change the layer's outputs least.

    Inputs are rounded one after the other, those with the largest second moment first, and the weights of the others
    make up for the error (Frantar et al. 2023, equations 2 and 3). A block's largest weight keeps its value, so the
    scale of the block is the same afterwards.

    Args:
        moments: in×in sums of products of the layer's inputs.

    Returns:
        In float32 what `FourBitLinear.fill` turns into these values exactly.
    """
    shape, count = weight.shape, weight.numel()
    values = bnb.functional.get_4bit_type(format, device="cpu").sort().values.unique()
    bounds = (values[:-1] + values[1:]) / 2
    flat = weight.detach().float().cpu().flatten()
    blocks = nn.functional.pad(flat, (0, -count % settings.block_size)).view(-1, settings.block_size)
    largest = torch.zeros_like(blocks, dtype=torch.bool)
    largest[torch.arange(len(blocks)), blocks.abs().argmax(1)] = True
    scales = blocks.abs().amax(1)
    kept = twice_quantized(scales) if settings.double_quant else scales
    kept = torch.where(scales > 0, kept, 1.0)  # a block of zeros stays one

    def of_weights(of_blocks: Tensor) -> Tensor:
        return of_blocks.expand_as(blocks).flatten()[:count].view(shape)

    moments = moments.cpu()
    order = moments.diagonal().argsort(descending=True)
    rest = flat.view(shape)[:, order]
    fixed = of_weights(largest)[:, order]
    scale, factor = of_weights(scales[:, None])[:, order], of_weights(kept[:, None])[:, order]
    upper = _inverse_factor(moments[order][:, order])
    signs, rounded = rest.sign(), torch.empty_like(rest)
    for start in range(0, len(order), _COLUMNS):
        stop = min(start + _COLUMNS, len(order))
        errors = torch.empty(len(rest), stop - start)
        for column in range(start, stop):
            value = values[torch.bucketize(rest[:, column] / factor[:, column], bounds)]
            value = torch.where(fixed[:, column], signs[:, column], value)
            rounded[:, column] = value * scale[:, column]
            error = (rest[:, column] - value * factor[:, column]) / upper[column, column]
            rest[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded[:, order.argsort()]


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments (Frantar et al. 2023, section 3.3)."""
    moments = moments.double()
    damping = _DAMPING * moments.diagonal().mean().clamp(min=1e-12)
    lower = torch.linalg.cholesky(moments + damping * torch.eye(len(moments), dtype=moments.dtype))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


class _Moments:
    """Sums over the counted tokens of products of each layer's inputs."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}
        self.counted: Tensor | None = None
        """B×T, ones for tokens and zeros for padding."""

    def add(self, name: str, inputs: Tensor) -> None:
        """Count a layer's inputs B×T×in in."""
        fits = self.counted is not None and inputs.shape[:-1] == self.counted.shape
        inputs = (inputs[self.counted.bool()] if fits else inputs.flatten(0, -2)).float()  # type: ignore[union-attr]
        self.of[name] = self.of.get(name, 0) + inputs.T @ inputs


@contextmanager
def _second_moments(linears: Mapping[str, nn.Module]) -> Iterator[_Moments]:
    moments = _Moments()
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: moments.add(name, inputs[0]))
        for name, linear in linears.items()
    ]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
