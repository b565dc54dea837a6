import datasets
import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding

from distill.data.batches import LengthBatches, Reader, row_lengths
from distill.errors import InputError
from tests.conftest import make_tokenizer


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


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("label", ["label", "labels"])
@pytest.mark.parametrize("drop", [[], ["attention_mask"], ["token_type_ids"]])
def test_rows_are_padded_as_by_the_librarys_collator(side, label, drop):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    texts = ["a good film", "the plot was very bad", "nice"] * 4
    rows = datasets.Dataset.from_dict(
        {**tokenizer(texts), label: [index % 3 for index in range(12)], "teacher_logits": [[0.5, -1.0]] * 12,
         "score": [0.25] * 12}
    ).remove_columns(drop)  # fmt: skip
    for multiple in (1, 8):
        collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
        for chosen in (rows, rows.shuffle(seed=0), datasets.concatenate_datasets([rows, rows])):
            ours = Reader(chosen, collate, tokenizer, pad_to_multiple_of=multiple)([5, 0, 7, 2])
            theirs = collate([chosen[index] for index in [5, 0, 7, 2]])
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype
                assert torch.equal(ours[name], tensor), name


def test_other_rows_and_collators_are_left_to_the_collator():
    rows = [{"input_ids": [number]} for number in range(5)]
    read = Reader(rows, lambda chosen: {"chosen": [row["input_ids"] for row in chosen]}, make_tokenizer())
    assert read([3, 1]) == {"chosen": [[3], [1]]}
    dataset = datasets.Dataset.from_list(rows)
    assert Reader(dataset, lambda chosen: {"count": len(chosen)}, None)([3, 1]) == {"count": 2}
