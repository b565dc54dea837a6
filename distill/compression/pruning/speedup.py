"""Sizes of blocks for a speedup: what sublayers take on this machine, and the least importance lost for the time."""

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.compression.pruning.settings import STEP
from distill.compression.pruning.structure import BlockSizes, Sublayer, block_sizes, cut_block, cut_to_sizes
from distill.errors import InputError
from distill.models.modes import evaluating
from distill.models.structure import input_names
from distill.models.timing import interleaved_medians

_MOST_SIZES = 16
"""Numbers of neurons that are measured, beside none."""
_ROUNDS = 15
_LEAST = 1.05
"""A speedup below is noise, and would say that what is smaller takes longer."""
_LARGEST = 1e6  # for the solver, whose absolute tolerances are 1e-6


@dataclass(frozen=True)
class TimeTables:
    """What a model takes, and what it would with other sizes; in seconds."""

    model: float
    """One forward of the model as it is."""
    changes: tuple[Mapping[int, float], ...]
    """For each sublayer, by the units that are left: what the model's forward takes more (below 0: less)."""


def measure_times(
    model: PreTrainedModel, sublayers: Sequence[Sublayer], inputs: Mapping[str, Tensor], *, rounds: int = _ROUNDS
) -> TimeTables:
    """Measure a model and blocks of it with fewer heads and neurons, in turns.

    Blocks of the same shape are measured once, with what the first of them is called with.

    Args:
        inputs: that the model takes, of the shape that is to become faster.
    """
    if "use_cache" in input_names(model):  # one that fills up with each call
        inputs = {**inputs, "use_cache": False}  # type: ignore[dict-item]
    calls: dict[Any, functools.partial] = {"model": functools.partial(model, **inputs)}
    blocks = {name: _calls_of(model, name, inputs) for name in dict.fromkeys(each.block for each in sublayers)}
    shapes = {name: tuple(each.units for each in sublayers if each.block == name) for name in blocks}
    first = {shape: name for name, shape in reversed(shapes.items())}
    for name in first.values():
        arguments, options = blocks[name][0]
        for sublayer in (each for each in sublayers if each.block == name):
            for units in sizes_to_try(sublayer):
                block = copy.deepcopy(model.get_submodule(name))
                if units < sublayer.units:
                    cut_block(block, sublayer, torch.arange(units))
                calls[name, sublayer.kind, units] = functools.partial(block, *arguments, **options)
    with evaluating(model), torch.inference_mode():
        for call in calls.values():
            if isinstance(call.func, nn.Module):
                call.func.eval()
        seconds = interleaved_medians(calls, rounds=rounds, device=model.device)
    changes = []
    for sublayer in sublayers:
        measured, times = first[shapes[sublayer.block]], len(blocks[sublayer.block])
        of_sizes = monotone({units: seconds[measured, sublayer.kind, units] for units in sizes_to_try(sublayer)})
        changes.append({units: times * (each - of_sizes[sublayer.units]) for units, each in of_sizes.items()})
    return TimeTables(seconds["model"], tuple(changes))


def monotone(seconds: Mapping[int, float]) -> dict[int, float]:
    """The nearest times, by least squares, of which fewer units never take longer: noise must not be chosen from."""
    from sklearn.isotonic import isotonic_regression

    return dict(zip(seconds, isotonic_regression(list(seconds.values()), increasing=False).tolist(), strict=True))


def measured_speedup(
    model: PreTrainedModel, sizes: BlockSizes, inputs: Mapping[str, Tensor], *, rounds: int = _ROUNDS
) -> float:
    """Measure how many times as fast a model is when its blocks have these sizes.

    Args:
        model: stays as it is; a copy is cut.
        sizes: what is left in each block.
        inputs: that the model takes, of the shape that is to become faster.
        rounds: timings of each model, in turns, whose medians are compared.

    Raises:
        InputError: as `cut_to_sizes`.
    """
    smaller = copy.deepcopy(model)
    cut_to_sizes(smaller, sizes)
    with evaluating(model), evaluating(smaller), torch.inference_mode():
        calls = {each: functools.partial(each, **inputs) for each in (model, smaller)}
        seconds = interleaved_medians(calls, rounds=rounds, device=model.device)
    return seconds[model] / seconds[smaller]


def corrected(tables: TimeTables, sizes: BlockSizes, sublayers: Sequence[Sublayer], speedup: float) -> TimeTables:
    """Scale the changes in tables so that they predict the speedup that was measured with these sizes.

    Args:
        sizes: what was left in each block.
        sublayers: those that the tables are of, in their order.
        speedup: how many times as fast the model became; below 1.05 it counts as 1.05.
    """
    units = {"heads": list(sizes.heads), "neurons": list(sizes.neurons)}
    saved = -sum(table[units[each.kind].pop(0)] for each, table in zip(sublayers, tables.changes, strict=True))
    factor = tables.model * (1 - 1 / max(speedup, _LEAST)) / saved
    return TimeTables(tables.model, tuple({n: factor * each for n, each in table.items()} for table in tables.changes))


def sizes_to_try(sublayer: Sublayer) -> list[int]:
    """The numbers of units that a sublayer may be left with, all of them first."""
    if sublayer.kind == "heads":
        sizes = range(1, sublayer.units)
    else:
        step = -(-sublayer.units // (_MOST_SIZES * STEP)) * STEP
        sizes = range(step, sublayer.units, step)
    none = [0] if sublayer.removable and sublayer.units else []
    return [sublayer.units, *reversed(sizes), *none]


def choose_sizes(
    sublayers: Sequence[Sublayer],
    importances: Sequence[Tensor],
    tables: TimeTables,
    speedup: float,
    *,
    uniform: bool = False,
) -> BlockSizes:
    """The sizes that lose the least importance among those that the tables say are fast enough.

    A sublayer loses the sum of the importances of the units that go, as if units were independent: the multiple-choice
    knapsack, as an integer programme (ZipLM: Kurtic et al. 2023, arXiv 2302.04089).

    Args:
        importances: of each sublayer's units.
        speedup: how many times as fast as the model is now.
        uniform: the same number of heads, and of neurons, in every block.

    Raises:
        InputError: the model can't become so fast.
    """
    losses = []
    for importance, table in zip(importances, tables.changes, strict=True):
        lost = torch.cat([importance.new_zeros(1), importance.sort().values.cumsum(0)])
        losses.append({units: float(lost[len(importance) - units]) for units in table})
    saved = tables.model * (1 - 1 / speedup)
    fastest = sum(min(table.values()) for table in tables.changes)
    kinds = [each.kind for each in sublayers]
    if -fastest < saved:
        most = tables.model / (tables.model + fastest)
        raise InputError(f"speedup: {speedup:g} can't be had; without any head or neuron it would be {most:.2f}")
    chosen = (_uniform if uniform else _knapsack)(kinds, losses, tables.changes, -saved)
    if chosen is None:
        raise InputError(f"speedup: {speedup:g} can't be had with the same sizes in every block; say uniform: false")
    return block_sizes(sublayers, chosen)


def _knapsack(
    kinds: Sequence[str], losses: Sequence[Mapping[int, float]], times: Sequence[Mapping[int, float]], budget: float
) -> list[int]:
    """One size for each sublayer with the least sum of losses whose times add up to at most the budget."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(number, units) for number, table in enumerate(times) for units in table]
    costs = np.array([losses[number][units] for number, units in options])
    seconds = np.array([times[number][units] for number, units in options])
    costs = costs / max(costs.max(), np.finfo(np.float32).tiny) * _LARGEST
    scale = _LARGEST / max(np.abs(seconds).max(), np.finfo(np.float32).tiny)
    one_each = np.array([[number == own for number, _ in options] for own in range(len(kinds))], dtype=float)
    solution = milp(
        costs,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(seconds[None] * scale, ub=budget * scale),
        ],
        options={"mip_rel_gap": 0, "presolve": False},  # putting presolve's answer back, HiGHS prints if it must round
    )
    return [units for (_, units), part in zip(options, solution.x, strict=True) if part > 0.5]


def _uniform(
    kinds: Sequence[str], losses: Sequence[Mapping[int, float]], times: Sequence[Mapping[int, float]], budget: float
) -> list[int] | None:
    """The pair of a number of heads and one of neurons with the least loss; None where none is fast enough."""
    allowed = {
        kind: set.intersection(*(set(table) for own, table in zip(kinds, times, strict=True) if own == kind))
        for kind in dict.fromkeys(kinds)
    }
    best: tuple[float, list[int]] | None = None
    for pair in itertools.product(*(sorted(sizes, reverse=True) for sizes in allowed.values())):
        size = dict(zip(allowed, pair, strict=True))
        chosen = [size[kind] for kind in kinds]
        if sum(table[units] for table, units in zip(times, chosen, strict=True)) <= budget:
            loss = sum(table[units] for table, units in zip(losses, chosen, strict=True))
            if best is None or loss < best[0]:
                best = loss, chosen
    return best and best[1]


def _calls_of(model: PreTrainedModel, block: str, inputs: Mapping[str, Tensor]) -> list[tuple[tuple, dict]]:
    """What a block is called with in a forward of the model, for each time that it is."""
    found: list[tuple[tuple, dict]] = []

    def catch(_: nn.Module, arguments: tuple, options: dict) -> None:
        found.append((arguments, options))

    hook = model.get_submodule(block).register_forward_pre_hook(catch, with_kwargs=True)
    with evaluating(model), torch.inference_mode():
        model(**inputs)
    hook.remove()
    return found
