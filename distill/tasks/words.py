"""Tagged words: the tags of a row's words, how they are scored, and how far two models agree on them."""

from collections.abc import Sequence

import numpy as np

from distill.tasks import entities, scorers
from distill.tasks.base import Task
from distill.tasks.scorers import Scorer
from distill.tasks.targets import IGNORED


def words_of(values: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Of tokens (B×T) those that stand for words, row by row: the ones with a label."""
    return [row[known].tolist() for row, known in zip(values, labels != IGNORED, strict=True)]


def tags_of_words(
    found: Sequence[Sequence[int]], words: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[list[int]]:
    """The label ids predicted for all words of each row, −100 for those that the model did not read.

    Args:
        found: of the words that it read.
        words: their numbers; the others are beyond its length, or became no token.
        labels: of all words of each row.
    """
    predicted = []
    for tags, numbers, of_row in zip(found, words, labels, strict=True):
        read = dict(zip(numbers, tags, strict=True))
        predicted.append([read.get(number, IGNORED) for number in range(len(of_row))])
    return predicted


def tag_scores(task: Task, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, and the share of words whose tag is right.

    Args:
        predictions: label ids of each row's words; −100 for words that the model did not read, which are not right.
        labels: of every word.
    """
    results = entities.scores(entities.entity_counts(predictions, labels, task.label_names or ()))
    pairs = [pair for rows in zip(predictions, labels, strict=True) for pair in zip(*rows, strict=True)]
    right = [found == truth for found, truth in pairs if truth != IGNORED]
    return results | {"accuracy": float(np.mean(right)) if right else 0.0}


def tag_scorer(task: Task, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Scorer:
    """Entity F1 of rows of which each counts so often; predictions and labels as in `tag_scores`."""
    return scorers.f1(entities.entity_counts(predictions, labels, task.label_names or ()))


def tag_agreement(predictions: Sequence[Sequence[int]], baseline: Sequence[Sequence[int]]) -> float:
    """The share of words that two models tag alike, without those that neither model read (−100)."""
    pairs = [pair for rows in zip(predictions, baseline, strict=True) for pair in zip(*rows, strict=False)]
    return float(np.mean([first == second for first, second in pairs if (first, second) != (IGNORED, IGNORED)]))
