"""Predict rows without labels with one model: a JSON object a row, in their order."""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel

from distill.common.console import progress
from distill.common.folders import opened_atomically
from distill.common.hardware import compute_device
from distill.common.serialized import json_text
from distill.data.new_rows import NewRows
from distill.data.tokenized import Processor
from distill.errors import InputError
from distill.evaluation.evaluate import input_batches, inputs_on_device
from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS, targets_of

_ENDINGS = (".jsonl", ".csv")

_ROWS_AT_ONCE = 4096
"""Their predictions are in memory together, and rows of like length among them make a batch."""


def predict_lines(
    model: PreTrainedModel,
    tokenizer: Processor,
    new: NewRows,
    encoded: datasets.Dataset,
    *,
    name: str = "model",
    batch_size: int = 64,
) -> Iterator[dict[str, Any]]:
    """Predict rows; the columns that go along stand before each prediction.

    Args:
        model: is moved to the device that computes, and put into evaluation mode.
        tokenizer: the model's, or its image processor.
        new: the rows.
        encoded: the same as `distill.data.tokenized.tokenize` makes them with `to_predict`.
        name: of the model, for the progress bar and messages.
        batch_size: encoded rows.

    Raises:
        InputError: outputs that are NaN or infinite, or a column that goes along is called like a prediction.
    """
    model = model.to(compute_device()).eval()
    task, rule, count = new.task, KINDS[new.task.kind].prediction, len(new.rows)
    row_of = np.arange(count)
    if "row" in encoded.column_names:
        row_of = encoded.with_format("arrow")["row"][:].to_numpy()
    batches = sum(math.ceil(len(part) / batch_size) for _, part in _parts(row_of, count))
    ticks = iter(progress(range(batches), f"Predicting with {name}"))
    for rows, windows in _parts(row_of, count):
        found: list[Any] = [None] * len(windows)
        for chosen, kept in _read(model, task.kind, encoded.select(windows), tokenizer, name, batch_size):
            for number, each in zip(chosen, kept, strict=True):
                found[number] = each
            next(ticks, None)
        columns = _values(encoded, rule.window_columns, windows)
        texts = _values(new.rows, task.text if rule.reads_text else (), rows)
        ends = np.searchsorted(row_of[windows.start : windows.stop], np.arange(rows.start, rows.stop), side="right")
        first = 0
        for text, along, last in zip(texts, _values(new.kept, new.kept.column_names, rows), ends, strict=True):
            line = rule.line(task, tokenizer, list(text.values()), columns[first:last], found[first:last])
            yield _together(along, line)
            first = last


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Write lines of JSON, or a row of a csv file for each: the whole file or none.

    In csv what an object holds has columns of its own (`probabilities.positive`), and a list is written as JSON.

    Args:
        path: ends in `.jsonl` or `.csv`.
        lines: with the same keys each.

    Returns:
        How many there were.
    """
    count = 0
    with opened_atomically(path) as file:
        writer = None
        for line in lines:
            count += 1
            if path.suffix == ".jsonl":
                file.write(json_text(line, indent=None) + "\n")
                continue
            cells = _cells(line)
            if writer is None:
                writer = csv.DictWriter(file, list(cells), lineterminator="\n")
                writer.writeheader()
            writer.writerow(cells)
    return count


def refuse_output(path: Path, *, overwrite: bool, rows: Any) -> None:
    """Raise an error where predictions can't be written to a file.

    Args:
        path: of the file.
        overwrite: whether it may be there already.
        rows: the path of the rows to predict, if there is one; they stay as they are.

    Raises:
        InputError: another ending than `.jsonl` and `.csv`, no such folder, or a file that is there already.
    """
    if path.suffix not in _ENDINGS:
        raise InputError(f"--output: {path} should end in {' or '.join(_ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output: {path.parent} is no folder; make it first")
    if path.is_dir():
        raise InputError(f"--output: {path} is a folder")
    if path.exists() and isinstance(rows, str) and Path(rows).expanduser().resolve() == path.resolve():
        raise InputError(f"--output: {path} holds the rows to predict; name another file")
    if path.exists() and not overwrite:
        raise InputError(f"--output: {path} is there already; name another file, or say --overwrite")


def _parts(row_of: np.ndarray, count: int) -> Iterator[tuple[range, range]]:
    """Cut rows into parts: the numbers of some rows, and of the encoded rows that are theirs.

    Args:
        row_of: of each encoded row the number of its row, in ascending order.
        count: of the rows.
    """
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = range(start, min(start + _ROWS_AT_ONCE, count))
        low, high = np.searchsorted(row_of, [rows.start, rows.stop]).tolist()
        yield rows, range(low, high)


def _read(
    model: PreTrainedModel, kind: TaskKind, rows: datasets.Dataset, tokenizer: Processor, name: str, batch_size: int
) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """Of each batch the numbers of its rows, and what the kind's rule reads of the model's outputs."""
    per_row = targets_of(model).per_row
    labels = [None] * len(rows) if per_row or "labels" not in rows.column_names else rows["labels"][:]
    sides = None if per_row else "right"
    for chosen, batch in input_batches(rows, tokenizer, batch_size=batch_size, padding_side=sides):
        with torch.inference_mode():
            of_batch = [labels[number] for number in chosen]
            yield chosen, KINDS[kind].prediction.read(model, inputs_on_device(model, batch), of_batch, name)


def _values(rows: datasets.Dataset, names: Sequence[str], chosen: range) -> list[dict[str, Any]]:
    """Some columns of some rows, a dictionary a row."""
    if not names:
        return [{} for _ in chosen]
    return list(rows.select_columns(list(names)).select(chosen))


def _together(along: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    hidden = along.keys() & line.keys()
    if hidden:
        raise InputError(f"--keep: {hidden.pop()!r} is what a prediction is called, too; leave it out")
    return {**along, **line}


def _cells(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The cells of a row of csv by their columns' names."""
    cells: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            cells |= _cells(value, f"{prefix}{key}.")
        else:
            cells[prefix + key] = json_text(value, indent=None) if isinstance(value, list) else value
    return cells
