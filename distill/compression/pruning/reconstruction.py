"""Least squares: what the output layers of what is left must be to give what the whole model gave."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.console import progress
from distill.compression.pruning.structure import Sublayer, columns_of
from distill.models.modes import evaluating
from distill.models.structure import accepted_inputs

_DAMPING = 1e-4
"""How hard weights are held where they were, as a share of the mean second moment of the inputs."""


@dataclass
class Moments:
    """Sums over the calibration tokens, of an output layer's inputs x (with a 1 behind) and of the wanted outputs y."""

    inputs: Tensor
    """(n+1)×(n+1) float64: x xᵀ."""
    outputs: Tensor
    """(n+1)×out float64: x yᵀ."""


def output_moments(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    batches: Sequence[Mapping[str, Tensor]],
) -> list[Moments]:
    """For the output layer of each sublayer the moments of its inputs in a model and its outputs in a reference.

    Padded positions are left out. A block that works several times in a model counts as often.

    Args:
        reference: the same blocks before anything was removed.
        batches: the model's inputs, without labels.
    """
    names = [f"{each.block}.{each.output}" for each in sublayers]
    found: dict[str, Moments] = {}
    with evaluating(model), evaluating(reference), torch.inference_mode():
        for batch in progress(batches, "Reading what blocks give"):
            inputs = accepted_inputs(model, {name: values.to(model.device) for name, values in batch.items()})
            wanted, read = _caught(reference, names, inputs)[1], _caught(model, names, inputs)[0]
            mask = inputs.get("attention_mask")
            for name in names:
                for x, y in zip(read[name], wanted[name], strict=True):
                    _add(found, name, _tokens(x, mask), _tokens(y, mask))
    return [found[name] for name in names]


def contributions(model: PreTrainedModel, sublayer: Sublayer, moments: Moments) -> Tensor:
    """For each unit Σ over tokens of the squared norm of what it adds to the sublayer's output: float64.

    What is called representational knowledge (K-prune: Park et al. 2024, arXiv 2308.03449).

    Args:
        model: whose weights are read.
        sublayer: of the model.
        moments: of the sublayer's output layer, by `output_moments`.
    """
    layer: Any = model.get_submodule(f"{sublayer.block}.{sublayer.output}")
    weight = layer.weight.detach().double().cpu()
    weight = weight if isinstance(layer, Conv1D) else weight.T
    shape = sublayer.units, sublayer.width
    of_units = moments.inputs[:-1, :-1].view(*shape, *shape).diagonal(dim1=0, dim2=2)  # width×width×units
    return torch.einsum("iju,uio,ujo->u", of_units, weight.view(*shape, -1), weight.view(*shape, -1))


def refit_output(model: PreTrainedModel, sublayer: Sublayer, kept: Tensor, moments: Moments) -> None:
    """Set the output layer's weights, in place, to those that reproduce the wanted outputs best from the kept units.

    W', b' = argmin Σ ‖y − W' x_kept − b'‖² + λ ‖W' − W_kept‖² (as Kwon et al. 2022 tune masks, but whole weights; λ
    holds them where the calibration tokens say nothing). Weights of the other units stay, to be cut. A layer without a
    bias gets none.

    Args:
        kept: indices of units.
    """
    layer: Any = model.get_submodule(f"{sublayer.block}.{sublayer.output}")
    columns = columns_of(kept, sublayer.width)
    weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
    size = len(moments.inputs) - 1
    rows = columns if layer.bias is None else torch.cat([columns, torch.tensor([size])])
    among = moments.inputs[rows][:, rows]
    damping = _DAMPING * moments.inputs.diagonal()[:size].mean().clamp(min=1e-12)
    before = torch.zeros(len(rows), len(weight), dtype=torch.float64)
    before[: len(columns)] = weight[:, columns].T.double().cpu()
    ridge = torch.full((len(rows),), damping.item(), dtype=torch.float64)
    ridge[len(columns) :] = 0  # the bias is free
    solved = torch.linalg.solve(among + ridge.diag(), moments.outputs[rows] + ridge[:, None] * before)
    weight[:, columns.to(weight.device)] = solved[: len(columns)].T.to(weight)
    if layer.bias is not None:
        layer.bias.data.copy_(solved[-1])


def _caught(
    model: PreTrainedModel, names: Sequence[str], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The inputs and the outputs of linear layers in one call of a model, for each time that they were called."""
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    given: dict[str, list[Tensor]] = {name: [] for name in names}

    def catch(name: str, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        read[name].append(arguments[0])
        given[name].append(output)

    with contextlib.ExitStack() as stack:
        for name in names:

            def hook(_: nn.Module, arguments: Any, output: Tensor, name: str = name) -> None:
                catch(name, arguments, output)

            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        model(**inputs)
    return read, given


def _tokens(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Those N×n of B×T×n that are no padding."""
    if attention_mask is not None and attention_mask.shape == states.shape[:-1]:
        return states[attention_mask.bool()]
    return states.flatten(0, -2)


def _add(found: dict[str, Moments], name: str, x: Tensor, y: Tensor) -> None:
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    if x.dtype != torch.float64:
        x, y = x.float(), y.float()
    products, with_outputs = (x.T @ x).double().cpu(), (x.T @ y).double().cpu()
    if name in found:
        found[name].inputs += products
        found[name].outputs += with_outputs
    else:
        found[name] = Moments(products, with_outputs)
