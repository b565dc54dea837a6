"""Rounding 4-bit weights so that their errors cancel out on real inputs: GPTQ (Frantar et al. 2023)."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.console import progress
from distill.compression.moments import gradient_moments, input_moments
from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.simulated import twice_quantized

logger = logging.getLogger(__name__)

_DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean (Frantar et al. 2023, section 3.3)."""
_COLUMNS = 128
"""Inputs whose errors are handed on to later ones together (the paper's lazy batches)."""
_SCALES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Scales of a block to choose from, as shares of its largest weight."""


def compensate(
    model: PreTrainedModel,
    formats: Mapping[str, str],
    settings: QuantizationSettings,
    batches: Sequence[Mapping[str, Tensor]],
) -> None:
    """Move the weights that go to 4 bit, in place, onto the values that GPTQ rounds them to.

    Quantizing the model afterwards keeps these values. What an error costs follows for linear layers from the second
    moments of their inputs; for embeddings, whose rows stand alone, from those of the gradients that reach them
    (Hassibi & Stork 1993, section 2). Embeddings that are the output layer's weights too are left to plain rounding.

    Args:
        model: a float32 model.
        formats: of its modules, by name; those in int8 stay as they are.
        batches: inputs of calibration rows, without labels.
    """
    chosen: dict[str, Any] = {name: model.get_submodule(name) for name, each in formats.items() if each != "int8"}
    tied = model.get_output_embeddings()
    linears = {name: module for name, module in chosen.items() if not isinstance(module, nn.Embedding)}
    embeddings = {
        name: module
        for name, module in chosen.items()
        if isinstance(module, nn.Embedding) and (tied is None or tied.weight is not module.weight)
    }
    moments = input_moments(model, linears, batches) | gradient_moments(model, embeddings, batches)
    unread = [name for name in (linears | embeddings) if name not in moments]
    if unread:
        logger.warning("gptq: calibration rows never reach %s; rounded plainly", ", ".join(unread))
    for name, moment in progress(moments.items(), "Rounding weights"):
        module = chosen[name]
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        width = weight.shape[1]
        # The blocks of an embedding begin anew with every row.
        extra = -width % settings.block_size if name in embeddings else 0
        padded, of_padded = nn.functional.pad(weight, (0, extra)), nn.functional.pad(moment, (0, extra, 0, extra))
        rounded = round_together(padded, of_padded, formats[name], settings)[:, :width]  # type: ignore[arg-type]
        module.weight.data = (rounded.T if isinstance(module, Conv1D) else rounded).to(module.weight)


def round_together(
    weight: Tensor, moments: Tensor, format: Literal["nf4", "fp4"], settings: QuantizationSettings
) -> Tensor:
    """A weight (out×in) on values of a 4-bit format that change the layer's outputs least.

    Inputs are rounded one after the other, those with the largest second moment first, and the weights of the others
    make up for the error (Frantar et al. 2023, equations 2 and 3). The scale of a block is chosen before (`_scales`)
    and its largest weight goes to the end of it, so that quantizing afterwards finds the same scale.

    Args:
        moments: in×in sums of products of the layer's inputs, or D×D of an embedding's gradients.

    Returns:
        In float32 what `FourBitLinear.fill` turns into these values exactly.
    """
    shape, count = weight.shape, weight.numel()
    values = bnb.functional.get_4bit_type(format, device="cpu").sort().values.unique()
    bounds = (values[:-1] + values[1:]) / 2
    flat = weight.detach().float().cpu().flatten()

    def in_blocks(of_weights: Tensor) -> Tensor:
        return nn.functional.pad(of_weights, (0, -count % settings.block_size)).view(-1, settings.block_size)

    def of_weights(of_blocks: Tensor) -> Tensor:
        return of_blocks.expand(-1, settings.block_size).flatten()[:count].view(shape)

    moments = moments.cpu()
    inverse = damped_inverse(moments)
    costs = (1 / inverse.diagonal()).float().expand(shape).flatten()
    scales, largest = _scales(in_blocks(flat), in_blocks(costs), values, bounds)
    kept = twice_quantized(scales) if settings.double_quant else scales
    kept = torch.where(scales > 0, kept, 1e30)  # in a block of zeros nothing but zero is near

    order = moments.diagonal().argsort(descending=True)
    rest = flat.view(shape)[:, order]
    fixed = of_weights(largest)[:, order]
    scale, factor = of_weights(scales[:, None])[:, order], of_weights(kept[:, None])[:, order]
    upper = torch.linalg.cholesky(inverse[order][:, order], upper=True).float()
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


def _scales(blocks: Tensor, costs: Tensor, values: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Of blocks B×S the scales B at which rounding costs least, and the weights B×S that are put at their ends.

    Below the largest weight a scale clips it, and has finer steps for the others.

    Args:
        costs: of a squared error of each weight once all others make up for it, B×S (Frantar & Alistarh 2022,
            section 5).
    """
    scales, places = blocks.abs().max(1)
    largest = torch.zeros_like(blocks, dtype=torch.bool)
    largest[torch.arange(len(blocks)), places] = True
    cheapest, chosen = torch.full_like(scales, torch.inf), scales
    for factor in _SCALES:
        each = factor * scales[:, None]
        rounded = values[torch.bucketize(blocks / torch.where(each > 0, each, 1e30), bounds)]
        rounded = torch.where(largest, blocks.sign(), rounded) * each
        cost = ((blocks - rounded).square() * costs).sum(1)
        chosen = torch.where(cost < cheapest, factor * scales, chosen)
        cheapest = torch.minimum(cost, cheapest)
    return chosen, largest


def damped_inverse(moments: Tensor) -> Tensor:
    """The inverse of second moments, their diagonal damped (Frantar et al. 2023, section 3.3), in double precision."""
    moments = moments.double()
    damping = _DAMPING * moments.diagonal().mean().clamp(min=1e-12)
    damped = moments + damping * torch.eye(len(moments), dtype=moments.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
