"""The verb `distill`: train a student against teachers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from distill.common.records import StepRecord
from distill.data.load import Data
from distill.models.load import load_classifier, load_for_finetuning
from distill.training.config import DistillationConfig
from distill.training.teachers import FROM_DATA, AnyTeacher
from distill.verbs.base import ModelInput, StepResult, Verb
from distill.verbs.references import is_teacher, teachers_of
from distill.verbs.training.options import TrainingOptions, holds_adapter
from distill.verbs.training.planning import TrainingPlan, plan_training, rows_of_training, splits_of_training
from distill.verbs.training.rehearsal import training_problems
from distill.verbs.training.timing import estimate_training
from distill.verbs.training.train import built_student, train
from distill.verbs.training.words import details_of_training, lines_of_training


@dataclass
class DistillOptions(TrainingOptions, DistillationConfig):
    """Train a student against a teacher."""

    teacher: str | list[str] = field(
        kw_only=True,
        metadata={
            "help": "The fine-tuned teacher, or several: a Hub id, a folder, package:…, an earlier step; data stands "
            "for predictions in the rows (data.teacher_logits, data.teacher_probabilities)."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "What the student starts from; by default layers of the teacher."}
    )
    teacher_label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The teacher's label names → the task's, where they differ."}
    )


def _plan(options: DistillOptions, inputs: dict[str, ModelInput], data: Data | None) -> TrainingPlan:
    models = (model for option, model in inputs.items() if is_teacher(option))
    teachers = [None if each == FROM_DATA else next(models) for each in teachers_of(vars(options))]
    return plan_training(options, inputs, data, losses=options, teachers=teachers)


def distill(
    options: DistillOptions, plan: TrainingPlan, data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Train a student, cut from the step's model or else from the first teacher, against the teachers.

    Args: as for `RunStep`.
    """
    transformers.set_seed(options.seed)
    teachers = [_loaded(each, options, plan, data) for each in plan.teachers]
    if "model" in plan.inputs:
        source = load_for_finetuning(plan.source.location, data.task, from_scratch=options.from_scratch)
    else:
        source = next(teacher for teacher in teachers if not isinstance(teacher, str))
    return train(built_student(source, options, plan), teachers, options, plan, data, folder, profile=profile)


def _loaded(teacher: ModelInput | None, options: DistillOptions, plan: TrainingPlan, data: Data) -> AnyTeacher:
    """A teacher's model; the word for it where it stands in the rows."""
    if teacher is None:
        return FROM_DATA
    return load_classifier(
        teacher.location,
        data.task,
        label_map=options.teacher_label_map,
        dtype=torch.float32,
        merge="model" not in plan.inputs,  # layers are taken from it
    )


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    has_model = options["model"] is not None and len(parents) > 1
    learned = f"distilled from the teacher {' and '.join(parents[:-1] if has_model else parents)}"
    return f"LoRA adapters of {parents[-1]}, {learned}" if holds_adapter(options) else learned


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    options = record.options
    weights = {key.removesuffix("_weight"): value for key, value in options.items() if key.endswith("_weight")}
    losses = ", ".join(_loss(part, weight, options) for part, weight in weights.items() if weight)
    return details_of_training(record, named, losses=[f"Losses: {losses}"])


def _loss(part: str, weight: Any, options: Mapping[str, Any]) -> str:
    """One part of the loss: its weight (a number or a schedule), its name, and its variant."""
    factor = f"{weight['from']} to {weight['to']}" if isinstance(weight, dict) else str(weight)
    variant = [str(options[f"{part}_loss"])] if options.get(f"{part}_loss") else []
    if part == "soft" and options["temperature"] is not None:
        variant.append(f"temperature {options['temperature']}")
    return f"{factor} × {part}" + (f" ({', '.join(variant)})" if variant else "")


DISTILL = Verb(
    name="distill",
    options=DistillOptions,
    plan=_plan,
    run=distill,
    trains=True,
    needs_head=("teacher",),
    label_map="teacher_label_map",
    takes_quantized=lambda options: options.lora is not None,
    problems=training_problems,
    estimate=estimate_training,
    lines=lines_of_training,
    rows=rows_of_training,
    splits=splits_of_training,
    resolved=DistillOptions.to_dict,
    is_smaller=lambda num_parameters, of_parent: num_parameters != of_parent,  # else it was trained on
    is_compared=True,
    has_variants=False,
    is_plain=lambda _: False,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=("distillation",),
    summary=_summary,
    details=_details,
)
