"""Quantization-aware training: a model that computes with the weights which quantizing it would leave."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compression.quantization.affine import affine_from_range, affine_of, fake_quantize
from distill.compression.quantization.formats import Format, QuantizationSettings, choose_formats
from distill.compression.quantization.simulated import (
    fake_int8_rows,
    fake_linear_weight,
    fake_nf4_rows,
    row_scales,
)
from distill.errors import InputError
from distill.models.replacements import is_quantized

_MOMENTUM = 0.99
"""Of the moving average of the activations' ranges."""


@contextmanager
def fake_quantized(
    model: PreTrainedModel, settings: QuantizationSettings, *, activations: bool = False
) -> Iterator["FakeQuantization"]:
    """Run a model's forward with the weights that `quantize_model` with these settings would leave, bit for bit.

    The weights themselves stay what they are, under the same names: saving, optimizers and DDP see nothing of it. Their
    gradients are those by the fake weights (straight through; Bengio et al. 2013). What is not quantized, heads, norms
    and biases, stays as it is. In eval mode fake weights are always used, in training while `FakeQuantization.on`.

    Args:
        model: a float model.
        activations: the inputs of these layers go through 8 bits too, asymmetric, with one range a tensor, as engines
            for the CPU do it (ONNX's DynamicQuantizeLinear). In eval mode the range is the tensor's own; in training
            it is a moving average of earlier steps (Jacob et al. 2018, section 3.1), beyond which values are clipped.

    Raises:
        InputError: as `check_quantizable`.
    """
    fake = FakeQuantization(model, settings, activations=activations)
    watched = model.register_forward_pre_hook(fake.see_mask, with_kwargs=True)
    try:
        with forwards_replaced(fake.forwards):
            yield fake
    finally:
        watched.remove()


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let modules compute with other functions of their inputs than their own forwards."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                del module.forward
            else:
                module.forward = earlier  # type: ignore[method-assign]


def check_quantizable(model: PreTrainedModel, settings: QuantizationSettings) -> dict[str, Format]:
    """The format of every module that `quantize_model` would quantize, by name.

    Raises:
        InputError: the model is quantized already or has adapters; else as `choose_formats`.
    """
    check_float(model)
    return choose_formats(model, settings)


def check_float(model: PreTrainedModel) -> None:
    """Refuse a model whose own weights are not floats that learn.

    Raises:
        InputError: it is quantized already or has adapters.
    """
    if isinstance(model, PeftModel):
        raise InputError("qat: the model has adapters, and its own weights don't learn; leave qat or the adapters out")
    if is_quantized(model.config):
        raise InputError("qat: the model is quantized already; train the model it was made from")


class FakeQuantization:
    """The fake weights of one model, and the ranges of its activations."""

    def __init__(self, model: PreTrainedModel, settings: QuantizationSettings, *, activations: bool):
        self.on = True
        """Whether training sees the fake weights too."""
        self._settings = settings
        self._activations = activations
        self._mask: Tensor | None = None
        self._kept: dict[nn.Module, Tensor] = {}  # what was computed of a module's weight since the last step
        self.forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        """What computes in place of each module's own forward."""
        output = model.get_output_embeddings()
        num_linears = 0
        for name, format in check_quantizable(model, settings).items():
            module: Any = model.get_submodule(name)
            if isinstance(module, nn.Embedding):
                self.forwards[module] = partial(self._embedding, module, format)
                if isinstance(output, nn.Linear) and output.weight is module.weight:
                    self.forwards[output] = partial(self._tied_output, output, format)
            else:
                self.forwards[module] = partial(self._linear, module, format, num_linears)
                num_linears += 1
        self.ranges = torch.zeros(2, num_linears, device=model.device)
        """−low and high of each linear layer's inputs, averaged over steps; 0 for what no step has seen."""
        self._seen = torch.zeros_like(self.ranges)

    def begin_step(self, *, on: bool, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Forget the weights of before an optimizer step, and average the ranges that it saw.

        Args:
            on: whether the coming step trains with fake weights; it watches the ranges in any case.
            gather: collects a tensor N×… from all processes.
        """
        self.on = on
        self._kept = {
            module: kept for module, kept in self._kept.items() if not module.get_parameter("weight").requires_grad
        }
        self.average_ranges(gather)

    def average_ranges(self, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Bring the ranges seen since the last call, over all batches and processes, into the average."""
        if not self._activations:
            return
        seen = gather(self._seen.unsqueeze(0)).amax(0)
        averaged = torch.where(self.ranges.any(0), _MOMENTUM * self.ranges + (1 - _MOMENTUM) * seen, seen)
        self.ranges = torch.where(seen.any(0), averaged, self.ranges)
        self._seen = torch.zeros_like(self._seen)

    def see_mask(self, model: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        """A forward pre-hook of the model: which tokens of the batch are padding."""
        mask = options.get("attention_mask")
        self._mask = None if mask is None or mask.dim() != 2 else mask.bool()

    def _uses_fakes(self, module: nn.Module) -> bool:
        return self.on or not module.training

    def _linear(self, linear: nn.Linear | Conv1D, format: Format, number: int, inputs: Tensor) -> Tensor:
        if self._activations:
            inputs = self._quantized_inputs(linear, number, inputs)
        weight = linear.weight
        if self._uses_fakes(linear):
            weight = straight_through(weight, self._once(linear, partial(self._fake_weight, linear, format)))
        return nn.functional.linear(inputs, weight.T if isinstance(linear, Conv1D) else weight, linear.bias)

    def _fake_weight(self, linear: nn.Linear | Conv1D, format: Format, weight: Tensor) -> Tensor:
        if isinstance(linear, Conv1D):  # GPT-2's, whose weight is in×out
            return fake_linear_weight(weight.T, format, self._settings).T
        return fake_linear_weight(weight, format, self._settings)

    def _embedding(self, embedding: nn.Embedding, format: Format, ids: Tensor) -> Tensor:
        """Only the rows of the batch are quantized: each has scales of its own."""
        rows = nn.Embedding.forward(embedding, ids)
        if not self._uses_fakes(embedding):
            return rows
        if format == "int8":
            return straight_through(rows, fake_int8_rows(rows.detach(), self._settings))
        scales = self._once(embedding, partial(row_scales, settings=self._settings))
        return straight_through(rows, fake_nf4_rows(rows.detach(), scales[ids], self._settings))

    def _tied_output(self, output: nn.Linear, format: Format, inputs: Tensor) -> Tensor:
        """An output layer that shares the embedding's weight computes with its quantized rows too."""
        weight = output.weight
        if self._uses_fakes(output):
            weight = straight_through(weight, self._once(output, partial(self._fake_table, format)))
        return nn.functional.linear(inputs, weight, output.bias)

    def _fake_table(self, format: Format, table: Tensor) -> Tensor:
        if format == "int8":
            return fake_int8_rows(table, self._settings)
        return fake_nf4_rows(table, row_scales(table, self._settings), self._settings)

    def _once(self, module: nn.Module, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What `compute` makes of the module's weight, until the next step."""
        if module not in self._kept:
            self._kept[module] = compute(module.get_parameter("weight").detach())
        return self._kept[module]

    def _quantized_inputs(self, linear: nn.Module, number: int, inputs: Tensor) -> Tensor:
        if not linear.training:
            return fake_quantize(inputs, affine_of(inputs))
        seen = inputs.detach()
        if self._mask is not None and inputs.shape[:-1] == self._mask.shape:
            seen = seen.masked_fill(~self._mask.unsqueeze(-1), 0)  # 0 is in every range
        low, high = torch.aminmax(seen.float())
        self._seen[:, number] = torch.maximum(self._seen[:, number], torch.stack([-low, high]))
        if not self.on:
            return inputs
        low, high = -self.ranges[0, number], self.ranges[1, number]
        quantized = fake_quantize(inputs, affine_from_range(low, high))
        return torch.where(low < high, quantized, inputs)  # as they are until a step has seen them


def straight_through(exact: Tensor, fake: Tensor) -> Tensor:
    """The values of `fake`, whose gradient goes to `exact` (Bengio et al. 2013, section 4, "straight-through").

    Args:
        exact: any shape.
        fake: in the shape and dtype of `exact`.
    """
    return _StraightThrough.apply(exact, fake)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, fake: Tensor) -> Tensor:
        return fake.view_as(fake)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
