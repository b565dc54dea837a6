"""The labels and mask that a model's logits of a batch stand against, and how predictions are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor, nn
from transformers import PretrainedConfig

SPAN_LABELS = ("start_positions", "end_positions")
IGNORED = -100

_NO_LOGIT = -1e4


@dataclass(frozen=True)
class BatchTargets:
    """The labels of a batch's predictions, and the mask of those that are compared with a teacher's."""

    labels: Tensor | None
    """…, or …×C for multi-label; unknown ones are −100 or NaN. None where the batch has no such column."""
    mask: Tensor
    """… booleans; a loss against a teacher is normalised by how many are true."""
    classes: Tensor | None = None
    """For spans B×1×T: the tokens that can be an end, padding aside."""

    def at_mask(self, logits: Tensor) -> "BatchTargets":
        """Keep the targets under the mask, in one row, where the logits are of them alone (see `head_at_mask`)."""
        if logits.shape[:-1] == self.mask.shape:
            return self
        labels = None if self.labels is None else self.labels[self.mask].unsqueeze(0)
        return BatchTargets(labels, self.mask.new_ones(1, int(self.mask.sum())))


class HardLoss(Protocol):
    """As `distill.losses.hard_loss`: the sum over labels of the loss against them, divided by `count`."""

    def __call__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        label_smoothing: float,
        count: Tensor,
        *,
        class_weights: Tensor | None,
    ) -> Tensor:
        """The loss of aligned logits …×C; the other arguments as there."""
        ...


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What models of a kind predict, and how their logits are compared with labels and with another model's logits."""

    name: str
    """In messages, and in the names of caches on disk."""
    problem_type: str | None
    """As a model's config has it; None where its class says it all."""
    fits: Callable[[PretrainedConfig], bool]
    """Whether a model with this config, whose class is one of the kind's, predicts this."""
    label_columns: tuple[str, ...]
    """Of a batch."""
    output_names: tuple[str, ...]
    """Of a model's logits: one, or one for each end of a span."""
    token_axis: int | None
    """The axis of logits that goes over tokens; None for one prediction a row."""
    one_output: bool
    """Whether the head has a single output."""
    over_vocabulary: bool
    """Whether the classes are the tokens of the vocabulary, which must then be the teacher's."""
    masks_inputs: bool
    """Whether only masked tokens are predicted: rows without labels are masked anew whenever they are read, and a head
    may be computed at masked positions alone."""
    inputs_are_labels: bool
    """Whether tokens are labels themselves, where a batch brings no others."""
    float_labels: bool
    """Whether labels are floats, also where the rows have whole numbers."""
    batch_targets: Callable[[Mapping[str, Tensor], Tensor], BatchTargets]
    """(batch, B booleans of the rows that are real) → the labels and mask that stand against `aligned` logits."""
    aligned: Callable[[Tensor], Tensor]
    """Logits → those that stand against labels."""
    hard_loss: HardLoss
    """Of aligned logits against labels."""
    distributions: Callable[[Tensor], Tensor] | None
    """Logits …×C → logits of the distributions they stand for, …×C or, one a label, …×C×2; None for values, which are
    compared by their squared error."""
    from_probabilities: Callable[[Tensor], Tensor]
    """Probabilities …×C → logits …×C."""
    divergences: Callable[[NDArray, NDArray], NDArray[np.float64]]
    """(a model's logits N×C, another's) → how far the other's predictions are from the first's: N."""
    drawn_likelihood: Callable[[Tensor, torch.Generator], Tensor]
    """Logits N×C → the sum of log-likelihoods of labels drawn from them; its gradients give the Fisher information."""

    @property
    def per_row(self) -> bool:
        """Whether each row has one prediction."""
        return self.token_axis is None

    @property
    def per_token(self) -> bool:
        """Whether each token has one prediction, so that labels are padded as tokens are."""
        return self.token_axis == 1

    def num_outputs(self, config: PretrainedConfig) -> int:
        """Give the number of logits of one row, or of one token."""
        if self.over_vocabulary:
            return config.vocab_size
        return config.num_labels if len(self.output_names) == 1 else len(self.output_names)

    def named(self, logits: Tensor) -> dict[str, Tensor]:
        """Name logits as transformers' models do: B×C, B×T×C, or for each end of spans B×T."""
        several = len(self.output_names) > 1
        return dict(zip(self.output_names, logits.unbind(1) if several else [logits], strict=True))

    def tokens_first(self, logits: Tensor) -> Tensor:
        """Turn logits B×T×C, or B×2×T of spans, into B×T×C; and back."""
        return logits if self.token_axis == 1 else logits.transpose(1, 2)


def any_config(config: PretrainedConfig) -> bool:
    """Accept any config: the `Targets.fits` of kinds whose model class says all."""
    return True


def as_they_are(logits: Tensor) -> Tensor:
    """Keep logits as they are, where each stands in its label's place (`Targets.aligned`, `Targets.distributions`)."""
    return logits


def targets_of_rows(batch: Mapping[str, Tensor], counted_rows: Tensor) -> BatchTargets:
    """Find the labels and mask of a batch with one prediction a row.

    Args:
        batch: its `labels` are B, or B×C.
        counted_rows: B booleans.
    """
    labels = batch.get("labels")
    if labels is not None:
        unknown = float("nan") if labels.is_floating_point() else IGNORED
        labels = labels.masked_fill(~counted_rows.reshape(-1, *(1,) * (labels.ndim - 1)), unknown)
    return BatchTargets(labels, counted_rows)


def targets_of_tokens(batch: Mapping[str, Tensor], counted_rows: Tensor) -> BatchTargets:
    """Find the labels and mask of a batch with one prediction a token.

    A token is under the mask where it has a label; in a row without any, where it is no padding.

    Args:
        batch: its `attention_mask` and, where there are labels, `labels` are B×T.
        counted_rows: B booleans.
    """
    tokens, labels = real_tokens(batch, counted_rows), batch.get("labels")
    return labelled_tokens(None if labels is None else labels.masked_fill(~tokens, IGNORED), tokens)


def real_tokens(batch: Mapping[str, Tensor], counted_rows: Tensor) -> Tensor:
    """Mask the padding, and all tokens of the rows that are masked themselves: B×T booleans.

    Args:
        batch: its `attention_mask` is B×T.
        counted_rows: B booleans.
    """
    return batch["attention_mask"].bool() & counted_rows.unsqueeze(-1)


def labelled_tokens(labels: Tensor | None, tokens: Tensor) -> BatchTargets:
    """Make targets at the tokens that have a label; in rows without any, at all tokens.

    Args:
        labels: B×T, −100 for none.
        tokens: B×T booleans, padding aside.
    """
    if labels is None:
        return BatchTargets(None, tokens)
    known = labels != IGNORED
    return BatchTargets(labels, torch.where(known.any(-1, keepdim=True), known, tokens))


def logits_under_mask(targets: Targets, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """Select the logits N×C of a batch's predictions: of its rows, of its tokens, of its spans' two ends.

    Args:
        targets: of the model.
        batch: a model's inputs, without labels.
        logits: as `logits_of` gives them.
    """
    logits = targets.aligned(logits)
    of_batch = targets.batch_targets(batch, torch.ones(len(logits), dtype=torch.bool, device=logits.device))
    return mask_classes(logits, of_batch.classes, as_values=False)[of_batch.mask]


def mask_classes(logits: Tensor, classes: Tensor | None, *, as_values: bool) -> Tensor:
    """Mask padded positions out of span logits, so that they take no part in a loss.

    Args:
        logits: …×C.
        classes: booleans of the classes that are no padding; None for all.
        as_values: for a squared error, averaged over the classes that are none; else for a softmax.
    """
    if classes is None:
        return logits
    if not as_values:
        return logits.float().masked_fill(~classes, _NO_LOGIT)
    existing = classes.sum(-1, keepdim=True).clamp(min=1)
    return logits.float().masked_fill(~classes, 0.0) * (logits.shape[-1] / existing).sqrt()


# --- two models' predictions ------------------------------------------------------------------------------------------


def kl_of_classes(reference: NDArray, logits: NDArray) -> NDArray[np.float64]:
    """Compute KL(reference ‖ other) of each row's distribution over classes, in nats: N.

    Args:
        reference: logits N×C of the reference.
        logits: N×C of the other.
    """
    return _kl(*(np.asarray(each, dtype=np.float64) for each in (reference, logits)))


def kl_of_labels(reference: NDArray, logits: NDArray) -> NDArray[np.float64]:
    """Compute the mean over C labels of each row's KL(reference ‖ other) of two outcomes each, in nats: N.

    Args:
        reference: logits N×C of the reference.
        logits: N×C of the other.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (reference, logits))
    return _kl(*(np.stack([each, np.zeros_like(each)], axis=-1) for each in (first, second)))


def squared_differences(reference: NDArray, logits: NDArray) -> NDArray[np.float64]:
    """Compute the squared difference of each row's values: N.

    Args:
        reference: values N×1 of the reference.
        logits: values N×1 of the other.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (reference, logits))
    return np.square(first - second).reshape(len(first), -1).mean(-1)


def _kl(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    first, second = (each - logsumexp(each, axis=-1, keepdims=True) for each in (first, second))
    terms = (np.exp(first) * (first - second)).sum(-1)
    return np.maximum(terms.reshape(len(terms), -1).mean(-1), 0)


def likelihood_of_drawn_classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class from each distribution, and sum the log-likelihoods of the drawn classes (in nats).

    Args:
        logits: N×C.
        generator: of the draws, on the logits' device.
    """
    logits = logits.float()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    return logits.log_softmax(-1).gather(-1, drawn).sum()


def likelihood_of_drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each label by itself, and sum the log-likelihoods of the drawn zeros and ones (in nats).

    Args:
        logits: N×C.
        generator: of the draws, on the logits' device.
    """
    logits = logits.float()
    drawn = torch.bernoulli(logits.detach().sigmoid(), generator=generator)
    return -nn.functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")


def sum_of_values(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sum values, whose gradients are those of a squared error but for a factor of mean 0 and variance 1.

    Args:
        logits: N×1.
        generator: none is needed.
    """
    return logits.float().sum()


def log_of_probabilities(probabilities: Tensor) -> Tensor:
    """Turn probabilities …×C of classes into logits."""
    return probabilities.clamp(min=1e-12).log()


def log_odds(probabilities: Tensor) -> Tensor:
    """Turn probabilities …×C of labels that are there each by itself into logits."""
    return probabilities.logit(eps=1e-6)
