"""The rows of a training: how they become batches, what of the teachers is cached, and what a batch must have."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.common.console import log
from distill.common.distributed import wait_for_everyone
from distill.data.batches import COUNTED_ROWS, WINDOW, LengthBatches, Reader, RowNumbers, row_lengths
from distill.data.masking import Masking
from distill.errors import InputError
from distill.models.structure import input_names
from distill.tasks.base import STORED_COLUMNS
from distill.tasks.targets import IGNORED, Targets
from distill.training.cache import TEACHER_OUTPUTS, TeacherOutputs, build_cache
from distill.training.cache_plan import CachePlan, passes_over_rows, plan_cache
from distill.training.config import DistillationConfig, TrainingConfig
from distill.training.parts import COUNTS, count
from distill.training.teachers import Teacher, fillers_of


class TrainingRows:
    """Makes batches of a training's rows, with what is cached of the teachers.

    The data set, its collator and its tokenizer are the trainer's, which may be given others at any time.

    Args:
        teachers: what is cached is of these.
        args: the trainer's arguments.
        targets: of the student.
        image_tokens: the states of an image, where rows are images.
        collates_otherwise: whether the collator is not the trainer's own, so that it may change the rows.
        accelerator: knows how far a loader has come.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        args: TrainingConfig,
        targets: Targets,
        *,
        image_tokens: int,
        collates_otherwise: bool,
        accelerator: Accelerator,
    ):
        self._teachers, self._args, self._targets = teachers, args, targets
        self._image_tokens, self._collates_otherwise = image_tokens, collates_otherwise
        self._accelerator = accelerator
        self.fillers = fillers_of(teachers)
        """What columns of the teachers' own are padded with."""
        self._masking: Masking | None = None

    def check(self, dataset: Any, tokenizer: Any, *, hard: bool) -> None:
        """Look for what the losses compare with; a masked language model's rows without labels are masked as read.

        Args:
            hard: whether the labels count.

        Raises:
            InputError: a column is missing, or something to mask rows with.
        """
        columns = getattr(dataset, "column_names", None)
        if self._targets.masks_inputs and columns is not None and "labels" not in columns:
            self._masking = masking_of(tokenizer, self._args, drawn_by_us=self.lengths(dataset) is not None)
        check_columns(
            dataset,
            self._targets.label_columns,
            needs_stored=any(each.model is None for each in self._teachers),
            needs_labels=hard and self._masking is None and not self._targets.inputs_are_labels,
        )

    def columns(self, student: PreTrainedModel) -> list[str]:
        """All that is read of a row: inputs of the student and of teachers, labels, lengths, stored predictions."""
        models = [student, *(each.model for each in self._teachers if each.model is not None)]
        inputs = {name for model in models for name in input_names(model)}
        labels = ("label", "label_ids", *self._targets.label_columns)
        same_tokens = [each.same_tokens for each in self._teachers if each.same_tokens]
        return [*inputs, *labels, *self.fillers, *same_tokens, self._args.length_column_name, *STORED_COLUMNS]

    def lengths(self, dataset: Any) -> NDArray[np.int64] | None:
        """Tokens of each row, where batches are drawn by them; else None, and Trainer deals the rows."""
        ours = self._args.train_sampling_strategy in ("group_by_length", "random")
        if not ours or self._args.dataloader_drop_last:
            return None
        return row_lengths(dataset, self._args.length_column_name)

    def reader(self, dataset: Any, collator: Any, tokenizer: Any) -> Reader:
        """Reads batches of rows that hold only what models and losses take.

        Args:
            tokenizer: the trainer's; where the collator is not the trainer's own, it alone pads.
        """
        return Reader(
            dataset,
            collator,
            None if self._collates_otherwise else tokenizer,
            pad_to_multiple_of=8 if self._args.device.type == "cuda" else 1,  # tensor cores
            label_filler=IGNORED if self._targets.per_token else None,
            fillers=self.fillers,
        )

    def with_cached(self, read: Reader) -> Callable[[list[int], int], dict[str, Any]]:
        """Makes the training batch of the rows with these numbers in an epoch, with what is cached of the teachers."""
        teachers, masking = self._teachers, self._masking  # all that a loader's workers need

        def collate(numbers: list[int], epoch: int) -> dict[str, Any]:
            cached = {str(each.number): each.cache.read(numbers) for each in teachers if each.cache is not None}
            every = torch.ones(len(numbers), dtype=torch.bool)  # no process is filled up
            batch = read(numbers)
            if masking is not None:
                batch = masking(batch, numbers, epoch)
            return {**batch, COUNTED_ROWS: every, **({TEACHER_OUTPUTS: cached} if cached else {})}

        return collate

    def completed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch with an attention mask, and with the rows that count.

        With several processes the last batches are filled up with rows from the start of the epoch.
        """
        batch = dict(batch)
        if "pixel_values" in batch:  # the patches of an image all count
            ids = batch["pixel_values"].new_ones(len(batch["pixel_values"]), self._image_tokens, dtype=torch.long)
        else:
            ids = batch["input_ids"]
        batch.setdefault("attention_mask", torch.ones_like(ids))
        if self._targets.inputs_are_labels and "labels" not in batch:
            batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, IGNORED)
        if "labels" in batch and self._targets.float_labels:
            batch["labels"] = batch["labels"].float()  # whole numbers are scores, or zeros and ones, here
        if COUNTED_ROWS not in batch:
            loader = self._accelerator.gradient_state
            real = len(ids)
            if loader.end_of_dataloader and loader.remainder > 0:
                real = loader.remainder - self._accelerator.process_index * len(ids)
            batch[COUNTED_ROWS] = torch.arange(len(ids), device=ids.device) < real
        return batch

    def counts(self, batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Tensor:
        """Count what the losses of some batches of this process divide by, all batches together: shape 6 (see `count`).

        Args:
            batches: of one optimizer step, as the loader gives them.
            device: of the result.
        """
        counts = [
            count(self._args, self._targets, batch, batch[COUNTED_ROWS], self._teachers).to(device)
            for batch in map(self.completed, batches)
        ]
        return torch.stack(counts).sum(0) if counts else torch.zeros(COUNTS, device=device)

    def planned_caches(self, dataset: Any, batch_size: int) -> list[tuple[Teacher, CachePlan]]:
        """Each teacher that is a model, with what will be cached of it, or why it will not.

        Args:
            batch_size: rows of a training batch of this process.

        Raises:
            InputError: `cache_teacher` asks for what can't be.
        """
        args = self._args
        if not isinstance(args, DistillationConfig):
            return []
        lengths = row_lengths(dataset, args.length_column_name)
        passes = passes_over_rows(args, batch_size, None if lengths is None else len(lengths))
        unfit = None
        if self.lengths(dataset) is None:
            unfit = "the rows are not drawn by their lengths"
        elif self._collates_otherwise and args.cache_teacher == "auto":
            unfit = "a data_collator may change the rows"
        return [
            (each, plan_cache(args, each.layout, lengths, passes=passes, unfit=unfit))
            for each in self._teachers
            if each.model is not None
        ]

    def cache_teachers(
        self,
        dataset: Any,
        plans: Sequence[tuple[Teacher, CachePlan]],
        reader: Callable[[], Callable[[list[int]], dict[str, Tensor]]],
    ) -> None:
        """Compute what is planned, or find it.

        Args:
            reader: gives what makes a completed batch, on the device, of the rows with these numbers.
        """
        for teacher, plan in plans:
            teacher.cache = None
            if self._accelerator.is_main_process:
                log.print(f"      {plan}")
            if plan.layout is None or teacher.model is None:
                continue
            teacher.cache = build_cache(
                teacher.model, plan, dataset, partial(_checked_outputs, teacher, reader()),
                prefix=teacher.prefix,
                more=teacher.more,
                batch_size=self._args.per_device_eval_batch_size,
                precision="bf16" if self._args.bf16 else "fp16" if self._args.fp16 else "fp32",
                process_index=self._args.process_index,
                num_processes=self._args.world_size,
                wait=wait_for_everyone,
            )  # fmt: skip

    def release_caches(self) -> None:
        """Let other jobs delete what is cached, where they need the room."""
        for teacher in self._teachers:
            if teacher.cache is not None:
                teacher.cache.release()


def _checked_outputs(
    teacher: Teacher, read: Callable[[list[int]], dict[str, Tensor]], numbers: list[int]
) -> tuple[TeacherOutputs, Tensor]:
    batch = read(numbers)
    found = teacher.outputs(batch)
    teacher.refuse_not_finite()  # before it lies on disk, where a GPU is waited for anyway
    return found, batch["attention_mask"]


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
