"""Entities in tagged words, as the CoNLL script and seqeval count them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def entities_of(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity in tags like B-person, I-person, O.

    An entity begins at `B-`, or at an `I-` that goes on from no entity of its type (CoNLL-2000's rule). Tags without
    a prefix make an entity of every run of the same one.
    """
    found: set[tuple[str, int, int]] = set()
    started, kind = 0, None
    for place, tag in enumerate([*tags, "O"]):
        prefix, dash, name = tag.partition("-")
        here = None if tag == "O" else name if dash and prefix in ("B", "I") else tag
        goes_on = here == kind and not (dash and prefix == "B")
        if kind is not None and not goes_on:
            found.add((kind, started, place))
        if here is not None and not (goes_on and kind is not None):
            started = place
        kind = here
    return found


def entity_counts(
    predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], names: Sequence[str]
) -> NDArray[np.int64]:
    """For each row the entities found rightly, found, and there: N×3.

    Args:
        predictions: label ids of each row's words; a row cut short by the model's length has fewer than `labels`.
        names: of the label ids.
    """
    counts = []
    for predicted, truth in zip(predictions, labels, strict=True):
        found, there = (entities_of([names[tag] for tag in tags]) for tags in (predicted, truth[: len(predicted)]))
        counts.append([len(found & there), len(found), len(there)])
    return np.array(counts, dtype=np.int64).reshape(-1, 3)


def scores(counts: NDArray) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of all rows together; 0 where there is nothing to divide by."""
    right, found, there = (float(total) for total in counts.sum(0))
    return {
        "entity_f1": 2 * right / max(found + there, 1),
        "entity_precision": right / max(found, 1),
        "entity_recall": right / max(there, 1),
    }
