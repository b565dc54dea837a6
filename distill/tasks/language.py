"""Language models: perplexity and accuracy of the tokens that they predict."""

from collections.abc import Sequence

import numpy as np

from distill.tasks import scorers
from distill.tasks.base import Task
from distill.tasks.scorers import Scorer
from distill.tasks.words import tag_agreement


def language_scores(losses: np.ndarray) -> dict[str, float]:
    """Perplexity, and the share of tokens predicted right.

    Args:
        losses: N×3, for each row the summed negative log-likelihood (nats), the tokens predicted right, and all.
    """
    _, right, tokens = losses.T
    of_all = {"perplexity": _perplexity(losses), "accuracy": scorers.ratio(right, tokens)}
    return {name: scorers.whole(each, len(losses)) for name, each in of_all.items()}


def token_losses(predictions: Sequence[dict]) -> np.ndarray:
    """N×3 of a language model's predictions: nats, tokens that were right, tokens."""
    return np.array([[each["loss"], each["right"], len(each["tokens"])] for each in predictions], dtype=np.float64)


def language_scorer(task: Task, predictions: Sequence[dict], labels: Sequence) -> Scorer:
    """Perplexity of rows of which each counts so often.

    Args:
        predictions: as in `Evaluation`, one a row.
        labels: none; the tokens themselves are what is predicted.
    """
    return _perplexity(token_losses(predictions))


def token_agreement(predictions: Sequence[dict], baseline: Sequence[dict]) -> float:
    """The share of tokens that two models predict alike."""
    first, second = ([each["tokens"] for each in found] for found in (predictions, baseline))
    return tag_agreement(first, second)


def _perplexity(losses: np.ndarray) -> Scorer:
    loss_of_token = scorers.ratio(losses[:, 0], losses[:, 2])
    return lambda weights: np.exp(loss_of_token(weights))
