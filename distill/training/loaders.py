"""What a training reads its batches with."""

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from distill.data.batches import WINDOW, LengthBatches, RowNumbers
from distill.data.masking import Masking
from distill.errors import InputError
from distill.training.config import TrainingConfig


def length_loader(
    collate: Callable[[list[int], int], dict[str, Any]],
    lengths: NDArray[np.int64],
    args: TrainingConfig,
    batch_size: int,
) -> DataLoader:
    """This process's batches of rows of like length, on its device.

    Args:
        collate: makes a batch of the rows with these numbers, in this epoch.
        lengths: tokens of each row.
    """
    batches = LengthBatches(
        lengths,
        batch_size,
        max_tokens=args.max_tokens_per_batch,
        seed=args.seed if args.data_seed is None else args.data_seed,
        num_processes=args.world_size,
        process_index=args.process_index,
        window=1 if args.train_sampling_strategy == "random" else WINDOW,
    )
    loader = DataLoader(
        RowNumbers(len(lengths)),
        batch_sampler=batches,
        collate_fn=lambda numbers: collate(numbers, batches.epoch),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    # The batches are dealt to the processes already.
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )


def masking_of(tokenizer: Any, args: TrainingConfig, *, drawn_by_us: bool) -> Masking:
    """The masks for a training whose rows have no labels: they are masked anew whenever they are read.

    Args:
        tokenizer: what the trainer was given to process rows.
        drawn_by_us: whether batches know their rows' numbers.

    Raises:
        InputError: something is missing for it.
    """
    if not drawn_by_us or not isinstance(tokenizer, PreTrainedTokenizerBase) or args.dataloader_persistent_workers:
        raise InputError(
            "masked language model: to mask rows on the fly give a datasets.Dataset with input_ids, a tokenizer as "
            "processing_class and no dataloader_persistent_workers, or rows with labels that are masked already"
        )
    return Masking(tokenizer, args.mlm_probability, args.seed)
