"""Sizes for a speedup against trying all of them, with tables of times that are given."""

import itertools

import pytest
import torch

from distill.compression.pruning.prune import Measured, decide_sizes
from distill.compression.pruning.settings import PruningSettings
from distill.compression.pruning.speedup import (
    TimeTables,
    choose_sizes,
    corrected,
    measure_times,
    measured_speedup,
    monotone,
    sizes_to_try,
)
from distill.compression.pruning.structure import BlockSizes, block_sizes, prunable_sublayers
from distill.errors import InputError
from distill.models.timing import random_inputs
from tests.compression.pruning.test_structure import model_of
from tests.conftest import tiny_bert


def random_problem(seed, blocks=3, scale=1.0):
    """Sublayers of a model, importances of their units, and tables in which fewer units take less."""
    model = tiny_bert(num_hidden_layers=blocks, intermediate_size=160)
    sublayers = prunable_sublayers(model)
    generator = torch.Generator().manual_seed(seed)
    importances, changes = [], []
    for each in sublayers:
        importances.append(scale * torch.rand(each.units, generator=generator, dtype=torch.float64) ** 4)
        sizes = sizes_to_try(each)
        steps = torch.rand(len(sizes), generator=generator, dtype=torch.float64).cumsum(0)
        changes.append({units: 1e-3 * float(steps[0] - step) for units, step in zip(sizes, steps, strict=True)})
    return sublayers, importances, TimeTables(6e-3 * blocks, tuple(changes))


def by_trying_all(sublayers, importances, tables, speedup, allowed):
    best = None
    for chosen in itertools.product(*tables.changes):
        if not allowed(chosen):
            continue
        time = tables.model + sum(table[units] for table, units in zip(tables.changes, chosen, strict=True))
        if time > tables.model / speedup:
            continue
        loss = sum(
            float(each.sort().values[: len(each) - n].sum()) for each, n in zip(importances, chosen, strict=True)
        )
        if best is None or loss < best[0]:
            best = loss, block_sizes(sublayers, chosen)
    return best[1]


@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e6])
@pytest.mark.parametrize("seed", range(4))
def test_the_least_importance_goes(seed, scale):
    problem = random_problem(seed, blocks=2, scale=scale)
    for speedup in (1.1, 1.5, 2.0):
        expected = by_trying_all(*problem, speedup, lambda chosen: True)
        assert choose_sizes(*problem, speedup) == expected
        assert choose_sizes(*problem, speedup) == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_same_sizes_in_every_block(seed):
    problem = random_problem(seed)
    expected = by_trying_all(*problem, 1.5, lambda chosen: len(set(chosen[::2])) == len(set(chosen[1::2])) == 1)
    found = choose_sizes(*problem, 1.5, uniform=True)
    assert found == expected
    assert len(set(found.heads)) == len(set(found.neurons)) == 1


def test_whole_sublayers_go_where_nothing_depends_on_them():
    sublayers, importances, tables = random_problem(0)
    importances[2] = torch.zeros(4, dtype=torch.float64)
    importances[3] = torch.zeros(160, dtype=torch.float64)
    saved = -(min(tables.changes[2].values()) + min(tables.changes[3].values()))
    sizes = choose_sizes(sublayers, importances, tables, tables.model / (tables.model - saved))
    assert sizes == BlockSizes((4, 0, 4), (160, 0, 160))


def test_what_cannot_be_had_is_refused():
    sublayers, importances, tables = random_problem(0)
    least = tables.model + sum(min(table.values()) for table in tables.changes)
    most = tables.model / least
    assert choose_sizes(sublayers, importances, tables, most * 0.9999) == BlockSizes((0, 0, 0), (0, 0, 0))
    with pytest.raises(
        InputError, match=f"speedup: 50 can't be had; without any head or neuron it would be {most:.2f}"
    ):
        choose_sizes(sublayers, importances, tables, 50)


def test_sizes_that_are_tried():
    heads, neurons = prunable_sublayers(tiny_bert(intermediate_size=160))[:2]
    assert sizes_to_try(heads) == [4, 3, 2, 1, 0]
    assert sizes_to_try(neurons) == [160, 128, 96, 64, 32, 0]
    large = prunable_sublayers(tiny_bert(intermediate_size=3072, num_hidden_layers=1))[1]
    assert sizes_to_try(large) == [3072, *range(2880, 0, -192), 0]
    shared = prunable_sublayers(model_of("AlbertConfig")[0])
    assert [sizes_to_try(each) for each in shared] == [[4, 3, 2, 1], [64, 32]]


def test_noise_in_times_is_levelled():
    assert monotone({3: 9.0, 2: 5.0, 1: 7.0, 0: 1.0}) == {3: 9.0, 2: 6.0, 1: 6.0, 0: 1.0}
    assert monotone({2: 3.0, 0: 1.0}) == {2: 3.0, 0: 1.0}


def test_tables_are_corrected_by_what_was_measured():
    sublayers, importances, tables = random_problem(1)
    sizes = choose_sizes(sublayers, importances, tables, 1.5)
    right = corrected(tables, sizes, sublayers, 1.2)
    units = [count for pair in zip(sizes.heads, sizes.neurons, strict=True) for count in pair]
    time = right.model + sum(table[count] for table, count in zip(right.changes, units, strict=True))
    assert right.model / time == pytest.approx(1.2)


@pytest.mark.parametrize("family", ["BertConfig", "AlbertConfig", "ModernBertConfig", "GPT2Config", "ViTConfig"])
def test_models_are_measured(family):
    model, _ = model_of(family)
    model.float().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sublayers = prunable_sublayers(model)
    tables = measure_times(model, sublayers, random_inputs(model, 2, 6, model.device), rounds=1)
    assert tables.model > 0
    assert [list(table) for table in tables.changes] == [sizes_to_try(each) for each in sublayers]
    assert all(table[each.units] == 0 for each, table in zip(sublayers, tables.changes, strict=True))
    assert all(change <= 0 for table in tables.changes for change in table.values())
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_the_measured_speedup_is_the_one_that_was_asked_for():
    model = tiny_bert(
        hidden_size=256, num_attention_heads=8, intermediate_size=1024, num_hidden_layers=4, initializer_range=0.05
    )
    batch = random_inputs(model, 8, 32, model.device)
    measured = Measured(batch_size=16, sequence_length=64)
    inputs = random_inputs(model, 16, 64, model.device)
    for speedup in (1.5, 2.5):
        sizes, _ = decide_sizes(model, [batch], PruningSettings(speedup=speedup), measured=measured)
        assert measured_speedup(model, sizes, inputs, rounds=25) == pytest.approx(speedup, rel=0.1)
