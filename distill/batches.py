"""Batches of rows of like length: little padding, random all the same, and equal work for every process."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, Dataset

from distill.errors import InputError

COUNTED_ROWS = "counted_rows"
"""Of a batch: B booleans, false for rows that only fill up the last batch of a process."""

_ROW_NUMBER = "row_number"

WINDOW = 50
"""Batches of a window by default."""

Batches = list[NDArray[np.int64]]


class LengthBatches(BatchSampler):
    """Row numbers of one process's batches, drawn anew each epoch.

    The rows are shuffled, cut into windows of some batches, sorted by length inside each, cut into batches, and the
    batches shuffled, the widest first (so that memory is short at once or never). Every row comes once an epoch. With
    several processes a batch of all of them is dealt row by row, so that each gets rows of like lengths; all have as
    many batches, and none is ever filled up with rows that don't count.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch of one process.
        max_tokens: padded tokens of a batch of one process, instead of `batch_size`.
        window: batches whose rows are sorted by length together; more of them pad less and mix less.

    Raises:
        InputError: a row longer than `max_tokens`, or fewer rows than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray,
        batch_size: int,
        *,
        max_tokens: int | None = None,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        window: int = WINDOW,
    ):
        self.lengths = np.asarray(lengths)
        self.batch_size, self.drop_last = batch_size, False
        self.max_tokens, self.seed = max_tokens, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.window, self.epoch = window, 0
        if len(self.lengths) < num_processes:
            raise InputError(f"{len(self.lengths)} training rows are too few for {num_processes} processes")
        if max_tokens is not None and self.lengths.max() > max_tokens:
            raise InputError(f"max_tokens_per_batch: {max_tokens}, but the longest row has {self.lengths.max()} tokens")
        self._num_batches = len(self._draw(0))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.arranged(self.epoch):
            yield rows[self.process_index :: self.num_processes].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next iteration draws."""
        self.epoch = epoch

    def arranged(self, epoch: int) -> Batches:
        """The row numbers of an epoch's batches of all processes together; as many in every epoch."""
        # Under a token budget a draw decides how many batches there are, but Trainer counts on one number.
        drawn = (self._split(self._draw(epoch, attempt)) for attempt in range(10))
        batches = next((batches for batches in drawn if batches is not None), None) or self._draw(0)
        generator = np.random.default_rng([self.seed, epoch, 1])
        order = generator.permutation(len(batches)).tolist()
        order.insert(0, order.pop(order.index(max(order, key=lambda number: self._padded(batches[number])))))
        return [batches[number] for number in order]

    def _split(self, batches: Batches) -> Batches | None:
        """Until there are as many as in the first epoch; None if that can't be."""
        while len(batches) < self._num_batches:
            longest = max(range(len(batches)), key=lambda number: len(batches[number]))
            if len(batches[longest]) < 2 * self.num_processes:
                return None
            batches[longest : longest + 1] = np.array_split(batches[longest], 2)
        return batches if len(batches) == self._num_batches else None

    def _draw(self, epoch: int, attempt: int = 0) -> Batches:
        shuffled = np.random.default_rng([self.seed, epoch, 0, attempt]).permutation(len(self.lengths))
        window = self.window * self.batch_size * self.num_processes
        if self.max_tokens is not None:
            window = int(self.window * self.max_tokens * self.num_processes / self.lengths.mean())
        starts = list(range(0, max(1, len(shuffled) - window // 2), window))  # a short rest joins the last window
        batches: Batches = []
        for start, stop in zip(starts, [*starts[1:], len(shuffled)], strict=True):
            rows = shuffled[start:stop]
            batches += self._cut(rows[np.argsort(self.lengths[rows], kind="stable")])
        return batches

    def _cut(self, rows: NDArray[np.int64]) -> Batches:
        """Batches of rows in order of length, each with a row or more for every process."""
        batches = []
        while len(rows):
            if self.max_tokens is None:
                taken = self.batch_size * self.num_processes
            else:  # the longest of the first n rows is the n-th
                padded = self.lengths[rows] * np.ceil(np.arange(1, len(rows) + 1) / self.num_processes)
                taken = int(np.searchsorted(padded, self.max_tokens, side="right"))
            batches.append(rows[:taken])
            rows = rows[taken:]
        if len(batches[-1]) < self.num_processes:
            rest = np.concatenate(batches[-2:])
            batches[-2:] = np.array_split(rest, 2 if len(rest) >= 2 * self.num_processes else 1)
        return batches

    def _padded(self, rows: NDArray[np.int64]) -> int:
        return int(self.lengths[rows].max()) * len(rows)


class NumberedRows(Dataset):
    """Rows that know their number, which the collator takes off again."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], _ROW_NUMBER: number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        if not hasattr(self.rows, "__getitems__"):
            return [self[number] for number in numbers]
        rows = self.rows.__getitems__(numbers)
        return [{**row, _ROW_NUMBER: number} for row, number in zip(rows, numbers, strict=True)]


class NumberedBatches:
    """A collator around another that adds what is known of the rows by their numbers; all rows count.

    Args:
        known: tensors of the rows with these numbers.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        known: Callable[[list[int]], dict[str, Any]],
    ):
        self.collate, self.known = collate, known

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of numbered rows."""
        numbers = [row.pop(_ROW_NUMBER) for row in rows]
        return {**self.collate(rows), **self.known(numbers), COUNTED_ROWS: torch.ones(len(rows), dtype=torch.bool)}


def row_lengths(rows: Any, length_column: str) -> NDArray[np.int64] | None:
    """Tokens of each row; None for rows that don't tell."""
    if not isinstance(rows, datasets.Dataset):
        return None
    if length_column in rows.column_names:
        return np.asarray(rows[length_column])
    if "input_ids" in rows.column_names:
        column = rows.with_format("arrow")["input_ids"]
        return pyarrow.compute.list_value_length(column[:]).to_numpy()
    return None
