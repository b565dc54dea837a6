"""How much a model's predictions would change without a head or neuron: importance without labels."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.console import progress
from distill.compression.pruning.structure import Sublayer
from distill.losses import per_label
from distill.models.modes import evaluating
from distill.models.structure import accepted_inputs
from distill.tasks.kinds import targets_of
from distill.tasks.outputs import logits_of
from distill.tasks.targets import Targets, logits_under_mask

Importance = Literal["fisher", "taylor", "magnitude"]

_MOST_EXACT = 16
"""Classes up to which the information of each is added up; beyond, and where a row has many predictions, sums with
random signs estimate it."""
_SIGNS = 8
"""Of these sums, for each row."""
_PREDICTIONS = 1024
"""Of a batch, for language models: logits of all tokens would not fit into memory."""


def magnitudes(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> list[Tensor]:
    """For each sublayer the units' products of the norms of their incoming and outgoing weights, over the mean of them.

    It is how much a unit can change what the block adds (Michel et al. 2019 rank heads by what they add); between
    sublayers only what is large within its own can be compared.

    Args:
        sublayers: of the model, each with at least one unit.

    Returns:
        Float64, one value for each unit.
    """
    found = []
    for sublayer in sublayers:
        block = model.get_submodule(sublayer.block)
        logarithms = _norms(block.get_submodule(sublayer.output), sublayer.units, axis=1).log()
        for name in sublayer.inputs:
            norms = _norms(block.get_submodule(name), sublayer.parts * sublayer.units, axis=0)
            logarithms = logarithms + norms.view(sublayer.parts, sublayer.units).log().sum(0)
        product = logarithms.exp()
        found.append(product / product.mean().clamp(min=torch.finfo(torch.float64).tiny))
    return found


def fisher_information(
    model: PreTrainedModel, sublayers: Sequence[Sublayer], batches: Sequence[Mapping[str, Tensor]]
) -> list[Tensor]:
    """For each sublayer the Fisher information of a mask over its units: to second order, twice the divergence.

    Σ over rows and classes of p (∂ log p/∂ mask)², p being the model's own predictions (Kwon et al. 2022,
    with the expectation over labels taken, since there are none); of scores the squared derivative. A row with one
    prediction among at most 16 classes is exact. For tokens, spans and more classes the squares of 8 sums with random
    signs are averaged, which are right in expectation (Hutchinson 1990).

    Args:
        batches: the model's inputs, without labels; their order decides the random signs.

    Returns:
        Float64, one value for each unit.
    """
    targets = targets_of(model)
    generator = torch.Generator().manual_seed(0)

    def directions(batch: Mapping[str, Tensor], logits: Tensor) -> Iterator[Tensor]:
        exact = targets.per_row and logits.shape[-1] <= _MOST_EXACT
        yield from _factors(targets, logits) if exact else _signed_factors(targets, logits, generator)

    return _squared_derivatives(model, sublayers, batches, directions)


def taylor_of_divergence(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    batches: Sequence[Mapping[str, Tensor]],
    reference: PreTrainedModel,
) -> list[Tensor]:
    """For each sublayer Σ over rows of |∂ divergence/∂ mask|, from the predictions of a reference (Michel et al. 2019).

    The divergence is KL(reference ‖ model), of scores half the squared difference. At the reference itself it is 0.

    Args:
        batches: the model's inputs, without labels.
        reference: the model before anything was removed.

    Returns:
        Float64, one value for each unit.
    """
    targets = targets_of(model)

    def directions(batch: Mapping[str, Tensor], logits: Tensor) -> Iterator[Tensor]:
        with torch.no_grad():
            wanted = _predictions(targets, batch, logits_of(reference(**batch)))
        yield _expected(targets, logits) - _expected(targets, wanted)

    return _squared_derivatives(model, sublayers, batches, directions, power=1)


def _squared_derivatives(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    batches: Sequence[Mapping[str, Tensor]],
    directions: Any,
    *,
    power: int = 2,
) -> list[Tensor]:
    """For each unit the sum, over rows and directions, of powers of the derivative of logits in that direction.

    Args:
        directions: from a batch and the logits N×C of its predictions to directions N×C.
    """
    targets = targets_of(model)
    found = [torch.zeros(each.units, dtype=torch.float64) for each in sublayers]
    with evaluating(model), _frozen(model):
        for batch in progress(batches, "Reading what heads and neurons do"):
            inputs = accepted_inputs(model, {name: values.to(model.device) for name, values in batch.items()})
            rows = len(next(iter(inputs.values())))
            masks = [torch.ones(rows, each.units, device=model.device, dtype=model.dtype) for each in sublayers]
            with _masked(model, sublayers, [mask.requires_grad_() for mask in masks]):
                logits = _predictions(targets, inputs, logits_of(model(**inputs)))
            for direction in directions(inputs, logits.detach()):
                derivatives = torch.autograd.grad((logits * direction).sum(), masks, retain_graph=True)
                for sums, derivative in zip(found, derivatives, strict=True):
                    sums += derivative.double().abs().pow(power).sum(0).cpu()
    return found


def _factors(targets: Targets, logits: Tensor) -> Iterator[Tensor]:
    """Directions N×C whose outer products add up to the Fisher information of predictions N×C in their logits."""
    if targets.distributions is None:
        yield torch.ones_like(logits)
    elif targets.distributions is per_label:
        deviation = (logits.sigmoid() * (-logits).sigmoid()).sqrt()
        for label in range(logits.shape[-1]):
            yield deviation * F.one_hot(torch.tensor(label), logits.shape[-1]).to(deviation)
    else:
        probabilities = logits.softmax(-1)
        for label in range(logits.shape[-1]):
            chosen = F.one_hot(torch.tensor(label), logits.shape[-1]).to(logits)
            yield probabilities[:, label : label + 1].sqrt() * (chosen - probabilities)


def _signed_factors(targets: Targets, logits: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Sums N×C of the directions of `_factors` with random signs, for every prediction its own."""
    for _ in range(_SIGNS):
        signs = (torch.randint(2, logits.shape, generator=generator) * 2 - 1).to(logits) / math.sqrt(_SIGNS)
        if targets.distributions is None:
            yield signs
        elif targets.distributions is per_label:
            yield signs * (logits.sigmoid() * (-logits).sigmoid()).sqrt()
        else:
            probabilities = logits.softmax(-1)
            signed = signs * probabilities.sqrt()
            yield signed - signed.sum(-1, keepdim=True) * probabilities


def _expected(targets: Targets, logits: Tensor) -> Tensor:
    """The gradient of a divergence in its logits is the difference of these: probabilities, or scores."""
    if targets.distributions is None:
        return logits
    return logits.sigmoid() if targets.distributions is per_label else logits.softmax(-1)


def _predictions(targets: Targets, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The logits N×C, at least in float32, of a batch's predictions that count; of a language model's some."""
    counted = logits_under_mask(targets, batch, logits)
    if targets.over_vocabulary:
        counted = counted[:: 1 + len(counted) // _PREDICTIONS]
    return counted if counted.dtype == torch.float64 else counted.float()


@contextlib.contextmanager
def _masked(model: PreTrainedModel, sublayers: Sequence[Sublayer], masks: Sequence[Tensor]) -> Iterator[None]:
    """Multiply every unit (a column of zeros, a head) of each row by its mask B×units, before the output layer."""
    with contextlib.ExitStack() as stack:
        for sublayer, mask in zip(sublayers, masks, strict=True):
            columns = mask.repeat_interleave(sublayer.width, dim=1).unsqueeze(1)
            output = model.get_submodule(f"{sublayer.block}.{sublayer.output}")
            hook = output.register_forward_pre_hook(lambda _, inputs, columns=columns: (inputs[0] * columns,))
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter asks for a gradient; those that did do so again afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _norms(layer: Any, units: int, *, axis: int) -> Tensor:
    """Of a linear layer's weight, the norm of each unit's part; `axis` 0: its outputs are units, 1: its inputs."""
    weight = layer.weight.detach().double().cpu()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    weight = weight if axis == 0 else weight.T
    return weight.reshape(units, -1).norm(dim=1)
