"""The verb `distill`: train a student against teachers."""

from pathlib import Path

import torch
import transformers

from distill.data.load import Data
from distill.models.load import load_classifier, load_for_finetuning
from distill.training.teachers import FROM_DATA, AnyTeacher
from distill.verbs.base import StepResult, Verb
from distill.verbs.options import DistillOptions, is_teacher, teachers_of
from distill.verbs.training import cut_student, train


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


DISTILL = Verb(name="distill", options=DistillOptions, run=distill)
