"""The outputs of a model's forward: its logits, whether they are finite, and the head computed at some tokens alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import InputError

CHUNK = 256
"""Tokens whose logits are held at once: 155 MB for a vocabulary of 151,000."""


def plain_model(model: Any) -> PreTrainedModel:
    """Take the transformers model out of PEFT's wrapper; any other stays as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def logits_of(outputs: Any) -> Tensor:
    """Read the logits of a model's outputs: B×C, B×T×C, or for spans B×2×T, those of their starts and of their ends."""
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
    return outputs["logits"]


def all_finite(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Tell whether every logit is a finite number, those of padding aside: one boolean, on their device.

    Args:
        logits: as `logits_of` gives them.
        attention_mask: B×T, of models that read tokens.
    """
    sums = logits.float().sum(-1) if logits.ndim < 3 or logits.shape[1] != 2 else logits.float()
    if attention_mask is not None and sums.ndim > 1:  # attention may give padding anything
        valid = attention_mask.to(sums.device).bool()
        if sums.ndim == 3 and sums.shape[::2] == valid.shape:
            sums = sums.masked_fill(~valid.unsqueeze(1), 0)
        elif sums.shape == valid.shape:
            sums = sums.masked_fill(~valid, 0)
    return sums.isfinite().all()


def refuse_not_finite_outputs(logits: Tensor, attention_mask: Tensor | None, name: str) -> None:
    """Raise an error where a model predicts NaN or infinite values.

    Args:
        logits: as `logits_of` gives them.
        attention_mask: B×T, of models that read tokens.
        name: of the model, for the message.

    Raises:
        InputError: any logit is not finite, those of padding aside.
    """
    if not all_finite(logits, attention_mask):
        raise InputError(
            f"{name}: its predictions are NaN or infinite, so there is nothing to score; its weights are broken, or "
            "its dtype overflows (load it in float32 or bfloat16)"
        )


def finite_logits(model: PreTrainedModel, batch: Mapping[str, Tensor], name: str) -> Tensor:
    """Compute a model's logits of a batch, as `logits_of` gives them, in float32 in main memory.

    Args:
        model: in evaluation mode.
        batch: its inputs, without labels.
        name: of the model, for messages.

    Raises:
        InputError: they are NaN or infinite.
    """
    logits = logits_of(model(**batch)).float().cpu()
    refuse_not_finite_outputs(logits, batch.get("attention_mask"), name)
    return logits


@contextmanager
def head_at_mask(model: PreTrainedModel, mask: Tensor | None) -> Iterator[None]:
    """Compute a masked LM's head at the masked tokens alone: its logits are then 1×N×V.

    The head of a small model is most of its work: 30,000 outputs for each token, and of seven tokens one is masked.

    Args:
        model: a masked LM, plain or in PEFT's wrapper.
        mask: B×T booleans with N true; None for all tokens.
    """
    if mask is None:
        yield
        return

    def select(encoder: nn.Module, arguments: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[mask].unsqueeze(0)
        return output

    hook = plain_model(model).base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def logits_in_chunks(model: PreTrainedModel, inputs: Mapping[str, Tensor], mask: Tensor) -> Iterator[Tensor]:
    """Compute a language model's logits N×V of the tokens under a mask, `CHUNK` of them at a time.

    What is before the head runs once, the head for each chunk: B×T×V logits of 64 rows of 128 tokens would be 5 GB for
    a vocabulary of 151,000. An inference engine computes its head at all tokens, one row at a time.

    Args:
        model: in evaluation mode, or an exported one.
        inputs: that the model takes.
        mask: B×T booleans with N true.
    """
    if not isinstance(model, nn.Module):
        rows = [{name: values[row : row + 1] for name, values in inputs.items()} for row in range(len(mask))]
        logits = [logits_of(model(**each))[mask[row : row + 1]] for row, each in enumerate(rows)]
        yield from torch.cat(logits).split(CHUNK)
        return
    encoder = plain_model(model).base_model
    whole, replaced = encoder.forward, encoder.__dict__.get("forward")
    known: list[Any] = []
    states: list[Tensor] = []

    def forward(*arguments: Any, **options: Any) -> Any:
        if not known:
            known.append(whole(*arguments, **options))
            states.extend(known[0].last_hidden_state[mask].split(CHUNK))
        known[0].last_hidden_state = states.pop(0).unsqueeze(0)
        return known[0]

    encoder.forward = forward
    try:
        while not known or states:
            yield logits_of(model(**inputs))[0]
    finally:
        if replaced is None:
            del encoder.forward
        else:
            encoder.forward = replaced
