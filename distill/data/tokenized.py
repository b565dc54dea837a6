"""Rows as model inputs: texts, words, questions, whole texts for language models, and images."""

from typing import TypeAlias

import datasets
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from distill.errors import InputError
from distill.tasks.base import Batch, EncodeOptions, Task
from distill.tasks.kinds import KINDS

Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor
"""What turns a row into a model's inputs."""


def tokenize(
    rows: datasets.Dataset,
    task: Task,
    tokenizer: Processor,
    max_length: int,
    *,
    stride: int | None = None,
    scored: bool = False,
) -> datasets.Dataset:
    """Rows as model inputs: `input_ids` and the tokenizer's other columns (unpadded), labels, and `length` in tokens.

    One row may become several: the windows of a long context or text. `cut` says whether `max_length` took something
    from a row (of questions: from the question itself). Images stay as they are and are turned into `pixel_values` when
    they are read.

    Class ids are a `ClassLabel` with the task's names.

    Args:
        stride: tokens that neighbouring windows of a context share; a third of `max_length` by default.
        scored: the masks of a masked LM are drawn here, once; for training they are drawn anew whenever a row is read.
    """
    its, options = KINDS[task.kind], EncodeOptions(max_length, stride, scored)
    if isinstance(tokenizer, BaseImageProcessor):
        return rows.with_transform(lambda batch: its.encode(batch, [], task, tokenizer, options))
    if its.needs_offsets and not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__}: only fast tokenizers tell where a token stands, which {task.kind} needs"
        )

    def encode_with_length(batch: Batch, numbers: list[int]) -> Batch:
        encoded = its.encode(batch, numbers, task, tokenizer, options)
        return encoded | {"length": [len(ids) for ids in encoded["input_ids"]]}

    encoded = rows.map(
        encode_with_length,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        keep_in_memory=True,
        desc="Tokenizing",
        load_from_cache_file=False,
    )
    if its.labels.one_class and task.label_names and "labels" in encoded.column_names:
        # What the ids mean goes along, to be compared with what a model takes them for.
        encoded = encoded.cast_column("labels", datasets.ClassLabel(names=list(task.label_names)))
    return encoded


def cut_rows(rows: datasets.Dataset) -> int | None:
    """How many rows `max_length` took something from; None for images.

    Args:
        rows: as `tokenize` makes them.
    """
    if "cut" not in rows.column_names:
        return None
    numbers = rows["row"] if "row" in rows.column_names else range(len(rows))  # windows of one row count once
    return len({number for number, cut in zip(numbers, rows["cut"], strict=True) if cut})


def beside(rows: datasets.Dataset, others: datasets.Dataset, names: list[str], prefix: str) -> datasets.Dataset:
    """Tokenized rows with inputs that another tokenizer made of them.

    Args:
        others: the same rows, as that one tokenized them.
        names: of its columns, those to take.
        prefix: of the new columns.
    """
    columns = others.select_columns(names).rename_columns({name: prefix + name for name in names})
    return datasets.concatenate_datasets([rows, columns], axis=1)
