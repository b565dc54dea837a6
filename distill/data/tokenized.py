"""Rows as model inputs: texts, words, questions, whole texts for language models, and images."""

from collections.abc import Callable
from typing import Any, TypeAlias

import datasets
import numpy as np
from transformers import BaseImageProcessor, BatchEncoding, PreTrainedTokenizerBase

from distill.data.columns import STORED_COLUMNS
from distill.data.masking import mask_row
from distill.errors import InputError
from distill.tasks.base import OF_LANGUAGE, Task
from distill.tasks.targets import IGNORED

Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor
"""What turns a row into a model's inputs."""

MASKED_SHARE = 0.15
"""Of the tokens of validation rows, whatever a training says (Devlin et al. 2019, section 3.1)."""

_LONGEST_QUESTION = 64
_Batch = dict[str, list]


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
    if isinstance(tokenizer, BaseImageProcessor):
        return _images(rows, task, tokenizer)
    if task.kind in ("token-classification", "question-answering", *OF_LANGUAGE) and not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__}: only fast tokenizers tell where a token stands, which {task.kind} needs"
        )
    encoders: dict[str, Callable[[_Batch, list[int]], _Batch]] = {
        "token-classification": lambda batch, _: _words(batch, task, tokenizer, max_length),
        "question-answering": lambda batch, numbers: _windows(
            batch, numbers, task, tokenizer, max_length, max_length // 3 if stride is None else stride
        ),
        "masked-lm": lambda batch, numbers: _language(batch, task, tokenizer, max_length, numbers if scored else None),
        "causal-lm": lambda batch, _: _language(batch, task, tokenizer, max_length, None),
    }
    encode = encoders.get(task.kind, lambda batch, _: _texts(batch, task, tokenizer, max_length))

    def encode_with_length(batch: _Batch, numbers: list[int]) -> _Batch:
        encoded = encode(batch, numbers)
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
    if task.kind == "classification" and task.label_names and "labels" in encoded.column_names:
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


def _texts(batch: _Batch, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> _Batch:
    columns = [batch[column] for column in task.text]
    if tokenizer.is_fast:
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        cut = _is_cut(encoded)
    else:  # those of Python don't tell what they cut
        encoded = tokenizer(*columns, verbose=False)
        cut = [len(ids) > max_length for ids in encoded["input_ids"]]
        for row in np.flatnonzero(cut):
            shorter = tokenizer(*(column[row] for column in columns), truncation=True, max_length=max_length)
            for name, values in shorter.items():
                encoded[name][row] = values
    stored = {name: batch[name] for name in STORED_COLUMNS if name in batch}
    return {**encoded, "labels": batch["label"], "cut": cut, **stored}


def _is_cut(encoded: BatchEncoding) -> list[bool]:
    return [bool(row.overflowing) for row in encoded.encodings or ()]


def _words(batch: _Batch, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> _Batch:
    """A word's label stands on its first token, −100 on the others; `words` are the numbers of those with a label.

    Words beyond `max_length` and words that become no token (empty ones, zero-width characters) are not among them.
    """
    encoded = tokenizer(batch[task.text[0]], is_split_into_words=True, truncation=True, max_length=max_length)
    labels, read = [], []
    for row, of_words in enumerate(batch["label"]):
        words = encoded.word_ids(row)
        first = [
            word if word is not None and word != before else None
            for word, before in zip(words, [None, *words], strict=False)
        ]
        labels.append([IGNORED if word is None else of_words[word] for word in first])
        read.append([word for word in first if word is not None and of_words[word] != IGNORED])
    return {**encoded, "labels": labels, "words": read, "cut": _is_cut(encoded)}


def _windows(
    batch: _Batch, numbers: list[int], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> _Batch:
    """Overlapping windows of each context behind its question; an answer outside of a window is its first token.

    `row` is the number of the row, `starts` and `ends` are the characters of the context under each token, −1 for
    tokens that are none of it.
    """
    room = max_length - stride - tokenizer.num_special_tokens_to_add(pair=True) - 1
    longest = max(1, min(_LONGEST_QUESTION, room))
    questions = [_shortened(question, tokenizer, longest) for question in batch[task.text[0]]]
    encoded = tokenizer(
        questions,
        batch[task.text[1]],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    is_cut = [short != question for short, question in zip(questions, batch[task.text[0]], strict=True)]
    more: _Batch = {name: [] for name in ("row", "starts", "ends", "start_positions", "end_positions", "cut")}
    for window, row in enumerate(rows):
        of_context = [part == 1 for part in encoded.sequence_ids(window)]
        places = np.where(np.array(of_context)[:, None], np.array(offsets[window]), -1)
        first, last = _tokens_of_answer(places, batch["label"][row])
        values = (numbers[row], places[:, 0].tolist(), places[:, 1].tolist(), first, last, is_cut[row])
        for name, value in zip(more, values, strict=True):
            more[name].append(value)
    return {**encoded, **more}


def _shortened(question: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
    """The first tokens of a question, as a longer one would leave no room for its context."""
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return question if len(offsets) <= longest else question[: offsets[longest - 1][1]]


def _tokens_of_answer(places: np.ndarray, answers: dict[str, list]) -> tuple[int, int]:
    """First and last token of the first answer; the first token of all where it has none or does not stand here.

    Args:
        places: T×2 first and last character of each token, −1 outside of the context.
    """
    if not answers["text"]:
        return 0, 0
    begins = answers["answer_start"][0]
    ends = begins + len(answers["text"][0])
    touched = np.flatnonzero((places[:, 0] < ends) & (places[:, 1] > begins))
    known = places[:, 0] >= 0
    if not len(touched) or places[known, 0].min() > begins or places[known, 1].max() < ends:
        return 0, 0
    return int(touched[0]), int(touched[-1])


def _language(
    batch: _Batch, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, masked: list[int] | None
) -> _Batch:
    """Texts as windows of `max_length` tokens; what is too short to predict anything is left out.

    Args:
        masked: for a masked LM that is scored, the numbers of the rows, which decide their masks.
    """
    encoded: BatchEncoding = tokenizer(
        batch[task.text[0]],
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
    )
    rows, special = encoded.pop("overflow_to_sample_mapping"), encoded.pop("special_tokens_mask")
    kept = [window for window, of_window in enumerate(special) if of_window.count(0) >= 2]
    found: _Batch = {name: [values[window] for window in kept] for name, values in encoded.items()}
    found["cut"] = [False] * len(kept)
    if task.kind == "causal-lm":
        return {**found, "labels": [list(ids) for ids in found["input_ids"]]}
    if masked is not None:
        pairs = [
            mask_row(np.array(ids), tokenizer, MASKED_SHARE, np.random.default_rng([masked[rows[window]], window]))
            for window, ids in zip(kept, found["input_ids"], strict=True)
        ]
        found["input_ids"] = [ids.tolist() for ids, _ in pairs]
        found["labels"] = [labels.tolist() for _, labels in pairs]
    return found


def _images(rows: datasets.Dataset, task: Task, processor: BaseImageProcessor) -> datasets.Dataset:
    def read(batch: _Batch) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[task.text[0]]]  # as `pipeline` reads them
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return rows.with_transform(read)
