"""Packing: the rows of a batch one after the other, without padding, through the blocks of an encoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.common.private_names import attention_of_config
from distill.errors import InputError
from distill.models.structure import find_blocks

_PACKABLE = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Positions are added to the embeddings, and a block takes nothing else that has a place for every token."""


@contextmanager
def packed(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Run the blocks of models on packed rows; what comes out of the last block is padded again.

    A token attends to those of its own row alone, so all that is computed is what it is with padding, to rounding.
    States that are caught between blocks are packed (see `unpacked`).

    Raises:
        InputError: a model whose blocks take more than states and a mask.
    """
    unfit = [model.config.model_type for model in models if model.config.model_type not in _PACKABLE]
    if unfit:
        raise InputError(f"packing: not for {', '.join(unfit)}; it works for {', '.join(_PACKABLE)}")
    hooks = [hook for model in models for hook in _Packing(model).hooks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unpacked(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Pad packed states 1×N×D to B×T×D, with zeros.

    Args:
        states: of a batch, between two blocks.
        attention_mask: B×T with N ones.
    """
    padded = states.new_zeros(*attention_mask.shape, states.shape[-1])
    return padded.index_put((attention_mask.bool(),), states[0])


class _Packing:
    """The hooks of one model, and the mask of the batch that is in it."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._valid: Tensor | None = None
        self._mask: Tensor | None = None
        _, blocks = find_blocks(model)
        self.hooks = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self.hooks += [block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in blocks]
        self.hooks.append(blocks[-1].register_forward_hook(self._leave))

    def _begin(self, model: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        attention_mask = options.get("attention_mask")
        self._valid = None
        if attention_mask is not None and not attention_mask.all():
            self._valid = attention_mask.bool()
            row = torch.arange(len(self._valid), device=self._valid.device).unsqueeze(-1).expand_as(self._valid)
            row = row[self._valid]
            mask = (row.unsqueeze(0) == row.unsqueeze(1))[None, None]
            if attention_of_config(self._model.config) == "eager":
                lowest = torch.finfo(torch.float32).min
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)
            self._mask = mask

    def _enter(
        self, block: nn.Module, arguments: tuple, options: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._valid is None:
            return None
        states, *others = arguments
        if states.shape[:2] == self._valid.shape:
            states = states[self._valid].unsqueeze(0)
        if others:
            others[0] = self._mask
        else:
            options = {**options, "attention_mask": self._mask}
        return (states, *others), options

    def _leave(self, block: nn.Module, arguments: tuple, output: Any) -> Any:
        if self._valid is None:
            return None
        if isinstance(output, tuple):
            return (unpacked(output[0], self._valid), *output[1:])
        return unpacked(output, self._valid)
