"""What calibration rows tell of a model's layers: second moments of their inputs and gradients, Fisher information."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.common.console import progress
from distill.models.structure import accepted_inputs
from distill.tasks.kinds import targets_of
from distill.tasks.outputs import logits_of
from distill.tasks.targets import logits_under_mask

_PREDICTIONS = 256
"""Of a batch, for gradients: a language model's logits of all tokens would not fit into memory."""
_ROWS_AT_ONCE = 8
"""Of a batch, whose gradients of a whole weight are held."""


def input_moments(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """For each layer the sums over tokens, padding aside, of products of its inputs: in×in.

    Of an embedding, whose inputs are ids, it is how often each was read: V, the diagonal of such a matrix.

    Args:
        model: of the modules.
        modules: linear layers and embeddings, by name; those that no row reaches are left out of what is returned.
        batches: the model's inputs, without labels.
    """
    moments: dict[str, Tensor] = {}
    counted: Tensor | None = None

    def add(name: str, module: nn.Module, inputs: Tensor) -> None:
        ids = isinstance(module, nn.Embedding)
        shape = inputs.shape if ids else inputs.shape[:-1]
        if counted is not None and shape == counted.shape:
            inputs = inputs[counted.bool()]
        if isinstance(module, nn.Embedding):
            moments[name] = moments.get(name, 0) + inputs.flatten().bincount(minlength=module.num_embeddings)
            return
        inputs = inputs.flatten(0, -2).float()
        moments[name] = moments.get(name, 0) + inputs.T @ inputs

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda layer, inputs, name=name: add(name, layer, inputs[0]))
            stack.callback(hook.remove)
        with torch.inference_mode():
            for batch in progress(batches if modules else [], "Reading the inputs of layers"):
                counted = batch.get("attention_mask")
                model(**_inputs(model, batch))
    return moments


def gradient_moments(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """For each module the sums over tokens of products of gradients at its output: D×D.

    The gradients are of the log-likelihood of predictions drawn from the model's own, whose products are the Fisher
    information: to second order the divergence that an error leaves.

    Args:
        model: of the modules.
        modules: embeddings, by name.
        batches: the model's inputs, without labels; their order decides what is drawn.
    """
    moments: dict[str, Tensor] = {}
    for calls in _calls_with_gradients(model, modules, batches):
        for name, of_module in calls.items():
            for _, gradient in of_module:
                gradient = gradient.flatten(0, -2)
                moments[name] = moments.get(name, 0) + gradient.T @ gradient
    return moments


def fisher_of_rows(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """For each module the Fisher information of its weight, added up in each row (Hsu et al. 2022, section 3).

    A row is an output of a linear layer, or a token of an embedding. The information of a weight is the sum over
    calibration rows of its squared gradient, of the log-likelihood of predictions drawn from the model's own.

    Args:
        model: of the modules.
        modules: linear layers and embeddings, by name; those that no row reaches are left out of what is returned.
        batches: the model's inputs, without labels; their order decides what is drawn.
    """
    found: dict[str, Tensor] = {}
    for calls in _calls_with_gradients(model, modules, batches):
        for name, of_module in calls.items():
            of_batch = _embedding_rows if isinstance(modules[name], nn.Embedding) else _linear_rows
            found[name] = found.get(name, 0) + of_batch(modules[name], of_module)
    return found


def _linear_rows(linear: Any, calls: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of a batch, for each output of a layer the squares of its weights' gradients, which are a product for each row.

    Args:
        calls: of each use of the layer its inputs B×…×in, and the gradients B×…×out.
    """
    total: Any = 0
    for start in range(0, len(calls[0][0]), _ROWS_AT_ONCE):
        weight: Any = 0
        for inputs, gradient in calls:
            read, back = (
                each[start : start + _ROWS_AT_ONCE].unsqueeze(1).flatten(1, -2) for each in (inputs, gradient)
            )
            weight = weight + back.mT @ read
        total = total + weight.double().square().sum((0, 2))
    return total


def _embedding_rows(embedding: Any, calls: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of a batch, for each token the squares of its row's gradients: those of a token twice in a row add up before.

    Args:
        calls: of each use of the embedding its ids B×…, and the gradients B×…×D.
    """
    size = embedding.num_embeddings
    keys, gradients = [], []
    for ids, gradient in calls:
        row = torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.dim() - 1))
        keys.append((row * size + ids).flatten())
        gradients.append(gradient.flatten(0, -2).double())
    found, inverse = torch.cat(keys).unique(return_inverse=True)
    of_each = torch.cat(gradients)
    sums = of_each.new_zeros(len(found), of_each.shape[-1]).index_add(0, inverse, of_each)
    return sums.new_zeros(size).index_add(0, found % size, sums.square().sum(1))


def _calls_with_gradients(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Of each batch, for every module that it reaches, the inputs of each call and the gradient at its output.

    The gradient is of the log-likelihood of predictions drawn from the model's own.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    targets, generator = targets_of(model), torch.Generator(model.device).manual_seed(0)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with contextlib.ExitStack() as stack:
        for parameter, before in zip(model.parameters(), wanted, strict=True):
            stack.callback(parameter.requires_grad_, before)
            parameter.requires_grad_(False)
        for name, module in modules.items():

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> Tensor:
                calls.setdefault(name, []).append((inputs[0].detach(), output.requires_grad_()))
                return output.clone()  # which models may add to in place

            stack.callback(module.register_forward_hook(keep).remove)
        for batch in progress(batches if modules else [], "Reading the gradients of layers"):
            inputs = _inputs(model, batch)
            predictions = logits_under_mask(targets, inputs, logits_of(model(**inputs)))
            drawn = targets.drawn_likelihood(predictions[:: 1 + len(predictions) // _PREDICTIONS], generator)
            outputs = [output for of_module in calls.values() for _, output in of_module]
            gradients = iter(torch.autograd.grad(drawn, outputs))
            yield {name: [(read, next(gradients)) for read, _ in of_module] for name, of_module in calls.items()}
            calls.clear()


def _inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    return accepted_inputs(model, {name: values.to(model.device) for name, values in batch.items()})
