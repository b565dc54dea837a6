"""Batches of rows of like length: little padding, random all the same, and equal work for every process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, Dataset
from transformers import PreTrainedTokenizerBase

from distill.errors import InputError

COUNTED_ROWS = "counted_rows"
"""Of a batch: B booleans, false for rows that only fill up the last batch of a process."""

WINDOW = 50
"""Batches of a window by default."""

_ROWS_AT_ONCE = 10_000

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
        """Choose the epoch whose batches the next iteration draws."""
        self.epoch = epoch

    def arranged(self, epoch: int) -> Batches:
        """Draw the batches of an epoch, as row numbers for all processes together; as many batches in every epoch."""
        # Under a token budget a draw decides how many batches there are, but Trainer counts on one number.
        drawn = (self._split(self._draw(epoch, attempt)) for attempt in range(10))
        batches = next((batches for batches in drawn if batches is not None), None) or self._draw(0)
        generator = np.random.default_rng([self.seed, epoch, 1])
        order = generator.permutation(len(batches)).tolist()
        order.insert(0, order.pop(order.index(max(order, key=lambda number: self._padded(batches[number])))))
        return [batches[number] for number in order]

    def _split(self, batches: Batches) -> Batches | None:
        """Split batches until there are as many as in the first epoch; None if that can't be."""
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
        """Cut rows into batches in order of length, each with a row or more for every process."""
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


class RowNumbers(Dataset):
    """Stands for rows whose collator reads them itself, by their numbers."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> int:
        return number


class Reader:
    """Reads rows by their numbers and makes a padded batch of them.

    Rows of a plain `datasets.Dataset` go from Arrow to tensors as a whole, which takes a quarter of the time of a
    collator that gets lists; the batch is what `DataCollatorWithPadding` makes of them.

    Args:
        rows: anything with a length and items; what tells the rows is read.
        collate: for other rows; always used where `tokenizer` is none.
        tokenizer: knows how to pad.
        pad_to_multiple_of: rounds up the batch's width.
        label_filler: for rows with a label for each token.
        fillers: of other columns with a value for each token.
    """

    def __init__(
        self,
        rows: Any,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        tokenizer: Any,
        *,
        pad_to_multiple_of: int = 1,
        label_filler: int | None = None,
        fillers: Mapping[str, int] | None = None,
    ):
        self._rows, self._collate, self._multiple = rows, collate, pad_to_multiple_of
        self._arrow = None
        if isinstance(tokenizer, PreTrainedTokenizerBase) and _holds_numbers(rows):
            self._arrow = rows.with_format("arrow")
            self._pads_right = tokenizer.padding_side == "right"
            known = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
            self._fillers = {name: known.get(name, 0) for name in tokenizer.model_input_names} | dict(fillers or {})
            if label_filler is not None:
                self._fillers["labels"] = label_filler

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """Make the padded batch of these rows."""
        if self._arrow is not None:
            return self._padded(self._arrow[numbers])
        if hasattr(self._rows, "__getitems__"):
            return self._collate(self._rows.__getitems__(numbers))
        return self._collate([self._rows[number] for number in numbers])

    def _padded(self, table: pyarrow.Table) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in table.column_names:
            column = table[name].combine_chunks()
            if name in self._fillers:
                batch[name] = self._filled(column, self._fillers[name])
                continue
            nested = pyarrow.types.is_nested(column.type)
            values = column.flatten() if nested else column
            tensor = torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
            tensor = tensor.float() if tensor.is_floating_point() else tensor.long()
            key = "labels" if name in ("label", "label_ids") else name
            batch[key] = tensor.reshape(len(column), -1) if nested else tensor
        if "attention_mask" in self._fillers and "attention_mask" not in batch:
            ids = table["input_ids"].combine_chunks()
            ones = pyarrow.array(np.ones(len(ids.flatten()), dtype=np.int64))
            offsets = np.concatenate([[0], np.cumsum(pyarrow.compute.list_value_length(ids).to_numpy())])
            column = pyarrow.ListArray.from_arrays(pyarrow.array(offsets.astype(np.int32)), ones)
            batch["attention_mask"] = self._filled(column, 0)
        return batch

    def _filled(self, column: pyarrow.ListArray, filler: int) -> Tensor:
        lengths = pyarrow.compute.list_value_length(column).to_numpy()
        width = -(-int(lengths.max()) // self._multiple) * self._multiple
        places = np.arange(width)
        taken = places < lengths[:, None] if self._pads_right else places >= width - lengths[:, None]
        filled = np.full(taken.shape, filler, dtype=np.int64)
        filled[taken] = column.flatten().to_numpy()
        return torch.from_numpy(filled)


def with_columns(collate: Callable[[list], Any], fillers: Mapping[str, int]) -> Callable[[list], dict[str, Any]]:
    """A collator that also pads columns which the tokenizer does not know, on the right.

    Args:
        fillers: what each of them is padded with, where rows have it.
    """

    def collate_all(features: list[dict[str, Any]]) -> dict[str, Any]:
        known = [{name: value for name, value in row.items() if name not in fillers} for row in features]
        others = {
            name: pad_sequence([torch.tensor(row[name]) for row in features], batch_first=True, padding_value=filler)
            for name, filler in fillers.items()
            if name in features[0]
        }
        return {**collate(known), **others}

    return collate_all


def _holds_numbers(rows: Any) -> bool:
    """Tell whether rows are a plain `datasets.Dataset` of numbers and lists of them."""
    if not isinstance(rows, datasets.Dataset) or rows.format["type"] is not None:
        return False
    types = pyarrow.types
    kinds = [column.value_type if types.is_list(column) else column for column in rows.features.arrow_schema.types]
    return all(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) for kind in kinds)


def row_lengths(rows: Any, length_column: str) -> NDArray[np.int64] | None:
    """Read the number of tokens of each row; None for rows that are only made when they are read.

    Args:
        rows: tokenized rows, of any class.
        length_column: the column that holds the numbers; where it is missing `input_ids` are counted.

    Returns:
        N numbers of tokens.
    """
    if not isinstance(rows, datasets.Dataset) or rows.format["type"] == "custom":  # what is read on the fly
        return None
    name = length_column if length_column in rows.column_names else "input_ids"
    if name not in rows.column_names:
        return None
    tables = rows.select_columns([name]).with_format("arrow").iter(_ROWS_AT_ONCE)
    count = pyarrow.compute.list_value_length
    found = [(table[name] if name == length_column else count(table[name])).to_numpy() for table in tables]
    return np.concatenate(found) if found else np.zeros(0, np.int64)
