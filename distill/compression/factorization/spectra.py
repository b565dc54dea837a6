"""The directions of a weight that matter most: singular vectors, weighted by inputs or by information."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compression.moments import fisher_of_rows, input_moments
from distill.models.modes import evaluating

Method = Literal["svd", "activation", "fisher"]


@dataclass(frozen=True)
class Spectrum:
    """How much of a matrix lies in which directions: of its rows' space, or of its columns'."""

    energies: Tensor
    """In descending order, float64: the squared singular values of the weighted matrix."""
    vectors: Tensor
    """Of the directions, one a column."""
    of_outputs: bool
    """Whether they are directions of what comes out of the matrix, and not of what goes in."""


def spectrum_of_outputs(weight: Tensor, moments: Tensor) -> Spectrum:
    """The spectrum of W·C^½, in directions of outputs: projecting these keeps W x best in mean square.

    With the left singular vectors U of W·C^½, the best matrix of rank r is U_r U_rᵀ W (Chen et al. 2021, theorem 1,
    whose inverses this needs not).

    Args:
        weight: O×I.
        moments: C, I×I sums of products of inputs.
    """
    weight, moments = weight.double(), moments.double()
    if weight.shape[0] <= weight.shape[1]:
        return _spectrum(weight @ moments @ weight.T, of_outputs=True)
    energies, vectors = torch.linalg.eigh(moments)
    root = vectors * energies.clamp(min=0).sqrt()
    left, values, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    return Spectrum(values.square(), left, of_outputs=True)


def spectrum_of_inputs(weight: Tensor, importance: Tensor) -> Spectrum:
    """The spectrum of D^½·W, in directions of inputs: projecting these keeps the important rows of W best.

    With the right singular vectors V of D^½·W, the best matrix of rank r is W V_r V_rᵀ (Hsu et al. 2022, equation 6).

    Args:
        weight: O×I.
        importance: of each of the O rows, the diagonal of D.
    """
    weight = weight.double()
    return _spectrum((weight * importance.double().unsqueeze(1)).T @ weight, of_outputs=False)


def spectrum_of(module: nn.Module, measured: Tensor | None, method: Method) -> Spectrum:
    """The spectrum of a module's weight, as a method weighs it.

    Args:
        module: a linear layer or an embedding.
        measured: its moments or information, as `measurements` gives them; None where no row reaches it.
        method: which of them it is.
    """
    matrix = matrix_of(module).detach().cpu()
    weights = None if measured is None or not measured.any() else measured.double().cpu()
    if isinstance(module, nn.Embedding):
        importance = torch.ones(len(matrix), dtype=torch.float64) if weights is None else weights
        return spectrum_of_inputs(matrix, importance + importance.mean())  # some for tokens that the rows lack
    if weights is not None:
        return spectrum_of_inputs(matrix, weights) if method == "fisher" else spectrum_of_outputs(matrix, weights)
    if matrix.shape[0] > matrix.shape[1]:
        return spectrum_of_inputs(matrix, torch.ones(len(matrix)))
    return spectrum_of_outputs(matrix, torch.eye(matrix.shape[1]))


def measurements(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]], method: Method
) -> dict[str, Tensor]:
    """What a method weighs the weights of modules with, measured on calibration rows; nothing for `svd`.

    Args:
        model: of the modules.
        modules: linear layers and embeddings, by name; those that no row reaches are left out of what is returned.
        batches: the model's inputs, without labels.
        method: `activation` takes moments of inputs, `fisher` the information of rows.
    """
    if method == "svd":
        return {}
    with evaluating(model):
        return (input_moments if method == "activation" else fisher_of_rows)(model, modules, batches)


def factors_at(module: nn.Module, spectrum: Spectrum, rank: int) -> dict[str, Tensor]:
    """The factors of a module's weight at a rank, by the names that they have in what takes its place.

    Args:
        module: a linear layer or an embedding.
        spectrum: of its weight.
        rank: how many of the directions stay.
    """
    matrix, vectors = matrix_of(module).detach().cpu().double(), spectrum.vectors[:, :rank]
    up, down = (vectors, vectors.T @ matrix) if spectrum.of_outputs else (matrix @ vectors, vectors.T)
    if isinstance(module, nn.Embedding):
        return {"table.weight": up, "projection.weight": down.T}
    return {"down.weight": down, "up.weight": up}


def matrix_of(module: Any) -> Tensor:
    """A module's weight, with a row for each output, or for each token."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _spectrum(products: Tensor, *, of_outputs: bool) -> Spectrum:
    energies, vectors = torch.linalg.eigh(products)
    return Spectrum(energies.clamp(min=0).flip(0), vectors.flip(1), of_outputs)
