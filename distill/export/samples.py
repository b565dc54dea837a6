"""Random inputs of several shapes, and how far what an engine computes of them is from what the model does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.models.load import longest_input
from distill.models.structure import accepted_inputs, input_names
from distill.models.timing import random_inputs
from distill.tasks.kinds import targets_of
from distill.tasks.outputs import logits_of


def sample_inputs(
    model: PreTrainedModel, processor: Any, batches: Sequence[Mapping[str, Tensor]] = ()
) -> list[dict[str, Tensor]]:
    """Random inputs of several shapes, the first of which has several rows and tokens; some tokens are padding.

    Args:
        processor: the tokenizer, whose inputs are made, or the image processor, whose size.
        batches: of real inputs, whose names and size are taken instead.
    """
    names = list(batches[0]) if batches else [*getattr(processor, "model_input_names", ())]
    if "pixel_values" in input_names(model):
        sample = _image(processor) if not batches else batches[0]["pixel_values"][:1].cpu()
        return [{"pixel_values": torch.rand(rows, *sample.shape[1:])} for rows in (2, 1, 3)]
    longest = longest_input(model.config) or 192
    shapes = [(2, min(12, longest)), (1, min(5, longest)), (3, min(192, longest))]
    return [accepted_inputs(model, _tokens(model, rows, length, names)) for rows, length in shapes]


def _tokens(model: PreTrainedModel, rows: int, length: int, names: Sequence[str]) -> dict[str, Tensor]:
    inputs = random_inputs(model, rows, length, torch.device("cpu"))
    padding = getattr(model.config, "pad_token_id", None) or 0
    inputs["attention_mask"][-1, (length + 1) // 2 :] = 0
    inputs["input_ids"].masked_fill_(inputs["input_ids"] == padding, padding + 1)
    inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, padding)
    if "token_type_ids" in names:
        types = torch.arange(length).ge(length // 2).long().expand(rows, length)
        inputs["token_type_ids"] = types.clamp(max=getattr(model.config, "type_vocab_size", 1) - 1).clamp(min=0)
    return inputs


def _image(processor: Any) -> Tensor:
    """What an image processor makes of an image."""
    return processor(np.zeros((64, 64, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]


def largest_difference(model: PreTrainedModel, exported: Any, samples: Sequence[Mapping[str, Tensor]]) -> float:
    """The largest difference of an output, as a share of the largest output; what stands at padding doesn't count.

    Args:
        exported: an `ExportedModel`.
    """
    differences, sizes = [], []
    for inputs in samples:
        with torch.no_grad():
            expected, found = _real_logits(model, model, inputs), _real_logits(model, exported, inputs)
        if found.shape != expected.shape:
            return float("inf")
        differences.append(float((found - expected).abs().max()))
        sizes.append(float(expected.abs().max()))
    largest = max(differences) / max(sizes) if max(sizes) else max(differences)
    return largest if np.isfinite(largest) else float("inf")


def _real_logits(model: PreTrainedModel, computed_by: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    targets = targets_of(model)
    logits = logits_of(computed_by(**inputs)).float()
    if targets.token_axis is None or "attention_mask" not in inputs:
        return logits
    logits = targets.tokens_first(logits)
    return logits[inputs["attention_mask"].bool()] if logits.shape[:2] == inputs["attention_mask"].shape else logits
