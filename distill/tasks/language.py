"""Language models: perplexity and accuracy of the tokens that they predict."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.tasks import scorers
from distill.tasks.base import Task
from distill.tasks.scorers import Scorer
from distill.tasks.targets import (
    CHUNK,
    IGNORED,
    ProblemType,
    labels_of,
    logits_in_chunks,
    problem_type,
    refuse_not_finite_outputs,
    shifted,
)
from distill.tasks.words import tag_agreement


def read_language(
    model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence[Sequence[int]], name: str
) -> list[dict[str, Any]]:
    """Of each row of a batch {"loss": nats, "right": tokens, "tokens": ids that were predicted}.

    Args:
        labels: of each row's tokens.
    """
    mask = batch["attention_mask"].bool()
    of_tokens = torch.full_like(batch["input_ids"], IGNORED)
    of_tokens[mask] = torch.tensor([label for of_row in labels for label in of_row], device=of_tokens.device)
    every = torch.ones(len(of_tokens), dtype=torch.bool, device=of_tokens.device)
    given = {"attention_mask": mask, "labels": of_tokens}
    of_tokens = cast(Tensor, labels_of(problem_type(model), given, every).labels)
    known = of_tokens != IGNORED
    # A causal LM's last token predicts nothing.
    places = torch.nn.functional.pad(known, (0, mask.shape[1] - known.shape[1]))
    losses, tokens = [], []
    for logits, targets in zip(logits_in_chunks(model, batch, places), of_tokens[known].split(CHUNK), strict=True):
        refuse_not_finite_outputs(logits, None, name)
        losses.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"))
        tokens.append(logits.argmax(-1))
    counts = known.sum(1).tolist()
    of_rows = (torch.cat(each).cpu().split(counts) for each in (losses, tokens, [of_tokens[known]]))
    return [
        {"loss": float(loss.double().sum()), "right": int((found == truth).sum()), "tokens": found.tolist()}
        for loss, found, truth in zip(*of_rows, strict=True)
    ]


def language_predictions(
    task: Task, rows: datasets.Dataset, found: list[dict[str, Any]], split: datasets.Dataset
) -> list[dict[str, Any]]:
    """What `read_language` found of each window, as it is."""
    return found


def language_while_training(problem: ProblemType) -> Callable[..., dict[str, Callable]]:
    """A kind's `while_training`: of every token three numbers, since all logits don't fit into memory."""

    def scoring(task: Task, rows: datasets.Dataset, split: datasets.Dataset) -> dict[str, Callable]:
        return {
            "preprocess_logits_for_metrics": lambda logits, labels: _of_tokens(problem, logits, labels),
            "compute_metrics": lambda output: _scores(np.maximum(output.predictions, 0).sum(1)),
        }

    return scoring


def language_scores(task: Task, predictions: Sequence[dict], labels: Sequence, logits: None = None) -> dict[str, float]:
    """Perplexity, and the share of tokens predicted right; no labels are asked for, and no logits are kept.

    Args:
        predictions: as in `Evaluation`, one a row.
    """
    return _scores(_token_losses(predictions))


def language_scorer(task: Task, predictions: Sequence[dict], labels: Sequence) -> Scorer:
    """Perplexity of rows of which each counts so often.

    Args:
        predictions: as in `Evaluation`, one a row.
        labels: none; the tokens themselves are what is predicted.
    """
    return _perplexity(_token_losses(predictions))


def token_agreement(predictions: Sequence[dict], baseline: Sequence[dict]) -> float:
    """The share of tokens that two models predict alike."""
    first, second = ([each["tokens"] for each in found] for found in (predictions, baseline))
    return tag_agreement(first, second)


def _scores(losses: np.ndarray) -> dict[str, float]:
    """Perplexity and accuracy.

    Args:
        losses: N×3, for each row the summed negative log-likelihood (nats), the tokens predicted right, and all.
    """
    _, right, tokens = losses.T
    of_all = {"perplexity": _perplexity(losses), "accuracy": scorers.ratio(right, tokens)}
    return {name: scorers.whole(each, len(losses)) for name, each in of_all.items()}


def _token_losses(predictions: Sequence[dict]) -> np.ndarray:
    """N×3 of a language model's predictions: nats, tokens that were right, tokens."""
    return np.array([[each["loss"], each["right"], len(each["tokens"])] for each in predictions], dtype=np.float64)


def _perplexity(losses: np.ndarray) -> Scorer:
    loss_of_token = scorers.ratio(losses[:, 0], losses[:, 2])
    return lambda weights: np.exp(loss_of_token(weights))


def _of_tokens(problem: ProblemType, logits: Tensor, labels: Tensor) -> Tensor:
    """B×T×3 of logits B×T×V: each token's negative log-likelihood (nats), whether it was predicted right, and whether
    it counts; a causal LM predicts a token from the one before it, and not the first."""
    logits = shifted(problem, logits)
    labels = labels[:, labels.shape[1] - logits.shape[1] :]
    loss = torch.nn.functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
    known = labels != IGNORED
    return torch.stack([loss, (logits.argmax(-1) == labels) & known, known], dim=-1)
