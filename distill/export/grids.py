"""Grids of activations, found on calibration rows: those on which 8 bits lose least of what a layer computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    import onnx

_VECTORS = 1024
"""Of an activation, evenly spread, that its grid is searched on."""
_SHARES = np.geomspace(1.0, 0.2, 10)
_STRENGTHS = (0.3, 0.5, 0.7)
_WORTH_A_PRODUCT = 0.7
"""What is left of the error where channels are divided by factors, which takes the engine an operation more."""
_LEVELS = 255
_LARGEST_WEIGHT = 64


@dataclass(frozen=True)
class Grid:
    """Where the 256 levels of an activation lie."""

    low: float
    """The lowest value that is told from others; zero is a level."""
    high: float
    factors: NDArray
    """C; what its channels are divided by before they are rounded, and their weights multiplied by."""

    @property
    def plain(self) -> bool:
        """Whether nothing is divided."""
        return bool((self.factors == 1).all())


def activation_grids(
    graph: onnx.ModelProto, weights: Mapping[str, NDArray], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Grid]:
    """The grid of each activation that 8 bits represent with the least error in what is computed from it.

    Args:
        graph: in float32.
        weights: for each activation …×C all that multiply it, C×O, by the name of the activation.
        batches: of the model's inputs; what stands at padding doesn't count.
    """
    import onnxruntime  # of an extra
    from onnx import helper

    names = list(weights)
    shown = type(graph)()
    shown.CopyFrom(graph)
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = [each.name for each in graph.graph.input]
    seen: dict[str, list[NDArray]] = {name: [] for name in names}
    per_batch = max(1, _VECTORS // len(batches))
    for batch in batches:
        arrays = {name: np.asarray(batch[name]) for name in inputs}
        for name, values in zip(names, session.run(names, arrays), strict=True):
            seen[name].append(_spread(_vectors(values, batch.get("attention_mask")), per_batch))
    return {name: fit_grid(np.concatenate(seen[name]), weights[name]) for name in names}


def fit_grid(vectors: NDArray, weights: NDArray) -> Grid:
    """Search the grid on which the product of an activation and its weights is nearest to the float one.

    Some channels of transformers are a hundred times as large as the others. Where that pays, each channel is divided
    by a factor and its weights are multiplied by it (Xiao et al. 2023, SmoothQuant, eq. 4), whose strength is searched;
    both errors count, that of the values and that of the weights in 7 bit.

    Args:
        vectors: N×C, the activation at N tokens or rows of the calibration data.
        weights: C×O, all weights that multiply it.
    """
    largest, heaviest = np.abs(vectors).max(0), np.abs(weights).max(1)
    plain = np.ones(vectors.shape[1], dtype=np.float32)
    best, least = _grid(vectors, weights, plain)
    without = least
    for strength in _STRENGTHS:
        factors = np.maximum(largest, 1e-5) ** strength / np.maximum(heaviest, 1e-5) ** (1 - strength)
        factors = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
        grid, error = _grid(vectors, weights, factors)
        if error < min(least, _WORTH_A_PRODUCT * without):
            best, least = grid, error
    return best


def _grid(vectors: NDArray, weights: NDArray, factors: NDArray) -> tuple[Grid, float]:
    """The best range of values that are divided by factors, and the squared error of the product, a vector's mean."""
    vectors, weights = vectors / factors, weights * factors[:, None]
    low, high = least_error_range(vectors, (weights**2).sum(1))
    steps = np.abs(weights).max(0) / _LARGEST_WEIGHT
    of_weights = float((steps**2).sum() / 12 * (vectors**2).mean(0).sum())
    of_values = _error(vectors, (weights**2).sum(1), low, high) / len(vectors)
    return Grid(low, high, factors), of_weights + of_values


def least_error_range(vectors: NDArray, importance: NDArray) -> tuple[float, float]:
    """Search the range in which rounding an activation to 256 levels has the least weighted squared error.

    Both ends are searched among shares of the lowest and of the highest value, one after the other. Zero lies in the
    range, which is (−1, 1) where all values are 0.

    Args:
        vectors: N×C, the activation.
        importance: C, what the squared error of each channel is multiplied by.
    """
    low, high = min(float(vectors.min()), 0.0), max(float(vectors.max()), 0.0)
    if low == high:
        return -1.0, 1.0
    best_high = min(_SHARES, key=lambda share: _error(vectors, importance, low, high * share))
    best_low = min(_SHARES, key=lambda share: _error(vectors, importance, low * share, high * best_high))
    return low * float(best_low), high * float(best_high)


def _error(vectors: NDArray, importance: NDArray, low: float, high: float) -> float:
    if low == high:
        return float("inf")
    scale = np.float32((high - low) / _LEVELS)
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(vectors / scale) + zero, 0, _LEVELS) - zero) * scale
    return float(((rounded - vectors) ** 2).sum(0, dtype=np.float64) @ importance)


def _vectors(values: NDArray, mask: Tensor | None) -> NDArray:
    """Values …×C as N×C, without those of padding."""
    if mask is not None and values.shape[: mask.ndim] == tuple(mask.shape):
        return values[np.asarray(mask).astype(bool)]
    return values.reshape(-1, values.shape[-1])


def _spread(vectors: NDArray, count: int) -> NDArray:
    """At most so many of N×C vectors, evenly spread, and those that hold the lowest and the highest value."""
    ends = {int(vectors.max(-1).argmax()), int(vectors.min(-1).argmin())}
    chosen: Iterable[int] = np.unique(np.linspace(0, len(vectors) - 1, min(count, len(vectors))).astype(int))
    return vectors[sorted({*map(int, chosen), *ends})]
