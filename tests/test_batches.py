import datasets
import numpy as np
import pytest
import torch

from distill.batches import LengthBatches, row_lengths
from distill.errors import InputError


def lengths_like_sst2(count=5000, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(2.3, 0.7, count), 3, 66).astype(int)


def padded_share(lengths, batches):
    return sum(len(rows) * lengths[rows].max() for rows in batches) / lengths.sum()


def test_every_row_comes_once_an_epoch_and_batches_change():
    sampler = LengthBatches(lengths_like_sst2(), 32, seed=3)
    seen = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert len(seen[-1]) == len(sampler) == 157
        assert sorted(row for batch in seen[-1] for row in batch) == list(range(5000))
    assert seen[0] == seen[2] != seen[1]
    together = {frozenset(batch) for batch in seen[0]} & {frozenset(batch) for batch in seen[1]}
    assert not together  # not the same rows in another order
    assert list(LengthBatches(lengths_like_sst2(), 32, seed=4)) != seen[0]


def test_little_padding_and_the_widest_first():
    lengths = lengths_like_sst2(60_000)
    sampler = LengthBatches(lengths, 32)
    batches = sampler.arranged(0)
    assert padded_share(lengths, batches) < 1.06
    random = LengthBatches(lengths, 32, window=1)
    assert padded_share(lengths, random.arranged(0)) > 1.8
    assert lengths[batches[0]].max() * 32 == max(lengths[rows].max() * len(rows) for rows in batches)


@pytest.mark.parametrize(("count", "size"), [(1000, 8), (1001, 8), (17, 8), (2, 8), (3, 1), (1003, 7)])
@pytest.mark.parametrize("max_tokens", [None, 200])
def test_processes_have_equal_work(count, size, max_tokens):
    lengths = lengths_like_sst2(count)
    processes = [
        LengthBatches(lengths, size, max_tokens=max_tokens, num_processes=2, process_index=index) for index in (0, 1)
    ]
    for epoch in range(4):
        for process in processes:
            process.set_epoch(epoch)
        mine, theirs = (list(process) for process in processes)
        assert len(mine) == len(theirs) == len(processes[0])
        assert all(0 <= len(first) - len(second) <= 1 and second for first, second in zip(mine, theirs, strict=True))
        rows = [row for batch in mine + theirs for row in batch]
        assert sorted(rows) == list(range(count))
        if count > 100:
            tokens = [sum(lengths[batch].sum() for batch in batches) for batches in (mine, theirs)]
            assert tokens[0] == pytest.approx(tokens[1], rel=0.03)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_token_budget_is_kept_in_every_epoch(processes):
    lengths = lengths_like_sst2(3000)
    samplers = [
        LengthBatches(lengths, 1, max_tokens=500, num_processes=processes, process_index=index)
        for index in range(processes)
    ]
    for epoch in range(12):
        for sampler in samplers:
            sampler.set_epoch(epoch)
            batches = [np.array(rows) for rows in sampler]
            assert len(batches) == len(sampler)
            assert max(len(rows) * lengths[rows].max() for rows in batches) <= 500
    filled = sum(lengths) / (500 * processes * len(samplers[0]))
    assert filled > 0.8


def test_what_cannot_be_is_said():
    with pytest.raises(InputError, match="max_tokens_per_batch: 20, but the longest row has 66 tokens"):
        LengthBatches(lengths_like_sst2(), 32, max_tokens=20)
    with pytest.raises(InputError, match="1 training rows are too few for 2 processes"):
        LengthBatches([4], 32, num_processes=2)


def test_lengths_are_read_from_a_column_or_the_ids():
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [1, 2, 3], [1]]})
    assert row_lengths(rows, "length").tolist() == [2, 3, 1]
    assert row_lengths(rows.select([2, 0]), "length").tolist() == [1, 2]
    assert row_lengths(rows.add_column("length", [5, 6, 7]), "length").tolist() == [5, 6, 7]
    assert row_lengths(torch.utils.data.TensorDataset(torch.zeros(3)), "length") is None
