"""Teachers: models that are matched with a student layer by layer, or predictions that the rows carry."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from distill.errors import InputError
from distill.models.adapters import has_prompts
from distill.models.modes import evaluating
from distill.models.structure import LayerPairs, depth_of, input_names, width_of
from distill.tasks.base import STORED_COLUMNS, STORED_LOGITS, STORED_PROBABILITIES
from distill.tasks.kinds import targets_of
from distill.tasks.outputs import all_finite, head_at_mask, plain_model
from distill.tasks.targets import Targets
from distill.training.arguments import comparable, layer_pairs
from distill.training.cache import (
    TEACHER_OUTPUTS,
    TeacherCache,
    restored,
)
from distill.training.cache_plan import Layout
from distill.training.config import PARTS, DistillationConfig, is_on
from distill.training.features import (
    FeatureExtractor,
    FeatureSpec,
    ProjectedStudent,
    Representations,
    token_places,
)

FROM_DATA = "data"
"""In place of a teacher model: its predictions stand in a column of the rows."""

SAME_TOKENS = "same_tokens"
"""Behind `own_columns`: whether that teacher's tokens of a row are the student's, whatever their ids."""


AnyTeacher: TypeAlias = PreTrainedModel | PeftModel | Literal["data"]


@dataclass
class Teacher:
    """One teacher, and what is compared with it."""

    targets: Targets
    share: float
    """Of the teachers' weight; the shares of all teachers sum to 1."""
    number: int = 0
    """Its position among the teachers."""
    model: PreTrainedModel | PeftModel | None = None
    """None for predictions that the rows carry."""
    student_wants: FeatureSpec = field(default_factory=FeatureSpec)
    """What of the student stands against this teacher, in the order of what is read from the teacher."""
    extractor: FeatureExtractor | None = None
    relation_heads: int = 1
    negatives: Tensor | None = None
    """N×D pooled states of other rows, for the contrastive loss."""
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """For each loss that matches layers, (student, teacher) layers."""
    prefix: str = ""
    """Of the columns that hold its inputs, where it reads other tokens than the student."""
    more: str = ""
    """Of the columns that it reads beside the student's, where its tokens are the same (token types)."""
    same_tokens: str = ""
    """The column that says which rows' tokens can be compared with the student's; none where all can."""
    vocabulary: int | None = None
    """Words that are compared, where the two differ in how far they fill up their vocabularies."""
    top_k: int = 0
    """Words that a causal LM's cache keeps of each token; 0 where it has no cache."""
    cache: TeacherCache | None = None
    """Of its outputs over the training rows."""
    autocast: Callable[[], AbstractContextManager] = nullcontext
    """Of the trainer; Accelerate puts its own around the student's forward alone."""
    all_finite: Tensor | None = None
    """Whether all it has predicted so far was a number, on its device: to ask for it waits for a GPU."""

    def outputs(self, batch: Mapping[str, Any], *, mask: Tensor | None = None) -> tuple[Tensor, Representations]:
        """Logits and representations of a batch, without gradients: those that it carries, or else computed.

        Args:
            mask: for a masked LM the tokens (B×T) to predict; all by default.
        """
        if self.model is None or self.extractor is None:
            return stored_logits(batch, self.targets), Representations()
        stored = batch.get(TEACHER_OUTPUTS, {}).get(str(self.number))
        if stored is not None and self.cache is not None:
            return restored(stored, self.cache.layout, batch["attention_mask"])
        predicting = nullcontext() if mask is None else head_at_mask(self.model, mask)
        # A trainer has it in evaluation mode for the whole of a run.
        mode = evaluating(self.model) if self.model.training else nullcontext()
        with record_function("teacher"), torch.inference_mode(), mode, self.autocast(), predicting:
            logits, (shown,) = self.extractor(self.inputs(batch))
            finite = all_finite(logits, batch.get("attention_mask"))
        self.all_finite = finite if self.all_finite is None else self.all_finite & finite
        if finite.device.type == "cpu":
            self.refuse_not_finite()
        # Outside of inference mode, as the student's backward may keep them.
        logits, shown = logits.clone(), shown.cloned()
        if self.same_tokens:  # at the student's tokens; in rows that are not compared at any
            masks = batch["attention_mask"], batch[f"{self.prefix}attention_mask"]
            shown = shown.at_tokens(token_places(*masks))
        return logits, shown

    def refuse_not_finite(self) -> None:
        """Raise an `InputError` if it has predicted NaN or infinite values."""
        if self.all_finite is not None and self.model is not None and not self.all_finite:
            raise InputError(
                f"teacher: {self.model.name_or_path or type(self.model).__name__} predicts NaN or infinite values, so "
                "nothing can be learned from it; its weights are broken, or its dtype overflows"
            )

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch it reads: the student's inputs, or columns of its own."""
        own = self.prefix or self.more
        read = {name.removeprefix(own): value for name, value in batch.items() if name.startswith(own)}
        return {**batch, **read} if self.more else read

    def compared_rows(self, batch: Mapping[str, Tensor], counted_rows: Tensor) -> Tensor:
        """Find the rows that count whose tokens are compared with the student's: B booleans.

        Args:
            batch: says in the column `same_tokens` of which rows both read the same tokens; without it, of all.
            counted_rows: B booleans.
        """
        same = batch.get(self.same_tokens)
        return counted_rows if same is None else counted_rows & same.bool()

    def can_judge(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch holds what it reads, or its stored predictions."""
        if self.model is None:
            return bool(set(STORED_COLUMNS) & batch.keys())
        if self.more:
            return any(name.startswith(self.more) for name in batch)
        needed = {f"{self.prefix}input_ids", self.same_tokens or f"{self.prefix}input_ids"}
        return not self.prefix or needed <= batch.keys()

    @property
    def layout(self) -> Layout | None:
        """What a cache would hold of it; None where that is too much (attention maps, a vocabulary for every token)."""
        of_words = self.targets.over_vocabulary and not self.top_k
        if self.model is None or self.extractor is None or self.extractor.wanted[0].attention or of_words:
            return None
        config = self.model.config
        outputs = self.targets.num_outputs(config)
        return Layout(self.extractor.wanted[0], outputs, width_of(config), self.targets, self.top_k)


def own_columns(number: int) -> str:
    """Before the names of the columns that the n-th teacher (from 0) reads, where its tokens are not the student's."""
    return f"teacher{number + 1}_"


def fillers_of(teachers: Sequence["Teacher"]) -> dict[str, int]:
    """What the columns are padded with that teachers read in place of the student's, or beside them."""
    fillers: dict[str, int] = {}
    for each in teachers:
        own = each.prefix or each.more
        if own and each.model is not None:
            fillers |= dict.fromkeys((own + name for name in input_names(each.model)), 0)
            fillers[f"{own}input_ids"] = each.model.config.pad_token_id or 0
    return fillers


def match_teachers(
    student: PreTrainedModel | PeftModel,
    teachers: Sequence[AnyTeacher],
    config: DistillationConfig,
    *,
    columns: Sequence[str] = (),
    vocabulary: int | None = None,
    pairs: Sequence[LayerPairs | None] | None = None,
) -> list[Teacher]:
    """Each teacher with the layers, widths and heads that are compared.

    Args:
        columns: of the training rows; `teacher1_input_ids` are the first teacher's own tokens, and losses that compare
            token with token leave out the rows whose `teacher1_same_tokens` is 0.
        vocabulary: words of the tokenizer, if it is known; a language model's outputs beyond them are padding.
        pairs: of each teacher, as `layer_pairs` found them before; by default they are found here.

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
    targets = targets_of(student)
    matched: list[Teacher] = []
    for teacher, share in zip(teachers, shares, strict=False):
        if isinstance(teacher, str):
            if teacher != FROM_DATA:
                problems.append(f"teacher: {teacher!r} is no model; give a loaded one, or {FROM_DATA!r} for columns")
            if all(isinstance(each, str) for each in teachers) and set(on) - {"soft", "hard"}:
                needing = [f"{part}_weight" for part in on if part not in ("soft", "hard")]
                problems.append(f"{', '.join(needing)}: needs a teacher model, but there are only columns; set it to 0")
            matched.append(Teacher(targets, share / sum(shares), len(matched)))
            continue
        try:
            prefix = own_columns(len(matched))
            own = {prefix + name for name in input_names(teacher)} & set(columns)
            matched.append(
                _match(
                    student, teacher, targets, config, on,
                    share=share / sum(shares),
                    number=len(matched),
                    prefix=prefix if f"{prefix}input_ids" in own else "",
                    more=prefix if own and f"{prefix}input_ids" not in own else "",
                    same_tokens=f"{prefix}{SAME_TOKENS}" if f"{prefix}{SAME_TOKENS}" in columns else "",
                    vocabulary=vocabulary,
                    pairs=None if pairs is None else pairs[len(matched)],
                )
            )  # fmt: skip
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return matched


def projected_student(
    student: PreTrainedModel, teachers: Sequence[Teacher], *, uses_logits: bool, has_optimizer: bool
) -> ProjectedStudent:
    """The student with projections to the widths of its teachers; they are drawn here.

    Args:
        uses_logits: whether a loss reads them.
        has_optimizer: whether an optimizer is made already, of the student's weights alone.

    Raises:
        InputError: that optimizer would leave projections as they are drawn.
    """
    widths = [width_of((each.model or student).config) for each in teachers]
    projected = ProjectedStudent(student, [each.student_wants for each in teachers], widths, uses_logits=uses_logits)
    if projected.projections and has_optimizer:
        raise InputError(
            "optimizers: they lack the projections between the widths of student and teacher, which are made "
            "here; say optimizer_cls_and_kwargs, or optim in args"
        )
    return projected


def stored_logits(batch: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """Read the logits B×C that a batch carries; probabilities become their logarithms, those of label sets log-odds.

    Args:
        batch: with `teacher_logits` (B×C, or B scores) or `teacher_probabilities` (B×C).
        targets: of the student; they turn probabilities into logits.
    """
    if STORED_LOGITS in batch:
        logits = batch[STORED_LOGITS].float()
        return logits.unsqueeze(-1) if logits.ndim == 1 else logits
    return targets.from_probabilities(batch[STORED_PROBABILITIES].float())


def _match(
    student: PreTrainedModel | PeftModel,
    teacher: PreTrainedModel | PeftModel,
    targets: Targets,
    config: DistillationConfig,
    on: Sequence[str],
    *,
    share: float,
    number: int,
    prefix: str,
    more: str,
    same_tokens: str,
    vocabulary: int | None,
    pairs: LayerPairs | None,
) -> Teacher:
    configs = [model.config for model in (student, teacher)]
    problems = comparable(config, configs, same_tokens=not prefix or bool(same_tokens))
    inside = [f"{part}_weight" for part in on if part not in ("soft", "hard")]
    if isinstance(teacher, PeftModel) and has_prompts(teacher) and (inside or not targets.per_row):
        problems.append(
            f"{', '.join(inside) or 'teacher'}: the teacher's prompts are tokens that the student lacks; "
            "its predictions of whole rows alone can be compared"
        )
    inside_fits = not problems
    if problems:
        pairs = {}
    elif pairs is None:
        pairs = layer_pairs(config, depth_of(student.config), depth_of(teacher.config))
    if "attention" in on and inside_fits:
        heads = [model.config.num_attention_heads for model in (student, teacher)]
        if heads[0] != heads[1]:
            problems.append(
                f"attention_weight: the student has {heads[0]} heads and the teacher {heads[1]}; attention maps need "
                "as many (relation_weight does not)"
            )
    relation_heads = 1
    if "relation" in on and inside_fits:
        widths = [width_of(model.config) for model in (student, teacher)]
        divisor = math.gcd(*widths)
        fitting = [number for number in range(1, divisor + 1) if divisor % number == 0]
        relation_heads = config.relation_heads or max(
            number for number in fitting if number <= teacher.config.num_attention_heads
        )
        if divisor % relation_heads:
            problems.append(
                f"relation_heads: {relation_heads} does not divide the widths {widths[0]} and {widths[1]}; "
                f"these do: {', '.join(map(str, fitting))}"
            )
    shared_words = None
    if targets_of(teacher) is not targets:
        names = [type(plain_model(model)).__name__ for model in (teacher, student)]
        problems.append(f"teacher: {names[0]} does not predict what {names[1]} does")
    elif student.config.num_labels != teacher.config.num_labels:
        problems.append(f"teacher: has {teacher.config.num_labels} outputs and the student {student.config.num_labels}")
    elif targets.over_vocabulary and student.config.vocab_size != teacher.config.vocab_size:
        sizes = teacher.config.vocab_size, student.config.vocab_size
        shared_words = vocabulary
        if vocabulary is None or vocabulary > min(sizes):
            known = "unknown, as no tokenizer was given" if vocabulary is None else f"{vocabulary} words"
            problems.append(
                f"teacher: has a vocabulary of {sizes[0]} and the student of {sizes[1]}; they may differ by padding "
                f"alone, and the tokenizer's is {known}; a student with a trimmed vocabulary learns from the trimmed "
                "teacher"
            )
    keeps_words = targets.over_vocabulary and not targets.masks_inputs and config.cache_teacher not in ("auto", "none")
    if keeps_words and config.soft_loss == "mse" and "soft" in on:
        problems.append(
            "cache_teacher: of a causal LM the likeliest words are kept, which a squared error of all logits is no "
            "loss for; say soft_loss: kl, or cache_teacher: none"
        )
    if problems:
        raise InputError(*problems)

    def wanted(side: int) -> FeatureSpec:
        layers = {
            part: tuple(pair[side] for pair in pairs.get(part, [])) for part in ("hidden", "attention", "relation")
        }
        return FeatureSpec(
            layers["hidden"], layers["attention"], layers["relation"], "embedding" in on, "contrastive" in on
        )

    return Teacher(
        targets=targets,
        share=share,
        number=number,
        model=teacher,
        student_wants=wanted(0),
        extractor=FeatureExtractor(teacher, [wanted(1)]),
        relation_heads=relation_heads,
        pairs=pairs,
        prefix=prefix,
        more=more,
        same_tokens=same_tokens if prefix else "",
        vocabulary=shared_words,
        top_k=min(config.cache_top_k, teacher.config.vocab_size) if keeps_words else 0,
    )
