"""Lines of language models: what may stand in the place of each mask, and how well a text is predicted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import InputError
from distill.tasks.base import Batch, EncodeOptions, Task
from distill.tasks.outputs import logits_in_chunks, refuse_not_finite_outputs
from distill.tasks.predicted.rows import shown
from distill.tasks.targets import IGNORED

_FILLINGS = 5
"""Of each mask, as many as `pipeline` gives."""


def encode_to_fill(
    batch: Batch, numbers: Sequence[int], task: Task, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Batch:
    """Tokenize texts with masks into windows of `max_length` tokens; those without a mask are left out.

    Labels are 0 where a mask stands, and −100 elsewhere; `row` is the number of a window's text.

    Args:
        batch: the task's column of texts.
        numbers: of the rows.
        task: which column is read.
        tokenizer: of the model that will read the rows.
        options: `max_length` in tokens.

    Raises:
        InputError: a text without a mask.
    """
    mask = tokenizer.mask_token_id
    encoded = tokenizer(
        batch[task.text[0]],
        truncation=True,
        max_length=options.max_length,
        return_overflowing_tokens=True,
        return_attention_mask=False,
    )
    rows = encoded.pop("overflow_to_sample_mapping")
    kept = [window for window, ids in enumerate(encoded["input_ids"]) if mask in ids]
    empty = sorted(set(range(len(batch[task.text[0]]))) - {rows[window] for window in kept})
    if empty:
        raise InputError(
            f"data.text: row {numbers[empty[0]]} holds no {tokenizer.mask_token}; a masked language model says what "
            "may stand in its place"
        )
    found: Batch = {name: [values[window] for window in kept] for name, values in encoded.items()}
    found["labels"] = [[0 if each == mask else IGNORED for each in ids] for ids in found["input_ids"]]
    return {**found, "cut": [False] * len(kept), "row": [numbers[rows[window]] for window in kept]}


def read_fillings(
    model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence[Sequence[int]], name: str
) -> list[list[list[tuple[int, float]]]]:
    """Find the likeliest tokens of each mask of each row of a batch, with their probabilities.

    Args:
        model: in evaluation mode.
        batch: its inputs, B×T.
        labels: of each row's tokens, −100 for those that are no mask; padding is on the right.
        name: of the model, for messages.

    Raises:
        InputError: logits that are NaN or infinite.
    """
    places = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, of_row in enumerate(labels):
        places[row, : len(of_row)] = torch.tensor(of_row, device=places.device) != IGNORED
    found: list[list[tuple[int, float]]] = []
    for logits in logits_in_chunks(model, batch, places):
        refuse_not_finite_outputs(logits, None, name)
        likeliest = torch.softmax(logits.float(), -1).topk(min(_FILLINGS, logits.shape[-1]))
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        found += [list(zip(*pair, strict=True)) for pair in pairs]
    masks = iter(found)
    return [[next(masks) for _ in range(count)] for count in places.sum(1).tolist()]


def fillings_line(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Any],
    windows: Sequence[Mapping[str, Any]],
    found: Sequence[list[list[tuple[int, float]]]],
) -> dict[str, Any]:
    """Say for each mask of a row, in their order, the five likeliest tokens with their probabilities.

    Args:
        task: of the row; it changes nothing here.
        tokenizer: which writes the tokens.
        texts: of the row; they change nothing here.
        windows: of the row.
        found: of each window, for each of its masks, ids and probabilities.
    """
    masks = [mask for of_window in found for mask in of_window]
    return {
        "fillings": [
            [{"token": tokenizer.decode([token]), "score": shown(score)} for token, score in mask] for mask in masks
        ]
    }


def perplexity_line(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Any],
    windows: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Say the perplexity of a row's text, its negative log-likelihood (nats), and the tokens that were predicted.

    Args:
        task: of the row; it changes nothing here.
        tokenizer: changes nothing here.
        texts: of the row; they change nothing here.
        windows: of the row; none where its text has too few tokens to predict one.
        found: of each window {"loss": nats, "tokens": ids}.
    """
    tokens, loss = sum(len(each["tokens"]) for each in found), math.fsum(each["loss"] for each in found)
    perplexity = shown(math.exp(loss / tokens)) if tokens else None
    return {"perplexity": perplexity, "nll": shown(loss), "tokens": tokens}
