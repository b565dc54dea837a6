"""The verb `finetune`: train a model on labels alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from distill.data.load import Data
from distill.models.load import load_for_finetuning
from distill.verbs.base import StepResult, Verb
from distill.verbs.options import FinetuneOptions, holds_adapter
from distill.verbs.training import cut_student, rows_of_training, splits_of_training, train


def finetune(
    options: FinetuneOptions, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Train `inputs["model"]`, or a student cut from it, on the labels."""
    transformers.set_seed(options.seed)  # a new head is drawn here
    model = load_for_finetuning(inputs["model"], data.task, from_scratch=options.from_scratch)
    return train(cut_student(model, options), [], options, data, inputs["model"], folder, profile)


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    if holds_adapter(options):
        return f"LoRA adapters of {parents[-1]}, trained on labels"
    return f"fine-tuned on labels from {' and '.join(parents)}"


FINETUNE = Verb(
    name="finetune",
    options=FinetuneOptions,
    run=finetune,
    needs_head=False,
    complete=lambda options, config, kind: None,
    rows=rows_of_training,
    splits=splits_of_training,
    resolved=FinetuneOptions.to_dict,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=(),
    summary=_summary,
    details=lambda _: [],
)
