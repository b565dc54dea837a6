import itertools

import pytest
import torch

from distill.compression.factorization.ranks import Choice, breaks_even, choices_of, spread


@pytest.mark.parametrize(("shape", "most"), [((96, 96), 47), ((160, 96), 59), ((2, 2), 0), ((30522, 384), 379)])
def test_factors_of_the_largest_rank_are_smaller_and_of_the_next_are_not(shape, most):
    assert breaks_even(shape) == most
    rows, columns = shape
    assert most * (rows + columns) < rows * columns <= (most + 1) * (rows + columns)


def test_choices_are_ranks_of_eight_and_the_whole():
    energies = torch.tensor([8.0, 4, 2, 1, 1] + [0] * 27).double()
    found = choices_of((32, 64), energies)
    assert [each.rank for each in found] == [8, 16, None]
    assert [each.size for each in found] == [4 * 8 * 96, 4 * 16 * 96, 4 * 32 * 64]
    assert [each.error for each in found] == [0, 0, 0]
    assert choices_of((6, 6), energies[:6])[0] == Choice(2, 4 * 2 * 12, pytest.approx(1 - 12 / 16))


def fixed(*pairs):
    """Choices of some sizes and errors, the last of them the whole."""
    ranks = [*range(8, 8 * len(pairs), 8), None]
    return [Choice(rank, size, error) for rank, (size, error) in zip(ranks, pairs, strict=True)]


CHOICES = {
    "steep": fixed((10, 0.9), (20, 0.3), (30, 0.2), (50, 0.0)),
    "flat": fixed((10, 0.9), (20, 0.85), (30, 0.8), (32, 0.0)),
    "small": fixed((1, 0.5), (2, 0.0)),
}


def test_bytes_go_where_they_leave_out_least():
    assert spread(CHOICES, budget=21) == {"steep": 8, "flat": 8, "small": 8}
    assert spread(CHOICES, budget=22) == {"steep": 8, "flat": 8, "small": None}
    assert spread(CHOICES, budget=32) == {"steep": 16, "flat": 8, "small": None}
    assert spread(CHOICES, budget=54) == {"steep": 16, "flat": None, "small": None}
    assert spread(CHOICES, budget=1000) == {"steep": None, "flat": None, "small": None}
    for budget in range(21, 90):
        chosen = spread(CHOICES, budget=budget)
        assert sum(c.size for name in chosen for c in CHOICES[name] if c.rank == chosen[name]) <= budget


def test_energy_is_met_with_few_bytes():
    for energy in (0.3, 0.5, 0.7, 0.9, 1.0):
        chosen = spread(CHOICES, energy=energy)
        picked = [next(c for c in CHOICES[name] if c.rank == rank) for name, rank in chosen.items()]
        assert 1 - sum(c.error for c in picked) / 3 >= energy - 1e-12
        fewest = min(
            sum(c.size for c in combination)
            for combination in itertools.product(*CHOICES.values())
            if 1 - sum(c.error for c in combination) / 3 >= energy - 1e-12
        )
        assert sum(c.size for c in picked) <= fewest + 22  # a step of the greedy choice


def test_ranks_of_few_errors_are_spread_nearly_as_well_as_can_be():
    torch.manual_seed(0)
    choices = {name: choices_of((64, 48), torch.rand(48).sort(descending=True).values.double() ** power)
               for name, power in (("a", 1), ("b", 4), ("c", 12))}  # fmt: skip
    for budget in range(8 * 112 * 12, 3 * 4 * 64 * 48, 2000):
        chosen = spread(choices, budget=budget)
        picked = [next(c for c in choices[name] if c.rank == rank) for name, rank in chosen.items()]
        best = min(
            sum(c.error for c in combination)
            for combination in itertools.product(*choices.values())
            if sum(c.size for c in combination) <= budget
        )
        assert sum(c.size for c in picked) <= budget
        assert sum(c.error for c in picked) <= best + 0.25
