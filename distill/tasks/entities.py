"""Entities in tagged words, as the CoNLL script and seqeval count them."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from distill.tasks import scorers
from distill.tasks.targets import IGNORED

_MARKS = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}
"""Letters of IOB, IOBES, BMES and BILOU → begin, inside, end and single, as seqeval calls them."""

_PREFIXED = re.compile(r"([BIMELSU])[-_:/](.+)")
_SUFFIXED = re.compile(r"(.+)[-_:/]([BIMELSU])")
_OUTSIDE = ("O", "")

_Mark = tuple[str, str]
"""(B, I, E, S or O; the entity's type)."""


def entity_counts(
    predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], names: Sequence[str]
) -> NDArray[np.int64]:
    """Count for each row the entities that were found rightly, that were found, and that are there: N×3.

    The rules are those of seqeval's default mode (Nakayama 2018), which are the CoNLL-2000 script's: an entity begins
    at B or S, after an E or S, where the type changes, and after O; it ends before these, and after E and S. So they
    read IOB1, IOB2 and IOBES alike. BILOU's L and U are E and S, the M of BMES is I. The letter stands before the type
    (`B-PER`), behind it (`PER-B`) or alone (`B`). Tags without such letters make an entity of every run of the same
    one.

    Args:
        predictions: label ids of each row's words; −100, or nothing at the end, for words that the model did not read
            (beyond its length, or without a token), whose entities are missed.
        labels: of every word.
        names: of the label ids; all of them tell how the tags are written.
    """
    marks = dict(enumerate(map(_reader(names), names))) | {IGNORED: _OUTSIDE}
    counts = []
    for predicted, truth in zip(predictions, labels, strict=True):
        found, there = (_marked([marks[tag] for tag in tags]) for tags in (predicted, truth))
        counts.append([len(found & there), len(found), len(there)])
    return np.array(counts, dtype=np.int64).reshape(-1, 3)


def scores(counts: NDArray) -> dict[str, float]:
    """Compute micro-averaged precision, recall and F1 of all rows together, from the counts of `entity_counts`.

    They are 0 where there is nothing to divide by.
    """
    right, found, there = counts.T
    of_all = {"entity_f1": scorers.f1(counts)}
    of_all |= {"entity_precision": scorers.ratio(right, found), "entity_recall": scorers.ratio(right, there)}
    return {name: scorers.whole(scorer, len(counts)) for name, scorer in of_all.items()}


def _marked(marks: Sequence[_Mark]) -> set[tuple[str, int, int]]:
    found: set[tuple[str, int, int]] = set()
    begun, (before, entity_type) = 0, _OUTSIDE
    for place, (mark, kind) in enumerate([*marks, _OUTSIDE]):
        anew = mark in "BS" or before in "ESO" or kind != entity_type
        if before != "O" and (anew or mark == "O"):
            found.add((entity_type, begun, place))
        if mark != "O" and anew:
            begun = place
        before, entity_type = mark, kind
    return found


def _reader(names: Sequence[str]) -> Callable[[str], _Mark]:
    """How tags are read, by what all of them look like."""
    tags = {name for name in names if name != "O"}
    before = {name: (_MARKS[found[1]], found[2]) for name in tags if (found := _PREFIXED.fullmatch(name))}
    behind = {name: (_MARKS[found[2]], found[1]) for name in tags if (found := _SUFFIXED.fullmatch(name))}
    bare = {name: (_MARKS[name], "_") for name in tags if name in _MARKS}
    # Types may look like marks (E-MAIL, or PER-B of a type B): what reads all tags is meant before what reads some.
    readings = [each for each in (before, behind, bare) if any(mark in "BI" for mark, _ in each.values())]
    readings = [each for each in readings if each.keys() == tags] or [each for each in readings if each is not bare]
    readings += [each for each in (before, behind) if each.keys() == tags]
    known = readings[0] if readings else {}
    return lambda tag: _OUTSIDE if tag == "O" else known.get(tag, ("I", tag))
