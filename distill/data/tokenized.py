"""Rows as model inputs: texts, words, questions, whole texts for language models, and images."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from distill.common.console import progress
from distill.data.stored import rows_fingerprint, stored_rows
from distill.errors import InputError
from distill.tasks.base import Batch, Encode, EncodeOptions, Task
from distill.tasks.kinds import KINDS

Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor
"""What turns a row into a model's inputs."""

_ROWS_AT_ONCE = 1000
_TYPES = {"input_ids": np.int32, "token_type_ids": np.int8, "attention_mask": np.int8}
"""Of tokens' columns, as `datasets` chooses them."""


def tokenize(
    rows: datasets.Dataset,
    task: Task,
    tokenizer: Processor,
    max_length: int,
    *,
    stride: int | None = None,
    scored: bool = False,
    to_predict: bool = False,
    fingerprint: str | None = None,
) -> datasets.Dataset:
    """Turn rows into model inputs: `input_ids` and what else the tokenizer gives (unpadded), labels, and `length`.

    One row may become several: the windows of a long context or text. `cut` says whether `max_length` took something
    from a row (of questions: from the question itself). Images stay as they are and are turned into `pixel_values` when
    they are read.

    Class ids are a `ClassLabel` with the task's names.

    Args:
        rows: checked rows of one split.
        task: of these rows.
        tokenizer: of the model that will read them; its image processor for images.
        max_length: tokens of a row or window at most.
        stride: tokens that neighbouring windows of a context share; a third of `max_length` by default.
        scored: the masks of a masked LM are drawn here, once; for training they are drawn anew whenever a row is read.
        to_predict: the rows have no label, and are encoded as the kind's `PredictionRule` says.
        fingerprint: of the tokenizer. With it rows are kept on disk, and found there again; without it in memory.

    Raises:
        InputError: the task needs to know where a token stands in its text, and the tokenizer is not a fast one.
    """
    its, options = KINDS[task.kind], EncodeOptions(max_length, stride, scored)
    encode = its.prediction.encode if to_predict else its.encode

    def encoded_rows(batch: Batch, numbers: Sequence[int]) -> Batch:
        if to_predict:
            batch["label"] = [its.prediction.label(task, value) for value in batch[task.text[0]]]
        return encode(batch, numbers, task, tokenizer, options)

    if isinstance(tokenizer, BaseImageProcessor):
        return rows.with_transform(lambda batch: encoded_rows(batch, []))
    if its.needs_offsets and not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__}: only fast tokenizers tell where a token stands, which {task.kind} needs"
        )

    def made(start: int) -> Batch:
        numbers = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
        return encoded_rows(rows[numbers.start : numbers.stop], numbers)

    def write(writer: ArrowWriter) -> None:
        starts = range(0, len(rows), _ROWS_AT_ONCE)
        for found in _one_ahead(made, progress(starts, "Tokenizing", total=len(starts))):
            writer.write_batch(_as_arrow(found, tokenizer))

    chosen = [asdict(task), max_length, stride, scored, type(tokenizer).__qualname__, _source_of(encode)]
    chosen += ["to predict"] if to_predict else []
    encoded = stored_rows(fingerprint and rows_fingerprint(rows, fingerprint, chosen), write)
    if its.labels.one_class and task.label_names and "labels" in encoded.column_names:
        # What the ids mean goes along, to be compared with what a model takes them for.
        features = encoded.features.copy()
        features["labels"] = datasets.ClassLabel(names=list(task.label_names))
        info = datasets.DatasetInfo(features=features)
        encoded = datasets.Dataset(encoded.data, info, fingerprint=encoded._fingerprint)
    return encoded


def cut_rows(rows: datasets.Dataset) -> int | None:
    """Count the rows that `max_length` took something from; None for images.

    Args:
        rows: as `tokenize` makes them.
    """
    if "cut" not in rows.column_names:
        return None
    table = rows.with_format("arrow")
    cut = table["cut"][:]
    if "row" in rows.column_names:  # windows of one row count once
        return len(pc.unique(table["row"][:].filter(cut)))
    return pc.sum(cut).as_py() or 0


def beside(rows: datasets.Dataset, others: datasets.Dataset, names: list[str], prefix: str) -> datasets.Dataset:
    """Tokenized rows with inputs that another tokenizer made of them.

    Args:
        others: the same rows, as that one tokenized them.
        names: of its columns, those to take.
        prefix: of the new columns.
    """
    columns = others.select_columns(names).rename_columns({name: prefix + name for name in names})
    return datasets.concatenate_datasets([rows, columns], axis=1)


def same_tokens(
    rows: datasets.Dataset,
    others: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
) -> NDArray[np.bool_]:
    """Whether two tokenizers cut each row into the same tokens, whatever the ids of these in either vocabulary.

    Args:
        rows: as `tokenizer` cut them.
        others: the same rows, as `other` cut them.
    """
    ids, ids_of_other = tokenizer.get_vocab(), other.get_vocab()
    translated = np.full(max(ids.values()) + 1, -1)
    translated[list(ids.values())] = [ids_of_other.get(token, -1) for token in ids]
    tables = (each.select_columns(["input_ids"]).with_format("arrow").iter(_ROWS_AT_ONCE) for each in (rows, others))
    found = [np.zeros(0, dtype=np.bool_)]
    for both in zip(*tables, strict=True):
        first, second = (table["input_ids"].combine_chunks() for table in both)
        lengths = pc.list_value_length(first).to_numpy()
        same = lengths == pc.list_value_length(second).to_numpy()
        tokens, tokens_of_other = (column.filter(pa.array(same)).flatten().to_numpy() for column in (first, second))
        differ = translated[tokens] != tokens_of_other
        same[np.repeat(np.flatnonzero(same), lengths[same])[differ]] = False
        found.append(same)
    return np.concatenate(found)


def same_specials(tokenizer: Processor, other: Processor) -> bool:
    """Whether two tokenizers put the same tokens around a text; where not, they read no row as the same tokens."""
    both = (tokenizer, other)
    if any(isinstance(each, BaseImageProcessor) for each in both):
        return False
    first, second = (each.convert_ids_to_tokens(each("")["input_ids"]) for each in both)
    return first == second


def _source_of(encode: Encode) -> str:
    """The code of the module that holds a kind's `encode`: rows that another one made are not found again."""
    return inspect.getsource(sys.modules[encode.__module__])


def _one_ahead(function: Callable[[int], Batch], items: Iterable[int]) -> Iterator[Batch]:
    """`function` of each item, the next one being worked on while the caller has the last one.

    A fast tokenizer computes on all cores without Python, which can make columns of the last batch meanwhile.
    """
    with ThreadPoolExecutor(1) as thread:
        pending = None
        for item in items:
            following = thread.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _as_arrow(found: Batch, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The columns of some rows with `length`, and with an attention mask where the tokenizer made none.

    The columns of all tokens become Arrow's here, which takes a tenth of the time that `pa.array` does.
    """
    lengths = np.fromiter(map(len, found["input_ids"]), np.int64, len(found["input_ids"]))
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    columns: dict[str, Any] = {}
    for name in tokenizer.model_input_names:
        if name == "attention_mask" and name not in found:
            values = np.ones(lengths.sum(), np.int8)
        elif name in _TYPES and name in found:
            values = np.fromiter(chain.from_iterable(found[name]), _TYPES[name], lengths.sum())
        else:
            continue
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values))
    return {**columns, **{name: values for name, values in found.items() if name not in columns}, "length": lengths}
