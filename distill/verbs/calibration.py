"""Training rows that verbs measure on, which learn nothing from them."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.common.console import log
from distill.common.hardware import compute_device
from distill.data.load import Data
from distill.data.tokenized import Processor
from distill.evaluation.evaluate import input_batches
from distill.models.load import load_classifier, load_processor
from distill.verbs.base import StepPlan

_BATCH_SIZE = 64


class Measures(Protocol):
    """Options of a verb that measures its model on training rows."""

    label_map: dict[str, str] | None
    calibration_rows: int | None

    @property
    def reads_rows(self) -> bool:
        """Whether the model that the step makes depends on rows."""


def loaded_with_rows(
    options: Measures, plan: StepPlan, data: Data, *, rows: int, computes: bool = False
) -> tuple[PreTrainedModel, Processor, list[dict[str, Tensor]]]:
    """Load a step's model in float32, its processor, and the batches that it is measured on, if any.

    Args:
        options: of the step.
        plan: of the step.
        data: the rows.
        rows: how many where the options don't say.
        computes: whether the model computes even where no rows are read; it lies on the CPU where it doesn't.

    Raises:
        InputError: as `load_classifier`.
    """
    location = plan.source.location
    model = load_classifier(location, data.task, label_map=options.label_map, dtype=torch.float32)
    processor = load_processor(location, data.task.kind, data.max_length)
    model.to(compute_device() if options.reads_rows or computes else torch.device("cpu"))  # type: ignore[arg-type]
    found = calibration_batches(data, processor, rows=options.calibration_rows or rows) if options.reads_rows else []
    return model, processor, [{name: values.to(model.device) for name, values in each.items()} for each in found]


def rows_measured_on(options: Measures, data: Data) -> list[Any]:
    """List what of the rows a step's fingerprint holds: labels and lengths, and the rows where they are read."""
    return [data.task.label_names, data.max_length, *([data.train_fingerprint] if options.reads_rows else [])]


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
