"""Which rows are trained on and which are scored: a validation split cut from train, and random parts."""

from collections import defaultdict
from typing import Any

import datasets
import numpy as np

from distill.errors import InputError
from distill.tasks.base import Task
from distill.tasks.kinds import KINDS


def cut_validation(
    rows: datasets.Dataset, task: Task, *, fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut a seeded share of every class off the training rows; rows with equal texts stay together, so none leaks.

    Args:
        rows: the checked training rows.
        task: what their columns are.
        fraction: share of the rows to cut off.
        seed: of the choice.

    Returns:
        The rows to train on, and those to validate on.

    Raises:
        InputError: every label is another, or one of the two would be empty.
    """
    of_classes = KINDS[task.kind].labels.one_class
    labels = rows["label"] if of_classes else [0] * len(rows)
    texts = _texts_of_rows(rows, task)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        groups[text].append(index)
    by_class: dict[Any, list[list[int]]] = defaultdict(list)
    for indices in groups.values():
        by_class[labels[indices[0]]].append(indices)
    generator = np.random.default_rng(seed)
    classes = sorted(by_class)
    orders = [generator.permutation(len(by_class[label])) for label in classes]
    counts = _counts_to_cut([len(by_class[label]) for label in classes], fraction, generator)
    chosen: set[int] = set()
    for label, order, count in zip(classes, orders, counts, strict=True):
        for position in order[:count]:
            chosen.update(by_class[label][position])
    train = [index for index in range(len(rows)) if index not in chosen]
    if not chosen and of_classes and len(by_class) == len(rows):
        raise InputError(
            f"data.label: column {task.label!r} has another label in each of {len(rows)} rows; name the column of the "
            "classes, or say kind: regression for scores"
        )
    if not chosen or not train:
        raise InputError(
            f"data.validation_fraction: {fraction} of {len(rows)} rows leaves "
            f"{len(train)} to train on and {len(chosen)} to validate; add rows, or give a validation file"
        )
    return rows.select(train), rows.select(sorted(chosen))


def random_part(rows: datasets.Dataset, limit: int, seed: int) -> datasets.Dataset:
    """A seeded random part of at most `limit` rows, in their order."""
    return rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:limit].tolist()))


def classes_without_rows(rows: datasets.Dataset, task: Task) -> int:
    """How many of a task's classes no row is of; 0 for tasks without classes."""
    return task.num_labels - len(set(rows["label"])) if KINDS[task.kind].labels.one_class else 0


def _counts_to_cut(sizes: list[int], fraction: float, generator: np.random.Generator) -> list[int]:
    """How many of each class are cut off, never all of one.

    Each class gives its share, rounded. Where that misses the whole's share, as it does if most classes are small
    (0.4 of a row rounds to none), the shares are rounded by the largest remainder, ties by chance.
    """
    rounded = [min(round(size * fraction), size - 1) for size in sizes]
    wanted = sum(sizes) * fraction
    if sum(rounded) > 0 and abs(sum(rounded) - wanted) <= max(1, min(np.sqrt(len(sizes)), wanted / 4)):
        return rounded
    total = round(wanted)
    divisible = sum(size for size in sizes if size > 1)
    shares = np.array([size * total / divisible if size > 1 else 0.0 for size in sizes])
    counts = np.minimum(np.floor(shares), np.array(sizes) - 1).astype(int)
    remainders = np.round(shares - np.floor(shares), 9)
    by_remainder = sorted(range(len(sizes)), key=lambda place: (-remainders[place], generator.random()))
    for place in by_remainder:
        if counts.sum() < total and counts[place] < sizes[place] - 1:
            counts[place] += 1
    return counts.tolist()


def _texts_of_rows(rows: datasets.Dataset, task: Task) -> list[str]:
    """What tells a row from others: its texts, or for questions the context alone, or an image's bytes."""
    its = KINDS[task.kind]
    if its.reads == "images":
        raw = rows.cast_column(task.text[0], datasets.Image(decode=False))[task.text[0]]
        return [str(image["bytes"] or image["path"]) for image in raw]
    columns = [rows[column] for column in task.text[its.grouped_by]]
    return [str(texts) for texts in zip(*columns, strict=True)]  # words are in a list
