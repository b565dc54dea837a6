"""Distillation losses: plain functions of tensors that return a scalar in float32.

Every loss is a sum over what it counts (rows or tokens) divided by `count`, which defaults to the number in these
tensors. A trainer that splits one optimizer step into micro-batches or processes passes the whole step's count, and
the parts then add up to exactly the loss of the whole step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, count: Tensor | None = None
) -> Tensor:
    """T² · KL(teacher ‖ student) of the softened distributions, averaged over rows (Hinton et al. 2015, section 2).

    T² keeps the gradient's size independent of the temperature. With one output (regression) a softmax is constant
    and its KL identically 0, so the loss is then the squared difference of the scores, without T².

    Args:
        student_logits: B×C.
        teacher_logits: B×C.
        count: rows of the whole optimizer step; B by default.
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    count = torch.tensor(len(student_logits)) if count is None else count
    if student_logits.shape[-1] == 1:
        return F.mse_loss(student_logits, teacher_logits, reduction="sum") / count
    divergence = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=-1),
        F.log_softmax(teacher_logits / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return divergence * temperature**2 / count


def hard_loss(
    student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, count: Tensor | None = None
) -> Tensor:
    """The task's own loss: cross-entropy for class ids, squared error for scores.

    Args:
        student_logits: B×C, or B×1 for scores.
        labels: B class ids (int64), or B scores (float).
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016, section 7).
        count: rows of the whole optimizer step; B by default.
    """
    count = torch.tensor(len(labels)) if count is None else count
    if labels.is_floating_point():
        return F.mse_loss(student_logits.float().squeeze(-1), labels.float(), reduction="sum") / count
    return F.cross_entropy(student_logits.float(), labels, label_smoothing=label_smoothing, reduction="sum") / count


def hidden_loss(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Squared error of hidden states, averaged over pairs of layers, valid tokens and dimensions.

    TinyBERT's hidden-state loss (Jiao et al. 2020, equation 8), with padding left out and a mean over layers where
    TinyBERT sums.

    Args:
        student_hidden: for each pair of layers B×T×D (already projected to the teacher's width).
        teacher_hidden: for each pair of layers B×T×D.
        mask: B×T, 1 for tokens that count and 0 for padding.
        count: valid tokens of the whole optimizer step; the mask's sum by default. An empty mask gives 0.
    """
    count = mask.sum() if count is None else count
    total = student_hidden[0].new_zeros((), dtype=torch.float32)
    for student, teacher in zip(student_hidden, teacher_hidden, strict=True):
        squared = (student.float() - teacher.float()).square().mean(-1)
        total = total + squared.masked_fill(mask == 0, 0.0).sum()
    return total / (len(student_hidden) * count.clamp(min=1))
