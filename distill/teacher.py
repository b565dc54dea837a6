"""Teachers: models that are matched with a student layer by layer, or predictions that the rows carry."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from distill.cache import TEACHER_OUTPUTS, Layout, TeacherCache, restored
from distill.config import PARTS, DistillationConfig, is_on
from distill.errors import InputError
from distill.predictions import ProblemType, problem_type
from distill.representations import Reader, Representations, Wanted, resolve_layer_map

FROM_DATA = "data"
"""In place of a teacher model: its predictions stand in a column of the rows."""

STORED_COLUMNS = STORED_LOGITS, STORED_PROBABILITIES = "teacher_logits", "teacher_probabilities"

AnyTeacher: TypeAlias = PreTrainedModel | Literal["data"]


@dataclass
class Teacher:
    """One teacher, and what is compared with it."""

    problem: ProblemType
    share: float
    """Of the teachers' weight; the shares of all teachers sum to 1."""
    number: int = 0
    """Its position among the teachers."""
    model: PreTrainedModel | None = None
    """None for predictions that the rows carry."""
    student_wants: Wanted = field(default_factory=Wanted)
    """What of the student stands against this teacher, in the order of what is read from the teacher."""
    reader: Reader | None = None
    relation_heads: int = 1
    negatives: Tensor | None = None
    """N×D pooled states of other rows, for the contrastive loss."""
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """For each loss that matches layers, (student, teacher) layers."""
    cache: TeacherCache | None = None
    """Of its outputs over the training rows."""
    autocast: Callable[[], AbstractContextManager] = nullcontext
    """Of the trainer; Accelerate puts its own around the student's forward alone."""

    def outputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Representations]:
        """Logits and representations of a batch, without gradients: those that it carries, or else computed."""
        if self.model is None or self.reader is None:
            return stored_logits(batch, self.problem), Representations()
        stored, layout = batch.get(TEACHER_OUTPUTS, {}).get(str(self.number)), self.layout
        if stored is not None and layout is not None:
            return restored(stored, layout, batch["attention_mask"])
        self.model.eval()  # whatever was called on it since
        with record_function("teacher"), torch.inference_mode(), self.autocast():
            logits, (shown,) = self.reader(batch)
        # Outside of inference mode, as the student's backward may keep them.
        return logits.clone(), shown.cloned()

    @property
    def layout(self) -> Layout | None:
        """What a cache would hold of it; None where that is too much (attention maps, a vocabulary for every token)."""
        of_words = self.problem in ("masked_lm", "causal_lm")
        if self.model is None or self.reader is None or self.reader.wanted[0].attention or of_words:
            return None
        outputs = 2 if self.problem == "question_answering" else self.model.config.num_labels
        return Layout(self.reader.wanted[0], outputs, self.model.config.hidden_size, self.problem)


def match_teachers(
    student: PreTrainedModel, teachers: Sequence[AnyTeacher], config: DistillationConfig
) -> list[Teacher]:
    """Each teacher with the layers, widths and heads that are compared.

    Raises:
        InputError: no teacher where one is needed, or one that doesn't fit the student; every problem at once.
    """
    on = [part for part in PARTS if is_on(config.loss_weights[part])]
    if not teachers:
        needing = [f"{part}_weight" for part in on if part != "hard"]
        if needing:
            raise InputError(f"teacher: missing; without one, set {', '.join(needing)} to 0")
        return []
    shares = config.teacher_weights or [1.0] * len(teachers)
    problems: list[str] = []
    if len(shares) != len(teachers):
        problems.append(f"teacher_weights: {len(shares)} for {len(teachers)} teachers; one each")
    problem = problem_type(student)
    matched: list[Teacher] = []
    for teacher, share in zip(teachers, shares, strict=False):
        if isinstance(teacher, str):
            if teacher != FROM_DATA:
                problems.append(f"teacher: {teacher!r} is no model; give a loaded one, or {FROM_DATA!r} for columns")
            if all(isinstance(each, str) for each in teachers) and set(on) - {"soft", "hard"}:
                needing = [f"{part}_weight" for part in on if part not in ("soft", "hard")]
                problems.append(f"{', '.join(needing)}: needs a teacher model, but there are only columns; set it to 0")
            matched.append(Teacher(problem, share / sum(shares), len(matched)))
            continue
        try:
            matched.append(_match(student, teacher, problem, config, on, share / sum(shares), len(matched)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return matched


def stored_logits(batch: Mapping[str, Tensor], problem: ProblemType) -> Tensor:
    """The logits B×C that a batch carries; probabilities become their logarithms, those of label sets log-odds."""
    if STORED_LOGITS in batch:
        logits = batch[STORED_LOGITS].float()
        return logits.unsqueeze(-1) if logits.ndim == 1 else logits
    probabilities = batch[STORED_PROBABILITIES].float()
    if problem == "multi_label_classification":
        return probabilities.logit(eps=1e-6)
    return probabilities.clamp(min=1e-12).log()


def layer_pairs(
    config: DistillationConfig, num_student_layers: int, num_teacher_layers: int
) -> dict[str, list[tuple[int, int]]]:
    """For each loss that is on and matches layers, its (student, teacher) pairs.

    Raises:
        InputError: with every layer map that is out of range.
    """
    maps = {"hidden": ("layer_map", 0), "attention": ("attention_layer_map", 1), "relation": ("relation_layer_map", 1)}
    pairs: dict[str, list[tuple[int, int]]] = {}
    problems: list[str] = []
    for part, (name, lowest) in maps.items():
        if is_on(config.loss_weights[part]):
            try:
                pairs[part] = resolve_layer_map(
                    getattr(config, name), num_student_layers, num_teacher_layers, name=name, lowest=lowest
                )
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError(*problems)
    return pairs


def _match(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    problem: ProblemType,
    config: DistillationConfig,
    on: Sequence[str],
    share: float,
    number: int,
) -> Teacher:
    pairs = layer_pairs(config, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    problems: list[str] = []
    heads = [model.config.num_attention_heads for model in (student, teacher)]
    if "attention" in on and heads[0] != heads[1]:
        problems.append(
            f"attention_weight: the student has {heads[0]} heads and the teacher {heads[1]}; attention maps need as "
            "many (relation_weight does not)"
        )
    widths = [model.config.hidden_size for model in (student, teacher)]
    divisor = math.gcd(*widths)
    fitting = [number for number in range(1, heads[1] + 1) if divisor % number == 0]
    relation_heads = config.relation_heads or max(fitting)
    if "relation" in on and divisor % relation_heads:
        problems.append(
            f"relation_heads: {relation_heads} does not divide the widths {widths[0]} and {widths[1]}; "
            f"these do: {', '.join(str(number) for number in range(1, divisor + 1) if divisor % number == 0)}"
        )
    if problem_type(teacher) != problem:
        problems.append(f"teacher: {type(teacher).__name__} does not predict what {type(student).__name__} does")
    elif student.config.num_labels != teacher.config.num_labels:
        problems.append(f"teacher: has {teacher.config.num_labels} outputs and the student {student.config.num_labels}")
    elif problem in ("masked_lm", "causal_lm") and student.config.vocab_size != teacher.config.vocab_size:
        sizes = teacher.config.vocab_size, student.config.vocab_size
        problems.append(f"teacher: has a vocabulary of {sizes[0]} and the student of {sizes[1]}")
    if problems:
        raise InputError(*problems)

    def wanted(side: int) -> Wanted:
        layers = {
            part: tuple(pair[side] for pair in pairs.get(part, [])) for part in ("hidden", "attention", "relation")
        }
        return Wanted(layers["hidden"], layers["attention"], layers["relation"], "embedding" in on, "contrastive" in on)

    return Teacher(
        problem=problem,
        share=share,
        number=number,
        model=teacher.requires_grad_(False),
        student_wants=wanted(0),
        reader=Reader(teacher, [wanted(1)]),
        relation_heads=relation_heads,
        pairs=pairs,
    )
