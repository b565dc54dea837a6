"""Prune attention heads and feed-forward neurons, whole sublayers included: smaller and faster, and it reloads."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from distill.compression.pruning.importance import Importance, fisher_information, magnitudes, taylor_of_divergence
from distill.compression.pruning.reconstruction import Moments, contributions, output_moments, refit_output
from distill.compression.pruning.settings import STEP, PruningSettings, planned_sizes, units_left
from distill.compression.pruning.speedup import choose_sizes, corrected, measure_times, measured_speedup
from distill.compression.pruning.structure import (
    BlockSizes,
    Kind,
    Sublayer,
    block_sizes,
    keep_units,
    prunable_sublayers,
    record_sizes,
    wanted_units,
)
from distill.errors import InputError
from distill.models.adapters import has_adapters, merged_copy
from distill.models.timing import random_inputs
from distill.models.weights import refuse_not_finite

_CORRECTIONS = 3
_CLOSE = 0.03
"""How far from the asked speedup the measured one may be before the times are corrected and sizes chosen again."""


@dataclass(frozen=True)
class Measured:
    """What a speedup is measured with."""

    batch_size: int = 32
    sequence_length: int = 128
    """Tokens of a row, none of them padding."""
    dtype: Literal["fp32", "bf16"] = "fp32"


def prune_model(
    model: PreTrainedModel | PeftModel,
    batches: Sequence[Mapping[str, Tensor]] = (),
    *,
    heads: float | list[int] | None = None,
    neurons: float | list[int] | None = None,
    intermediate_size: int | None = None,
    speedup: float | None = None,
    uniform: bool | None = None,
    importance: Importance = "fisher",
    rounds: int = 1,
    reconstruct: bool = True,
    measured: Measured | None = None,
) -> PreTrainedModel:
    """Remove heads and neurons from a model in place and return it, ready for `save_pretrained`.

    A model whose blocks have the same number of neurons and all their heads is one that plain transformers loads;
    others load after `import distill`.

    Args:
        model: a float model that can be pruned; of one with adapters a copy in which they are merged is pruned.
        batches: calibration rows: the model's inputs, without labels. Only `importance="magnitude"` with
            `reconstruct=False` needs none.
        heads: the share of attention heads to remove, or how many to leave in each block.
        neurons: the share of feed-forward neurons to remove, or how many to leave in each block.
        intermediate_size: neurons to leave in every block, instead of `neurons`.
        speedup: how many times as fast it shall be, measured here, instead of all these.
        uniform: the same sizes in every block; by default so, but not with `speedup`.
        importance: what goes first; `PruningSettings` says more.
        rounds: in which units go, importance measured anew in each.
        reconstruct: refit the output layers of what is left.
        measured: with what the speedup is measured.

    Raises:
        InputError: a model that can't be cut, a setting that is wrong, or a speedup that can't be had.
    """
    settings = PruningSettings(
        heads=heads, neurons=neurons, intermediate_size=intermediate_size, speedup=speedup, uniform=uniform,
        importance=importance, rounds=rounds, reconstruct=reconstruct,
    )  # fmt: skip
    if has_adapters(model):
        model = merged_copy(model)
    sizes, _ = decide_sizes(model, batches, settings, measured=measured)
    return prune_to_sizes(model, batches, sizes, settings)


def decide_sizes(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    settings: PruningSettings,
    *,
    measured: Measured | None = None,
) -> tuple[BlockSizes, float | None]:
    """Decide how many heads and neurons each block keeps, by importance and the clock where the settings ask for it.

    These sizes, given as `heads` and `neurons`, leave the same model.

    Args:
        model: a float model; it stays as it is.
        batches: calibration rows: the model's inputs, without labels; as for `prune_model`.
        measured: with what the speedup is measured.

    Returns:
        The sizes, and how many times as fast they were measured to be where a speedup was asked for.

    Raises:
        InputError: as `prune_model`.
    """
    sublayers = prunable_sublayers(model, settings.kinds)
    refuse_not_finite(model, "model")
    if settings.reads_rows and not batches:
        raise InputError("batches: there are none; give calibration rows, or magnitude importance without reconstruct")
    planned = planned_sizes(sublayers, settings)
    if planned is not None:
        return planned, None
    importances = _importances(model, sublayers, batches, settings)
    wanted = settings.speedup
    if wanted is None:
        return _by_importance(sublayers, importances, settings), None
    measured = measured or Measured()
    timed = copy.deepcopy(model).to(torch.bfloat16 if measured.dtype == "bf16" else torch.float32)
    inputs = random_inputs(timed, measured.batch_size, measured.sequence_length, timed.device)
    tables = measure_times(timed, sublayers, inputs)
    tried: list[tuple[BlockSizes, float]] = []
    for _ in range(_CORRECTIONS):
        try:
            sizes = choose_sizes(sublayers, importances, tables, wanted, uniform=settings.is_uniform)
        except InputError:
            if tried:
                break
            raise
        speedup = measured_speedup(timed, sizes, inputs)
        tried.append((sizes, speedup))
        if is_close(speedup, wanted):
            break
        tables = corrected(tables, sizes, sublayers, speedup)
    return min(tried, key=lambda each: abs(math.log(each[1] / wanted)))


def is_close(speedup: float, wanted: float) -> bool:
    """Whether a measured speedup is taken for the wanted one: it is within 3 % of it."""
    return abs(speedup / wanted - 1) <= _CLOSE


def prune_to_sizes(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], sizes: BlockSizes, settings: PruningSettings
) -> PreTrainedModel:
    """Prune a model in place to these sizes of its blocks: in each block the least important units go.

    Args:
        model: a float model without adapters.
        batches: calibration rows: the model's inputs, without labels; as for `prune_model`.
        sizes: what is left, as `decide_sizes` gives it.
        settings: how importance is measured, in how many rounds, and whether output layers are refitted.

    Raises:
        InputError: sizes that its blocks can't have.
    """
    whole = prunable_sublayers(model, settings.kinds)
    wanted = wanted_units(whole, sizes)
    needs_reference = settings.reconstruct or (settings.importance == "taylor" and settings.rounds > 1)
    reference = copy.deepcopy(model) if needs_reference else model
    for number in range(1, settings.rounds + 1):
        now = prunable_sublayers(model, settings.kinds)
        importances = _importances(model, now, batches, settings, reference=reference if number > 1 else None)
        left = [
            before.units - round((before.units - after) * number / settings.rounds)
            for before, after in zip(whole, wanted, strict=True)
        ]
        less = {each: units for each, units in zip(now, left, strict=True) if units < each.units}
        scores = dict(zip(now, importances, strict=True))
        moments: dict[Sublayer, Moments] = {}
        if settings.reconstruct and less:
            moments = dict(zip(less, output_moments(model, reference, list(less), batches), strict=True))
        if settings.importance != "magnitude":
            scores |= {each: _with_contributions(model, each, scores[each], its) for each, its in moments.items()}
        cut = [(each, scores[each].topk(units).indices.sort().values) for each, units in less.items()]
        for sublayer, kept in cut if settings.reconstruct else ():
            refit_output(model, sublayer, kept, moments[sublayer])
        for sublayer, kept in cut:
            keep_units(model, sublayer, kept)
    record_sizes(model)
    return model


def _with_contributions(model: PreTrainedModel, sublayer: Sublayer, importance: Tensor, moments: Moments) -> Tensor:
    """What ranks the units of a sublayer that is refitted: their importance and what they add, each over its mean.

    Refitting makes up for what the others added, on all tokens alike: if much of it goes because no prediction depended
    on it, that spoils what predictions do depend on (K-prune: Park et al. 2024).
    """
    added = contributions(model, sublayer, moments)
    least = torch.finfo(torch.float64).tiny
    return importance / importance.mean().clamp(min=least) + added / added.mean().clamp(min=least)


def _importances(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    batches: Sequence[Mapping[str, Tensor]],
    settings: PruningSettings,
    *,
    reference: PreTrainedModel | None = None,
) -> list[Tensor]:
    """Of every unit; of sublayers in which there is none left, nothing.

    Args:
        reference: the unpruned model, once something is gone.
    """
    there = [each for each in sublayers if each.units]
    if settings.importance == "magnitude":
        found = magnitudes(model, there)
    elif settings.importance == "taylor" and reference is not None:
        found = taylor_of_divergence(model, there, batches, reference)
    else:
        found = fisher_information(model, there, batches)
    values = dict(zip(there, found, strict=True))
    return [values.get(each, torch.zeros(0, dtype=torch.float64)) for each in sublayers]


def _by_importance(
    sublayers: Sequence[Sublayer], importances: Sequence[Tensor], settings: PruningSettings
) -> BlockSizes:
    """Sizes of blocks without the units that are least important among those of all blocks; each keeps some."""
    now = block_sizes(sublayers)
    shares: dict[Kind, float] = {"heads": settings.heads or 0, "neurons": settings.neurons or 0}  # type: ignore[dict-item]
    left: dict[Kind, list[int]] = {"heads": list(now.heads), "neurons": list(now.neurons)}
    for kind, share in shares.items():
        step = STEP if kind == "neurons" else 1
        own = [importance for each, importance in zip(sublayers, importances, strict=True) if each.kind == kind]
        costs = []  # of the next units of a block: they go in steps, the least important first
        for number, importance in enumerate(own):
            steps = importance.sort().values.split(step)[:-1]  # a block keeps its last step
            costs += [(float(units.sum()), number, len(units)) for units in steps]
        spare = sum(left[kind]) - sum(units_left(kind, count, share) for count in left[kind])
        for _, number, count in sorted(costs):
            if count <= spare:
                left[kind][number] -= count
                spare -= count
    return BlockSizes(tuple(left["heads"]), tuple(left["neurons"]))
