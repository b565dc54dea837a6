"""Tagged words: the tags of a row's words, how they are scored, and how far two models agree on them."""

from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from distill.tasks import entities, scorers
from distill.tasks.base import Task
from distill.tasks.scorers import Scorer
from distill.tasks.targets import IGNORED, finite_logits


def read_tags(
    model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence[Sequence[int]], name: str
) -> list[list[int]]:
    """The label ids predicted for the words of each row of a batch that the model read.

    Args:
        labels: of each row's tokens, −100 for those that stand for no word; padding is on the right.
    """
    found = finite_logits(model, batch, name).argmax(-1).numpy()
    known = [np.array(of_row) != IGNORED for of_row in labels]
    return [tags[: len(of_row)][of_row].tolist() for tags, of_row in zip(found, known, strict=True)]


def tag_predictions(
    task: Task, rows: datasets.Dataset, found: Sequence[Sequence[int]], split: datasets.Dataset
) -> list[list[int]]:
    """The label ids of all words of each row, of what `read_tags` found."""
    return tags_of_words(found, rows["words"], split["label"])


def tags_while_training(task: Task, rows: datasets.Dataset, split: datasets.Dataset) -> dict[str, Callable]:
    """What a Trainer takes to score tagged words."""

    def of_words(output: EvalPrediction) -> dict[str, float]:
        found = words_of(output.predictions, output.label_ids)
        return tag_scores(task, tags_of_words(found, rows["words"], split["label"]), split["label"])

    return {"preprocess_logits_for_metrics": lambda logits, _: logits.argmax(-1), "compute_metrics": of_words}


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


def tag_scores(
    task: Task, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], logits: None = None
) -> dict[str, float]:
    """Precision, recall and F1 of entities, and the share of words whose tag is right.

    Args:
        predictions: label ids of each row's words; −100 for words that the model did not read, which are not right.
        labels: of every word.
        logits: none are kept.
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
