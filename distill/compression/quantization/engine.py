"""Training that computes as an inference engine in int8 will: weights and activations on the grids of its export."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compression.quantization.formats import quantizable_modules
from distill.compression.quantization.grids import LARGEST_WEIGHT, LEVELS, LayerGrid, SimulatedGrids, layer_grids
from distill.compression.quantization.qat import forwards_replaced, straight_through

_RATE = 1e-3
"""Of Adam on the logarithms of a range's ends, at the beginning; it falls to 0 over the training."""
_BETAS, _EPSILON = (0.9, 0.99), 1e-10


@contextmanager
def computed_as_exported(simulation: "EngineSimulation") -> Iterator["EngineSimulation"]:
    """Run a model's forward as the engine will that it is exported to.

    Linear layers of the blocks multiply integers: inputs in 8 bits unsigned, with one scale and zero point for all
    that such a layer reads, by weights from −64 to 64 with a scale for each output; biases are added in float. Rows of
    embeddings have 8 bits and a scale each. All else stays in float, an output layer that shares the embeddings too.

    The weights themselves stay what they are, under the same names; their gradients are those by the rounded ones
    (straight through; Bengio et al. 2013), and inputs beyond their range get none.
    """
    with forwards_replaced(simulation.forwards):
        yield simulation


class EngineSimulation:
    """The arithmetic of one model in an engine, and the ranges of its activations, which are trained.

    A range's ends get the gradient of LSQ (Esser et al. 2020, eq. 3; both ends as in LSQ+, Bhalgat et al. 2020): what
    is clipped moves the end that it is beyond, the error of rounding moves both. Adam steps on their logarithms (Jain
    et al. 2020, TQT, section 3.3), which keeps signs.

    Args:
        model: a float model.
        engine: that it is trained for; all compute alike.
        embeddings: whether they have 8 bits too.
        grids: to begin with; without them it computes in float until `calibrate`.
    """

    def __init__(self, model: PreTrainedModel, engine: str, *, embeddings: bool, grids: SimulatedGrids | None = None):
        self.on = True
        """Whether training computes so too; an evaluation always does."""
        self._model, self._engine = model, engine
        modules = quantizable_modules(model)
        self._layers = {name: each for name, each in modules.items() if not isinstance(each, nn.Embedding)}
        self._embeddings = [name for name in modules if name not in self._layers] if embeddings else []
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # codes of a layer's weight since the last step
        self.forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {
            each: partial(self._linear, name, each) for name, each in self._layers.items()
        }
        for name in self._embeddings:
            self.forwards[modules[name]] = partial(self._embedding, modules[name])
        self._number: dict[str, int] = {}  # of the grid of each layer
        self.take([] if grids is None else grids.grids)

    @property
    def grids(self) -> SimulatedGrids | None:
        """What it computes in 8 bits, and on what grids; None where these are not found yet."""
        if not self._number:
            return None
        ends = self.ends.detach().cpu().T.tolist()
        trained = [replace(each, low=low, high=high) for each, (low, high) in zip(self._grids, ends, strict=True)]
        return SimulatedGrids(engine=self._engine, embeddings=self._embeddings, grids=trained)

    def calibrate(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Find the grids on calibration rows, as `export_model` would.

        Args:
            batches: the model's inputs, on its device.
        """
        self.take(layer_grids(self._model, self._layers, batches))

    def take(self, grids: Sequence[LayerGrid]) -> None:
        """Compute on these grids, and forget what the ranges before were trained by."""
        device = self._model.device
        self._grids = list(grids)
        self._number = {name: number for number, each in enumerate(grids) for name in each.layers}
        ends = torch.tensor([(each.low, each.high) for each in grids], dtype=torch.float32, device=device)
        self.ends = ends.reshape(-1, 2).T.contiguous().requires_grad_()
        """The lowest and the highest value of each grid, 2×G."""
        self._factors = [
            None if each.factors is None else torch.tensor(each.factors, dtype=torch.float32, device=device)
            for each in grids
        ]
        self._moments = torch.zeros(2, *self.ends.shape, device=device)  # Adam's means of gradients and of squares
        self._steps = 0

    @property
    def state(self) -> dict[str, Tensor]:
        """What the training of the ranges goes on with, beside the grids."""
        return {"moments": self._moments, "steps": torch.tensor(self._steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` gave, after `take` of the grids."""
        self._moments, self._steps = state["moments"].to(self._model.device), int(state["steps"])

    def begin_step(self, *, on: bool) -> None:
        """Round weights anew from here on.

        Args:
            on: whether the coming step computes in 8 bits.
        """
        self.on = on
        self._kept = {
            module: kept for module, kept in self._kept.items() if not module.get_parameter("weight").requires_grad
        }

    def train_ranges(self, progress: float, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Take the step of the ranges for which there are gradients since the last one.

        Args:
            progress: the share of all steps that are done.
            gather: collects a tensor N×… from all processes.
        """
        if self.ends.grad is None:
            return
        gradient = gather(self.ends.grad.unsqueeze(0)).mean(0) * self.ends.detach()  # by their logarithms
        gradient = gradient.nan_to_num(nan=0, posinf=0, neginf=0)  # a step in float16 whose scaled loss overflows
        self.ends.grad = None
        self._steps += 1
        corrected = []
        for moment, beta, seen in zip(self._moments, _BETAS, (gradient, gradient**2), strict=True):
            moment.mul_(beta).add_(seen, alpha=1 - beta)
            corrected.append(moment / (1 - beta**self._steps))
        mean, square = corrected
        with torch.no_grad():
            self.ends.mul_((-_RATE * (1 - progress) * mean / (square.sqrt() + _EPSILON)).exp())

    def _computes(self, module: nn.Module) -> bool:
        return bool(self._number) and (self.on or not module.training)

    def _linear(self, name: str, linear: nn.Linear | Conv1D, inputs: Tensor) -> Tensor:
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        number = self._number.get(name)
        if number is None or not self._computes(linear):
            return nn.functional.linear(inputs, weight, linear.bias)
        factors, ends = self._factors[number], self.ends[:, number]
        if factors is not None:
            inputs, weight = inputs * (1 / factors), weight * factors
        if linear not in self._kept:
            self._kept[linear] = weight_codes(weight.detach())
        codes, scales = self._kept[linear]
        # Products of whole numbers are exact in bfloat16 too, in which most of a training may compute.
        product = nn.functional.linear(activation_codes(inputs, ends), straight_through(weight / scales, codes))
        outputs = product * (scale_and_zero(ends.detach())[0] * scales.squeeze(1))
        return (outputs if linear.bias is None else outputs + linear.bias).to(product.dtype)

    def _embedding(self, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        rows = nn.Embedding.forward(embedding, ids)
        return straight_through(rows, rounded_rows(rows.detach())) if self._computes(embedding) else rows


def activation_codes(values: Tensor, ends: Tensor) -> Tensor:
    """Values as whole numbers q − z, of codes q from 0 to 255; they are multiplied by the scale afterwards.

    Args:
        values: any shape.
        ends: the lowest and the highest value of the range (shape 2); their gradient takes the scale after it in.
    """
    return _ActivationCodes.apply(values, ends)


class _ActivationCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ends: Tensor) -> Tensor:
        scale, zero = scale_and_zero(ends)
        codes = (values.float() / scale).round() + zero
        ctx.save_for_backward(values, codes, scale, zero)
        return codes.clamp(0, LEVELS) - zero

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        values, codes, scale, zero = ctx.saved_tensors
        gradient = gradients[0].float() / scale  # by the rounded values
        below, above = codes < 0, codes > LEVELS
        of_values = gradient.masked_fill(below | above, 0)
        rounding = (of_values * (codes - zero - values.float() / scale)).sum() / LEVELS
        low, high = (gradient.masked_select(beyond).sum() for beyond in (below, above))
        return of_values.to(values.dtype), torch.stack([low - rounding, high + rounding])


def scale_and_zero(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of a range, and the code of 0, as ONNX Runtime's quantizer rounds them.

    Args:
        ends: the lowest and the highest value, 0 between them (shape 2).
    """
    low, high = ends.double()
    scale = (high - low) / LEVELS
    return scale.float(), (-low / scale).round().float()


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight O×C as whole numbers from −64 to 64, and the scale of each output (O×1).

    A row of zeros has the scale 1.
    """
    scales = (weight.abs().amax(1, keepdim=True).double() / LARGEST_WEIGHT).float()
    scales = torch.where(scales > 0, scales, 1)
    return (weight / scales).round(), scales


def rounded_rows(rows: Tensor) -> Tensor:
    """Rows …×D of an embedding as they come back from 8 bits with a scale each."""
    scales = rows.abs().amax(-1, keepdim=True) / 127
    scales = torch.where(scales > 0, scales, 1)
    return (rows / scales).round() * scales
