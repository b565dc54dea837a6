"""What a training reads its batches with, and what a batch must have."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from distill.data.batches import COUNTED_ROWS, WINDOW, LengthBatches, Reader, RowNumbers
from distill.data.columns import STORED_COLUMNS
from distill.data.masking import Masking
from distill.errors import InputError
from distill.tasks.targets import IGNORED, ProblemType
from distill.training.cache import TEACHER_OUTPUTS
from distill.training.config import DistillationConfig, TrainingConfig
from distill.training.teachers import Teacher


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


def with_cached(
    read: Reader, teachers: Sequence[Teacher], masking: Masking | None
) -> Callable[[list[int], int], dict[str, Any]]:
    """Makes the training batch of the rows with these numbers in an epoch, with what is cached of the teachers."""

    def collate(numbers: list[int], epoch: int) -> dict[str, Any]:
        cached = {str(each.number): each.cache.read(numbers) for each in teachers if each.cache is not None}
        every = torch.ones(len(numbers), dtype=torch.bool)  # no process is filled up
        batch = read(numbers)
        if masking is not None:
            batch = masking(batch, numbers, epoch)
        return {**batch, COUNTED_ROWS: every, **({TEACHER_OUTPUTS: cached} if cached else {})}

    return collate


def completed(
    batch: Mapping[str, Tensor], problem: ProblemType, image_tokens: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """A batch with an attention mask, and with the rows that count.

    With several processes the last batches are filled up with rows from the start of the epoch.

    Args:
        problem: of the student.
        image_tokens: the states of an image, where rows are images.
        accelerator: knows how far the loader has come.
    """
    batch = dict(batch)
    if "pixel_values" in batch:  # the patches of an image all count
        ids = batch["pixel_values"].new_ones(len(batch["pixel_values"]), image_tokens, dtype=torch.long)
    else:
        ids = batch["input_ids"]
    batch.setdefault("attention_mask", torch.ones_like(ids))
    if problem == "causal_lm" and "labels" not in batch:
        batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, IGNORED)
    if "labels" in batch and problem in ("regression", "multi_label_classification"):
        batch["labels"] = batch["labels"].float()  # whole numbers are scores, or zeros and ones, here
    if COUNTED_ROWS not in batch:
        loader = accelerator.gradient_state
        real = len(ids)
        if loader.end_of_dataloader and loader.remainder > 0:
            real = loader.remainder - accelerator.process_index * len(ids)
        batch[COUNTED_ROWS] = torch.arange(len(ids), device=ids.device) < real
    return batch


def pooled_negatives(
    teacher: Teacher, num_rows: int, read: Callable[[list[int]], dict[str, Tensor]], args: DistillationConfig
) -> Tensor:
    """For the contrastive loss: the teacher's pooled states (N×D) of rows spread over a whole data set.

    Args:
        num_rows: of the data set.
        read: makes a completed batch of the rows with these numbers.
    """
    wanted = min(args.contrastive_negatives, num_rows)
    rows = np.linspace(0, num_rows - 1, wanted).round().astype(int).tolist()
    size = args.per_device_eval_batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = [teacher.outputs(read(batch))[1].pooled for batch in batches]
    return torch.cat([pooled for pooled in found if pooled is not None])


def made_as_read(rows: Any) -> bool:
    """Whether rows (images) become inputs only when they are read, by a transform of their own."""
    return isinstance(rows, datasets.Dataset) and rows.format["type"] == "custom"


def check_columns(rows: Any, label_names: Sequence[str], *, needs_stored: bool, needs_labels: bool) -> None:
    """Refuse training rows without the columns that the losses compare with.

    Args:
        label_names: the columns that the student's task has its labels in.
        needs_stored: a teacher is "data".
        needs_labels: the hard loss is on, and its labels are not made of the text itself.

    Raises:
        InputError: a column is missing.
    """
    columns = getattr(rows, "column_names", None)
    if columns is None or made_as_read(rows):
        return
    if needs_stored and not set(STORED_COLUMNS) & set(columns):
        raise InputError(
            f"teacher: 'data' needs a column {' or '.join(STORED_COLUMNS)} in the training rows; "
            f"they have {', '.join(columns)}"
        )
    if needs_labels and not {"label", "label_ids", *label_names} & set(columns):
        raise InputError(f"hard_weight: the training rows have no labels (only {', '.join(columns)}); set it to 0")
