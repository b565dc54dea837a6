"""Masks of a masked language model, drawn on the fly from a row's own generator."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.errors import InputError
from distill.tasks.language_modeling import mask_row
from distill.tasks.targets import IGNORED


class Masking:
    """Masks batches: what a row's masks are depends on the seed, the epoch and the row alone.

    So a step's gradients are the same however accumulation and processes split its rows, and a resumed run sees the
    masks that it would have seen. (`DataCollatorForLanguageModeling` draws from one generator in the loader's order.)

    Raises:
        InputError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float, seed: int):
        if tokenizer.mask_token_id is None:
            raise InputError(f"{type(tokenizer).__name__}: has no mask token, which a masked language model needs")
        self.tokenizer, self.share, self.seed = tokenizer, share, seed

    def __call__(self, batch: dict[str, Tensor], rows: Sequence[int], epoch: int) -> dict[str, Tensor]:
        """The batch with masked `input_ids` (B×T) and with `labels` (B×T, −100 for tokens that are not predicted).

        Args:
            rows: numbers of the batch's rows.
        """
        ids, labels = batch["input_ids"].clone(), torch.full_like(batch["input_ids"], IGNORED)
        for place, (row, mask) in enumerate(zip(rows, batch["attention_mask"].bool(), strict=True)):
            generator = np.random.default_rng([self.seed, epoch, row])
            masked, of_row = mask_row(ids[place, mask].numpy(), self.tokenizer, self.share, generator)
            ids[place, mask], labels[place, mask] = torch.from_numpy(masked), torch.from_numpy(of_row)
        return {**batch, "input_ids": ids, "labels": labels}
