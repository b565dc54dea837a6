"""Distillation losses: plain functions of tensors that return a scalar in float32.

Every loss is a sum over what it counts (rows, tokens, labels) divided by `count`, which defaults to the number in these
tensors. A trainer that splits one optimizer step into micro-batches or processes passes the whole step's count, and
the parts then add up to exactly the loss of the whole step. What a mask leaves out adds nothing, whatever stands there,
and with nothing left the loss is 0 (and has a gradient).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SoftLoss = Literal["kl", "reverse_kl", "js", "mse", "dkd"]
HiddenLoss = Literal["mse", "cosine", "pkd"]
AttentionLoss = Literal["mse", "kl"]

_SAME = 2e-4
"""1 − cosine up to which two pooled states are of one row: in bfloat16 up to 5e-5 was seen, between attentions."""

# --- predictions ----------------------------------------------------------------------------------------------------


def soft_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    count: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    divergence: Literal["kl", "reverse_kl", "js"] = "kl",
) -> Tensor:
    """T² · divergence of the softened distributions, averaged over positions.

    - `kl`: KL(teacher ‖ student), Hinton et al. 2015, section 2;
    - `reverse_kl`: KL(student ‖ teacher), Gu et al. 2024 (MiniLLM), equation 2;
    - `js`: Jensen–Shannon, ½ KL(teacher ‖ m) + ½ KL(student ‖ m) with m their mean, Lin 1991, equation 4.1.

    T² keeps the gradient's size independent of the temperature. With one output (regression) a softmax is constant
    and its KL identically 0, so the loss is then the squared difference of the scores, without T².

    Args:
        student_logits: …×C, one distribution a position (B×C for rows).
        teacher_logits: …×C.
        count: positions of the whole optimizer step.
        mask: …, 1 for positions that count; all by default.
    """
    if student_logits.shape[-1] == 1:
        return logit_loss(student_logits, teacher_logits, count, mask=mask)
    student, teacher, mask = _masked(student_logits, teacher_logits, mask)
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher / temperature, dim=-1)
    if divergence == "kl":
        divergences = _kl(teacher, student)
    elif divergence == "reverse_kl":
        divergences = _kl(student, teacher)
    else:
        middle = torch.logaddexp(teacher, student) - math.log(2)
        divergences = (_kl(teacher, middle) + _kl(student, middle)) / 2
    return _mean(divergences, mask, count) * temperature**2


def logit_loss(
    student_logits: Tensor, teacher_logits: Tensor, count: Tensor | None = None, *, mask: Tensor | None = None
) -> Tensor:
    """Squared error of the logits, averaged over outputs and positions (Kim et al. 2021, equation 3).

    Args:
        student_logits: …×C; teacher_logits, count and mask as for `soft_loss`.
    """
    student, teacher, mask = _masked(student_logits, teacher_logits, mask)
    return _mean((student - teacher).square().mean(-1), mask, count)


def decoupled_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float,
    count: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """T² · (α · KL of target against the rest + β · KL among the rest), Zhao et al. 2022, equation 7.

    With two classes there is one class in the rest, so its KL is 0 and α weighs the whole of Hinton's loss.

    Args:
        student_logits: …×C with C of at least 2; teacher_logits, count and mask as for `soft_loss`.
        targets: …, the right class of each position (int64); the teacher's choice where it is negative.
    """
    student, teacher, mask = _masked(student_logits, teacher_logits, mask)
    targets = torch.where(targets >= 0, targets, teacher.argmax(-1))
    rest = torch.ones_like(student, dtype=torch.bool).scatter_(-1, targets.unsqueeze(-1), False)
    shape = (*student.shape[:-1], student.shape[-1] - 1)
    binary, among_rest = [], []
    for logits in (student / temperature, teacher / temperature):
        others = logits[rest].reshape(shape)
        target = logits.gather(-1, targets.unsqueeze(-1))
        binary.append(F.log_softmax(torch.cat([target, others.logsumexp(-1, keepdim=True)], dim=-1), dim=-1))
        among_rest.append(F.log_softmax(others, dim=-1))
    divergences = alpha * _kl(binary[1], binary[0]) + beta * _kl(among_rest[1], among_rest[0])
    return _mean(divergences, mask, count) * temperature**2


def per_label(logits: Tensor) -> Tensor:
    """Multi-label logits …×C as C two-class distributions …×C×2: softmax of (z/T, 0) is the sigmoid of z/T."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def hard_loss(
    student_logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    count: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The task's own loss: cross-entropy for class ids, squared error for scores, binary cross-entropy for label sets.

    Positions without a label (class id −100, or NaN) add nothing.

    Args:
        student_logits: …×C, or …×1 for scores.
        labels: … class ids (int64); … scores (float); …×C zeros and ones, one a label (float).
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016, section 7).
        count: labels of the whole optimizer step (see `label_count`).
        class_weights: C; a position weighs what its class does, a label of a set what that label does.
    """
    count = label_count(labels, class_weights) if count is None else count
    logits = student_logits.float()
    if not labels.is_floating_point():
        total = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), class_weights, label_smoothing=label_smoothing, reduction="sum"
        )
        return total / _at_least_one(count)
    known = ~labels.isnan()
    labels = labels.float().masked_fill(~known, 0.0)
    if labels.ndim == logits.ndim - 1:
        errors = (logits.squeeze(-1) - labels).square()
        return errors.masked_fill(~known, 0.0).sum() / _at_least_one(count)
    targets = labels * (1 - label_smoothing) + label_smoothing / 2
    entropies = F.binary_cross_entropy_with_logits(logits, targets, class_weights, reduction="none")
    return entropies.masked_fill(~known, 0.0).mean(-1).sum() / _at_least_one(count)


def label_count(labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """What `hard_loss` divides by: the labelled positions, each weighing what its class does (as torch does).

    Args:
        labels: as for `hard_loss`.
        class_weights: C; they count for class ids alone, and a position with scores or a label set weighs 1.
    """
    if labels.is_floating_point():
        known = ~labels.isnan()
        return (known.any(-1) if labels.ndim > 1 else known).sum().float()
    known = labels >= 0
    weights = known.float() if class_weights is None else class_weights[labels.clamp(min=0)] * known
    return weights.sum()


# --- hidden states --------------------------------------------------------------------------------------------------


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
        count: valid tokens of the whole optimizer step.
    """

    def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
        padding = mask.unsqueeze(-1) == 0
        student, teacher = (states.float().masked_fill(padding, 0.0) for states in (student, teacher))
        total = F.mse_loss(student, teacher, reduction="sum") / student.shape[-1]
        return total / _at_least_one(mask.sum() if count is None else count)

    return _over_layers(squared_error, student_hidden, teacher_hidden)


def cosine_loss(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """1 − cosine of hidden states, averaged over pairs of layers and valid tokens (DistilBERT, Sanh et al. 2019, §2).

    Args: as for `hidden_loss`.
    """

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher, _ = _masked(student, teacher, mask)
        return _mean(1 - (_unit(student) * _unit(teacher)).sum(-1), mask, count)

    return _over_layers(distance, student_hidden, teacher_hidden)


def pkd_loss(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Squared distance of the normalised first ([CLS]) states, averaged over layers and rows (Sun et al. 2019, eq. 7).

    Args:
        student_hidden: for each pair of layers B×T×D; teacher_hidden alike.
        mask: B, 1 for rows that count.
        count: rows of the whole optimizer step.
    """

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher, _ = _masked(student[:, 0], teacher[:, 0], mask)
        return _mean((_unit(student) - _unit(teacher)).square().sum(-1), mask, count)

    return _over_layers(distance, student_hidden, teacher_hidden)


# --- attention ------------------------------------------------------------------------------------------------------


def attention_loss(
    student_attention: Sequence[Tensor],
    teacher_attention: Sequence[Tensor],
    mask: Tensor,
    count: Tensor | None = None,
    *,
    distance: AttentionLoss = "mse",
) -> Tensor:
    """Distance of attention maps, averaged over pairs of layers, heads and valid query tokens.

    `mse`: squared error, averaged over the row's valid keys (TinyBERT, Jiao et al. 2020, equation 7, on the
    probabilities); `kl`: KL(teacher ‖ student) over the keys (MiniLM, Wang et al. 2020, equation 6).

    Args:
        student_attention: for each pair of layers B×H×T×T probabilities; teacher_attention alike.
        mask: B×T, 1 for tokens that count.
        count: valid tokens of the whole optimizer step.
    """
    valid = mask.bool()[:, None, None, :]  # keys

    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        if distance == "mse":
            squared = (student - teacher).masked_fill(~valid, 0.0).square().sum(-1)
            per_query = squared / valid.sum(-1).clamp(min=1)
        else:
            logs = [attention.masked_fill(~valid, 1.0).clamp(min=1e-12).log() for attention in (teacher, student)]
            per_query = (teacher * (logs[0] - logs[1])).masked_fill(~valid, 0.0).sum(-1)
        return _mean(per_query.mean(1), mask, count)

    return _over_layers(compare, student_attention, teacher_attention)


def relation_loss(
    student_states: Sequence[Sequence[Tensor]],
    teacher_states: Sequence[Sequence[Tensor]],
    mask: Tensor,
    count: Tensor | None = None,
    *,
    num_heads: int,
) -> Tensor:
    """KL(teacher ‖ student) of self-attention relations Q–Q, K–K, V–V (MiniLMv2, Wang et al. 2021, equations 2 to 5).

    Each state is cut into `num_heads` relation heads, whatever the model's own heads, so widths may differ. Averaged
    over pairs of layers, the three relations (where MiniLMv2 sums), heads and valid tokens.

    Args:
        student_states: for each pair of layers the queries, keys and values, each B×T×D.
        teacher_states: alike, of its own width.
        mask: B×T, 1 for tokens that count.
        count: valid tokens of the whole optimizer step.
        num_heads: divides every width.
    """
    valid = mask.bool()[:, None, None, :]  # keys

    def log_relation(states: Tensor) -> Tensor:
        heads = states.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
        return F.log_softmax(scores.masked_fill(~valid, -1e9), dim=-1)

    def compare(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=mask.device)
        for student_state, teacher_state in zip(student, teacher, strict=True):
            student_state, teacher_state, _ = _masked(student_state, teacher_state, mask)
            per_query = _kl(log_relation(teacher_state), log_relation(student_state)).mean(1)
            total = total + _mean(per_query, mask, count)
        return total / len(student)

    return _over_layers(compare, student_states, teacher_states)


# --- pooled states --------------------------------------------------------------------------------------------------


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the valid tokens' states: B×D in float32; zeros for a row without any.

    Args:
        hidden: B×T×D.
        mask: B×T, 1 for tokens that count and 0 for padding.
    """
    states = hidden.float().masked_fill(mask.unsqueeze(-1) == 0, 0.0)
    return states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def contrastive_loss(
    student_pooled: Tensor,
    teacher_pooled: Tensor,
    negatives: Tensor,
    temperature: float,
    mask: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """−log of the share that a row's own teacher state has among it and the negatives, by cosine similarity.

    InfoNCE (van den Oord et al. 2018, equation 4) for representations (CRD, Tian et al. 2020). As in CRD the negatives
    are a fixed memory and not the rest of the batch: the loss of a row then does not depend on its neighbours. A
    negative equal to the row's own teacher state (a duplicate, or the row itself) does not count; equal as far as
    bfloat16 tells, where the same row in another batch or attention gives another state.

    Args:
        student_pooled: B×D (projected to the teacher's width); teacher_pooled: B×D.
        negatives: N×D, teacher states of other rows.
        temperature: of the similarities.
        mask: B, 1 for rows that count; count: rows of the whole optimizer step.
    """
    student, teacher, mask = _masked(student_pooled, teacher_pooled, mask)
    student, teacher, negatives = _unit(student), _unit(teacher), _unit(negatives.float())
    same = teacher @ negatives.T > 1 - _SAME
    against = (student @ negatives.T / temperature).masked_fill(same, -1e9)
    own = (student * teacher).sum(-1, keepdim=True) / temperature
    return _mean(torch.cat([own, against], dim=-1).logsumexp(-1) - own.squeeze(-1), mask, count)


# --- shared ---------------------------------------------------------------------------------------------------------


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last dimension."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _unit(states: Tensor) -> Tensor:
    """Of length 1; shorter than 0.001 they keep their length, so that the gradient at 0 fits into half precision."""
    return F.normalize(states, dim=-1, eps=1e-3)


def _masked(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float32 with zeros where the mask is 0 (so that nothing there reaches a gradient), and the mask."""
    if mask is None:
        return student.float(), teacher.float(), torch.ones(student.shape[:-1], device=student.device)
    mask = mask.reshape(mask.shape + (1,) * (student.ndim - 1 - mask.ndim)).expand(student.shape[:-1])
    out = mask.unsqueeze(-1) == 0
    return student.float().masked_fill(out, 0.0), teacher.float().masked_fill(out, 0.0), mask


def _mean(values: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
    total = values.masked_fill(mask == 0, 0.0).sum()
    return total / _at_least_one(mask.sum() if count is None else count)


def _at_least_one(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, 1)


def _over_layers(compare: Callable, student: Sequence, teacher: Sequence) -> Tensor:
    """The mean over pairs of layers."""
    return torch.stack([compare(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
