"""The verb `distill`: train a student against teachers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from distill.data.load import Data
from distill.models.load import load_classifier, load_for_finetuning
from distill.training.teachers import FROM_DATA, AnyTeacher
from distill.verbs.base import StepResult, Verb
from distill.verbs.options import DistillOptions, holds_adapter, is_teacher, teachers_of
from distill.verbs.training import cut_student, rows_of_training, splits_of_training, train


def distill(
    options: DistillOptions, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Train a student, cut from `inputs["model"]` or else from the teacher, against `inputs["teacher"]`."""
    transformers.set_seed(options.seed)
    models = (location for option, location in inputs.items() if is_teacher(option))
    teachers: list[tuple[AnyTeacher, str | None]] = []
    for reference in teachers_of(options.__dict__):
        if reference == FROM_DATA:
            teachers.append((FROM_DATA, None))
            continue
        location = next(models)
        teacher = load_classifier(
            location,
            data.task,
            label_map=options.teacher_label_map,
            dtype=torch.float32,
            merge=options.model is None,  # layers are taken from it
        )
        teachers.append((teacher, location))
    started_from = inputs.get("model") or inputs["teacher"]
    if "model" in inputs:
        source = load_for_finetuning(inputs["model"], data.task, from_scratch=options.from_scratch)
    else:
        source = next(teacher for teacher, _ in teachers if not isinstance(teacher, str))
    return train(cut_student(source, options), teachers, options, data, started_from, folder, profile)


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    has_model = options["model"] is not None and len(parents) > 1
    learned = f"distilled from the teacher {' and '.join(parents[:-1] if has_model else parents)}"
    return f"LoRA adapters of {parents[-1]}, {learned}" if holds_adapter(options) else learned


def _details(options: Mapping[str, Any]) -> list[str]:
    weights = {key.removesuffix("_weight"): value for key, value in options.items() if key.endswith("_weight")}
    return [f"Losses: {', '.join(_loss(part, weight, options) for part, weight in weights.items() if weight)}"]


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
    run=distill,
    needs_head=False,
    complete=lambda options, config, kind: None,
    rows=rows_of_training,
    splits=splits_of_training,
    resolved=DistillOptions.to_dict,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=("distillation",),
    summary=_summary,
    details=_details,
)
