"""Grids of activations, found on calibration rows: those on which 8 bits lose least of what a layer computes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.folders import write_atomically
from distill.common.records import SCHEMA, read_record
from distill.common.serialized import from_json, json_text
from distill.errors import InputError
from distill.models.modes import evaluating
from distill.models.structure import accepted_inputs

FILE = "qat.json"
"""Beside the weights of a step that trained with them."""
VECTORS = 1024
"""Of an activation, evenly spread, that its grid is searched on."""
_SHARES = np.geomspace(1.0, 0.2, 10)
_STRENGTHS = (0.3, 0.5, 0.7)
_WORTH_A_PRODUCT = 0.7
"""What is left of the error where channels are divided by factors, which takes the engine an operation more."""
LEVELS = 255
"""Steps between the lowest and the highest value of an activation."""
LARGEST_WEIGHT = 64
"""Of the whole numbers that weights become."""


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


@dataclass(frozen=True)
class LayerGrid:
    """The grid of what some layers read; as it stands in `qat.json`."""

    layers: list[str]
    """Names of the model's modules."""
    low: float
    high: float
    factors: list[float] | None
    """As those of `Grid`; None where nothing is divided."""


@dataclass(frozen=True, kw_only=True)
class SimulatedGrids:
    """What of a model computed in 8 bit while it was trained, and on what grids; all else was in float."""

    schema: int = SCHEMA
    engine: str
    """That it was trained for; all engines compute on the same grids."""
    embeddings: list[str] = field(default_factory=list)
    grids: list[LayerGrid] = field(default_factory=list)

    def of_layers(self) -> dict[str, Grid]:
        """The grid of what each layer reads, by the layer's name; one object where they read the same."""
        found: dict[str, Grid] = {}
        for each in self.grids:
            factors = np.array(1.0 if each.factors is None else each.factors, dtype=np.float32)
            found |= dict.fromkeys(each.layers, Grid(each.low, each.high, factors))
        return found


def simulated_grids(folder: Path) -> SimulatedGrids | None:
    """The grids that the model in a folder was trained with (`qat: onnxruntime`); None where it wasn't.

    Args:
        folder: of a step, or of a model that was saved with them.

    Raises:
        InputError: what is written there can't be read, or a newer version wrote it.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        return from_json(SimulatedGrids, read_record(folder, FILE))
    except (TypeError, ValueError):
        raise InputError(f"{folder / FILE}: can't be read; run the step again, or delete it to choose anew") from None


def write_grids(folder: Path, grids: SimulatedGrids) -> None:
    """Write the grids that a model was trained with beside its weights."""
    write_atomically(folder / FILE, json_text(asdict(grids), indent=None) + "\n")


def layer_grids(
    model: PreTrainedModel, layers: Iterable[str], batches: Sequence[Mapping[str, Tensor]]
) -> list[LayerGrid]:
    """Find the grid of what each layer reads, one for all layers that read the same tensor.

    A layer that reads several, as a shared one does, has one grid for all of them. One that no batch comes to has none.

    Args:
        model: in float; its weights, as they are, multiply what is read.
        layers: names of linear modules.
        batches: of the model's inputs, on its device.
    """
    groups: dict[str, set[str]] = {}  # of each layer, all that read what it reads
    seen: dict[str, list[NDArray]] = {}
    per_batch = max(1, VECTORS // len(batches))
    readers: dict[tuple, tuple[str, Tensor]] = {}
    mask: Tensor | None = None

    def watch(name: str) -> RemovableHandle:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            key = inputs[0].data_ptr(), inputs[0].shape, inputs[0].stride()
            first, _ = readers.setdefault(key, (name, inputs[0]))  # held, so that no other takes its place
            merged = groups.setdefault(name, {name}) | groups[first]
            groups.update(dict.fromkeys(merged, merged))
            if first == name:
                vectors = inputs[0].detach().float().cpu().numpy()
                seen.setdefault(name, []).append(chosen_vectors(vectors, mask, per_batch))

        return model.get_submodule(name).register_forward_pre_hook(look)

    hooks = [watch(name) for name in layers]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                readers.clear()
                mask = batch["attention_mask"].cpu() if "attention_mask" in batch else None
                model(**accepted_inputs(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for group in {id(group): group for group in groups.values()}.values():
        names = [name for name in groups if name in group]
        vectors = np.concatenate([each for name in names for each in seen.get(name, ())])
        weights = np.concatenate([_weight(model, name) for name in names], axis=1)
        grid = fit_grid(vectors, weights)
        factors = None if grid.plain else grid.factors.tolist()
        found.append(LayerGrid(names, float(np.float32(grid.low)), float(np.float32(grid.high)), factors))
    return found


def _weight(model: PreTrainedModel, name: str) -> NDArray:
    """C×O."""
    module = model.get_submodule(name)
    weight = module.get_parameter("weight").detach().float().cpu().numpy()
    return weight if isinstance(module, Conv1D) else weight.T


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
    steps = np.abs(weights).max(0) / LARGEST_WEIGHT
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
    scale = np.float32((high - low) / LEVELS)
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(vectors / scale) + zero, 0, LEVELS) - zero) * scale
    return float(((rounded - vectors) ** 2).sum(0, dtype=np.float64) @ importance)


def chosen_vectors(values: NDArray, mask: Tensor | None, count: int) -> NDArray:
    """Some vectors of an activation …×C as N×C: evenly spread, none of padding, and those with the ends of its range.

    Args:
        mask: of the batch; None where nothing is padding.
        count: at most so many, the ends aside.
    """
    if mask is not None and values.shape[: mask.ndim] == tuple(mask.shape):
        vectors = values[np.asarray(mask).astype(bool)]
    else:
        vectors = values.reshape(-1, values.shape[-1])
    ends = {int(vectors.max(-1).argmax()), int(vectors.min(-1).argmin())}
    chosen: Iterable[int] = np.unique(np.linspace(0, len(vectors) - 1, min(count, len(vectors))).astype(int))
    return vectors[sorted({*map(int, chosen), *ends})]
