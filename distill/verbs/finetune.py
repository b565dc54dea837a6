"""The verb `finetune`: train a model on labels alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from distill.common.records import StepRecord
from distill.data.load import Data
from distill.models.load import load_for_finetuning
from distill.verbs.base import ModelInput, StepResult, Verb
from distill.verbs.training.options import TrainingOptions, holds_adapter
from distill.verbs.training.planning import TrainingPlan, plan_training, rows_of_training, splits_of_training
from distill.verbs.training.rehearsal import training_problems
from distill.verbs.training.timing import estimate_training
from distill.verbs.training.train import built_student, train
from distill.verbs.training.words import details_of_training, lines_of_training


@dataclass
class FinetuneOptions(TrainingOptions):
    """Train a model on labels alone: a teacher, or the same student without a teacher."""

    model: str = field(
        kw_only=True, metadata={"help": "What to train: a Hub id, a folder, package:…, or an earlier step."}
    )


def _plan(options: FinetuneOptions, inputs: dict[str, ModelInput], data: Data | None) -> TrainingPlan:
    return plan_training(options, inputs, data)


def finetune(
    options: FinetuneOptions, plan: TrainingPlan, data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Train the step's model, or a student cut from it, on the labels.

    Args: as for `RunStep`.
    """
    transformers.set_seed(options.seed)  # a new head is drawn here
    model = load_for_finetuning(plan.source.location, data.task, from_scratch=options.from_scratch)
    return train(built_student(model, options, plan), [], options, plan, data, folder, profile=profile)


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    if holds_adapter(options):
        return f"LoRA adapters of {parents[-1]}, trained on labels"
    return f"fine-tuned on labels from {' and '.join(parents)}"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    return details_of_training(record, named, losses=[])


FINETUNE = Verb(
    name="finetune",
    options=FinetuneOptions,
    plan=_plan,
    run=finetune,
    trains=True,
    needs_head=(),
    label_map=None,
    takes_quantized=lambda options: options.lora is not None,
    problems=training_problems,
    estimate=estimate_training,
    lines=lines_of_training,
    rows=rows_of_training,
    splits=splits_of_training,
    resolved=FinetuneOptions.to_dict,
    is_smaller=lambda _, of_parent: False,
    is_compared=False,
    has_variants=False,
    is_plain=lambda _: False,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=(),
    summary=_summary,
    details=_details,
)
