"""What a batch adds to the loss: the parts against labels and teachers, as sums beside what each is divided by."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill import losses
from distill.data.batches import COUNTED_ROWS
from distill.tasks.targets import IGNORED, BatchTargets, Targets, mask_classes
from distill.training.config import DistillationConfig, TrainingConfig
from distill.training.features import Representations
from distill.training.teachers import Teacher

COUNTS = 6
ROWS, TOKENS, LABELS, PREDICTIONS, COMPARED_ROWS, COMPARED_TOKENS = range(COUNTS)
"""What losses count, as positions in a tensor of counts; compared are rows whose tokens are the teacher's."""

_ONE = torch.ones(())


@dataclass(frozen=True)
class Part:
    """One loss of a batch: its sum, and the position of the count that it is divided by."""

    total: Tensor
    counted: int

    def __add__(self, other: "Part") -> "Part":
        return Part(self.total + other.total, self.counted)

    def __mul__(self, factor: float) -> "Part":
        return Part(self.total * factor, self.counted)

    def divisor(self, counts: Tensor) -> Tensor:
        """Its count, of those of a step; 1 where there is nothing to count."""
        counted = counts[self.counted]
        return torch.where(counted > 0, counted, 1)


def count(
    config: TrainingConfig,
    targets: Targets,
    batch: Mapping[str, Tensor],
    counted_rows: Tensor,
    teachers: Sequence[Teacher] = (),
) -> Tensor:
    """Rows, tokens, labels, predictions, compared rows and their tokens, of the rows that count: shape 6.

    Where teachers compare different rows, those of each weigh what its losses do.

    Args:
        counted_rows: B booleans.
    """
    tokens = (batch["attention_mask"] * counted_rows.unsqueeze(-1)).sum()
    expected = targets.batch_targets(batch, counted_rows)
    labels = torch.zeros((), device=tokens.device)
    if expected.labels is not None:
        labels = losses.label_count(expected.labels, _class_weights(config, tokens.device))
    rows = compared_rows = counted_rows.sum()
    compared_tokens = tokens
    if any(teacher.same_tokens for teacher in teachers):
        shares = torch.tensor([teacher.share for teacher in teachers], device=tokens.device)
        compared = torch.stack([teacher.compared_rows(batch, counted_rows) for teacher in teachers]).float()
        compared_rows = shares @ compared.sum(1)
        compared_tokens = shares @ (compared @ batch["attention_mask"].sum(1).float())
    counts = [rows, tokens, labels, expected.mask.sum(), compared_rows, compared_tokens]
    return torch.stack([each.float() for each in counts])


def parts_of_batch(
    config: TrainingConfig,
    teachers: Sequence[Teacher],
    targets: Targets,
    outputs: Mapping[str, Any],
    inputs: dict[str, Tensor],
    *,
    on: Collection[str],
    training: bool,
    temperature: float | None,
) -> dict[str, Part]:
    """All parts of the loss of a batch, by name; several teachers' are added up.

    Args:
        outputs: the student's `logits` and, with teachers, `representations`.
        inputs: the batch, completed.
        on: names of the losses that count.
        training: whether a teacher that can't judge the rows is an error, or left out.
        temperature: of the soft loss, now.
    """
    counted = inputs[COUNTED_ROWS]
    parts: dict[str, Part] = {}
    if "hard" in on:
        parts |= against_labels(config, targets, outputs["logits"], inputs, counted)
    if not isinstance(config, DistillationConfig):
        return parts
    for number, teacher in enumerate(teachers):
        if not training and not teacher.can_judge(inputs):
            continue  # validation rows need no stored predictions, nor tokens of the teacher's own
        shown = (outputs["logits"], outputs["representations"][number])
        against = against_teacher(config, teacher, shown, inputs, counted, soft="soft" in on, temperature=temperature)
        for name, part in against.items():
            parts[name] = parts[name] + part if name in parts else part
    return parts


def against_labels(
    config: TrainingConfig, targets: Targets, logits: Tensor, batch: Mapping[str, Tensor], counted_rows: Tensor
) -> dict[str, Part]:
    """The hard loss; nothing for a batch without a column of labels.

    Args:
        logits: as `logits_of` gives them.
        counted_rows: B booleans.
    """
    logits = targets.aligned(logits)
    expected = targets.batch_targets(batch, counted_rows).at_mask(logits)
    if expected.labels is None:
        return {}
    logits = mask_classes(logits, expected.classes, as_values=False)
    weights = _class_weights(config, logits.device)
    total = targets.hard_loss(logits, expected.labels, config.label_smoothing_factor, _ONE, class_weights=weights)
    return {"hard": Part(total, LABELS)}


def against_teacher(
    config: DistillationConfig,
    teacher: Teacher,
    student: tuple[Tensor, Representations],
    batch: Mapping[str, Tensor],
    counted_rows: Tensor,
    *,
    soft: bool,
    temperature: float | None,
) -> dict[str, Part]:
    """The losses that are on, against one teacher.

    Args:
        soft: whether its predictions count.
        student: its logits (as `logits_of` gives them) and the representations that stand against this teacher.
        counted_rows: B booleans.
    """
    logits, shown = student
    expected = teacher.targets.batch_targets(batch, counted_rows)
    at_mask = teacher.targets.masks_inputs and logits.shape[:-1] != expected.mask.shape
    taught, seen = teacher.outputs(batch, mask=expected.mask if at_mask else None)
    compared = teacher.compared_rows(batch, counted_rows)
    tokens = batch["attention_mask"] * compared.unsqueeze(-1)
    parts = {}
    if soft:
        logits, taught = logits[..., : teacher.vocabulary], taught[..., : teacher.vocabulary]
        total = _soft(config, logits, taught, expected, temperature, teacher.targets)
        parts["soft"] = Part(total, PREDICTIONS)
    if shown.hidden and config.hidden_loss == "pkd":
        parts["hidden"] = Part(losses.pkd_loss(shown.hidden, seen.hidden, compared, _ONE), COMPARED_ROWS)
    elif shown.hidden:
        compare = {"mse": losses.hidden_loss, "cosine": losses.cosine_loss}[config.hidden_loss]
        parts["hidden"] = Part(compare(shown.hidden, seen.hidden, tokens, _ONE), COMPARED_TOKENS)
    if shown.embedding is not None and seen.embedding is not None:
        total = losses.hidden_loss([shown.embedding], [seen.embedding], tokens, _ONE)
        parts["embedding"] = Part(total, COMPARED_TOKENS)
    if shown.attention:
        total = losses.attention_loss(shown.attention, seen.attention, tokens, _ONE, distance=config.attention_loss)
        parts["attention"] = Part(total, COMPARED_TOKENS)
    if shown.relations:
        total = losses.relation_loss(shown.relations, seen.relations, tokens, _ONE, num_heads=teacher.relation_heads)
        parts["relation"] = Part(total, COMPARED_TOKENS)
    if shown.pooled is not None and seen.pooled is not None and teacher.negatives is not None:
        total = losses.contrastive_loss(
            shown.pooled, seen.pooled, teacher.negatives, config.contrastive_temperature, counted_rows, _ONE
        )
        parts["contrastive"] = Part(total, ROWS)
    return {name: part * teacher.share for name, part in parts.items()}


def _soft(
    config: DistillationConfig,
    logits: Tensor,
    taught: Tensor,
    expected: BatchTargets,
    temperature: float | None,
    targets: Targets,
) -> Tensor:
    expected = expected.at_mask(targets.aligned(logits))
    as_values = targets.distributions is None or temperature is None or config.soft_loss == "mse"
    logits, taught = (
        mask_classes(targets.aligned(each), expected.classes, as_values=as_values) for each in (logits, taught)
    )
    if as_values or temperature is None or targets.distributions is None:
        return losses.logit_loss(logits, taught, _ONE, mask=expected.mask)
    outputs, labels, shape = _ONE, expected.labels, logits.shape
    logits, taught = targets.distributions(logits), targets.distributions(taught)
    if logits.ndim > len(shape):  # a mean over labels, each with a distribution of its own
        outputs, labels = torch.tensor(float(shape[-1])), None
    if config.soft_loss not in ("kl", "reverse_kl", "js"):
        classes = torch.full(logits.shape[:-1], IGNORED, device=logits.device) if labels is None else labels
        return losses.decoupled_loss(
            logits, taught, classes, temperature, outputs, mask=expected.mask,
            alpha=config.dkd_alpha, beta=config.dkd_beta,
        )  # fmt: skip
    return losses.soft_loss(logits, taught, temperature, outputs, mask=expected.mask, divergence=config.soft_loss)


def _class_weights(config: TrainingConfig, device: torch.device) -> Tensor | None:
    return None if config.class_weights is None else torch.tensor(config.class_weights, device=device)
