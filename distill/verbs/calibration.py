"""Training rows that verbs measure on, which learn nothing from them."""

import numpy as np
from torch import Tensor

from distill.common.console import log
from distill.data.load import Data
from distill.data.tokenized import Processor
from distill.evaluation.evaluate import input_batches

_BATCH_SIZE = 64


def calibration_batches(
    data: Data, processor: Processor, *, rows: int, tokens: int | None = None
) -> list[dict[str, Tensor]]:
    """The model inputs of a random part of the training rows, in batches of like length.

    Args:
        rows: how many, of those that there are.
        tokens: as many rows instead as hold these, where rows are texts.
    """
    found = data.tokenized("train", processor).shuffle(seed=0, keep_in_memory=True)
    if tokens is not None and "length" in found.column_names:
        rows = int(np.searchsorted(np.cumsum(found["length"]), tokens)) + 1
    found = found.select(range(min(rows, len(found))))
    log.print(f"      measuring on {len(found):,} training rows")
    return [batch for _, batch in input_batches(found, processor, batch_size=_BATCH_SIZE)]
