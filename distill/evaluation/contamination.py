"""Scored rows that are among the rows trained on, as they are or nearly: how many, which, and the metrics without."""

import hashlib
import importlib.util
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

from distill.common.records import Contamination
from distill.data.load import Data
from distill.tasks.kinds import KINDS
from distill.tasks.scorers import Scorer

NEAR = 0.8
"""Texts whose cosine is at least this are nearly the same."""

MOST_ROWS = 100_000
"""Rows trained on; beyond them, candidates are looked for by MinHash."""

_GRAM = 5  # characters
_SHOWN = 10  # examples
_LONGEST_SHOWN = 500  # characters of an example's text
_PRODUCTS_AT_ONCE = 2**22  # 50 MB

Row: TypeAlias = tuple[str, ...]
"""The texts of a row."""


@dataclass(frozen=True)
class Match:
    """A scored row that is like a row trained on."""

    row: int
    """Its number in its split."""
    trained: int
    """The number of the most alike row trained on: of `train`, and behind its rows those of `unlabelled`."""
    similarity: float
    """From `NEAR` to 1; of pairs the smaller one of their two texts."""
    exact: bool


@dataclass(frozen=True)
class Matches:
    """What of each scored split was trained on."""

    splits: dict[str, list[Match]]
    looked_for_near: bool
    """Whether near ones were looked for: not in images, and in very many rows only where datasketch is installed."""


def find_matches(data: Data) -> Matches | None:
    """Look for the rows of each scored split among all rows trained on, unlabelled and sampled ones too.

    Rows are told apart by the columns that also keep them on one side when a validation split is cut off (of questions
    their contexts).

    Returns:
        None where there are no rows to train on.
    """
    trained = [row for split in ("train", "unlabelled") if split in data.splits for row in texts_of(data, split)]
    if not trained:
        return None
    of_texts = KINDS[data.task.kind].reads != "images"
    near = of_texts and (len(trained) <= MOST_ROWS or has_minhash())
    splits = {split: match_rows(texts_of(data, split), trained, near=near) for split, _, _ in data.scored_splits()}
    return Matches(splits, near)


def match_rows(scored: Sequence[Row], trained: Sequence[Row], *, near: bool = True) -> list[Match]:
    """For each scored row that is among the trained ones, the one that it is most like.

    The same is what differs in case, Unicode's forms or white space alone. Near is a cosine of `NEAR` or more between
    the sets of the texts' runs of five characters. The texts of a pair may stand in either order.

    Args:
        scored: rows of one text, or of two; trained likewise.
        near: look for near ones too.
    """
    scored, trained = ([tuple(map(folded, row)) for row in rows] for rows in (scored, trained))
    first: dict[Row, int] = {}
    for number, row in enumerate(trained):
        first.setdefault(tuple(sorted(row)), number)
    found = {
        number: Match(number, first[key], 1.0, exact=True)
        for number, row in enumerate(scored)
        if (key := tuple(sorted(row))) in first
    }
    if near:
        rest = [number for number in range(len(scored)) if number not in found]
        found |= {match.row: match for match in _near_rows(scored, rest, trained)}
    return [found[number] for number in sorted(found)]


def contamination_of(data: Data, matches: Matches, scores: Mapping[str, Scorer | None]) -> Contamination:
    """What report.json says of the matches.

    Args:
        scores: for each model its primary metric on the first scored split; None where a prediction is not of a row.
    """
    split = data.scored_splits()[0][0]
    counts = {name: _counts(data, name, matches) for name in matches.splits}
    kept = np.ones(len(data.splits[split]))
    kept[[match.row for match in matches.splits[split]]] = 0
    without = {name: float(score(kept)) if score is not None and kept.any() else None for name, score in scores.items()}
    of_first = counts[split]
    return Contamination(
        rows=len(kept),
        exact=of_first["exact"] or 0,
        near=of_first["near"],
        examples=[_example(data, name, match) for name, match in _shown(matches)],
        metrics_without=without,
        splits=counts,
    )


def folded(text: str) -> str:
    """A text without what a copy may differ in: Unicode's forms (NFKC), case, and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def texts_of(data: Data, split: str) -> list[Row]:
    """List, for each row of a split, the texts that tell it from others; for an image the SHA-256 of its bytes.

    Args:
        data: the rows; its kind of task says which columns tell rows apart.
        split: its name. Rows of words are joined with spaces.
    """
    its, rows = KINDS[data.task.kind], data.splits[split]
    if its.reads == "images":
        raw = rows.select_columns([data.task.text[0]]).cast_column(data.task.text[0], datasets.Image(decode=False))
        images = ((image["bytes"] or str(image["path"]).encode()) for image in raw[data.task.text[0]])
        return [(hashlib.sha256(image).hexdigest(),) for image in images]
    columns = [rows[column] for column in data.task.text[its.grouped_by]]
    of_words = its.reads == "words"
    return [tuple(" ".join(text) if of_words else text for text in row) for row in zip(*columns, strict=True)]


def has_minhash() -> bool:
    """Whether datasketch is installed."""
    return importlib.util.find_spec("datasketch") is not None


# --- near ones --------------------------------------------------------------------------------------------------------


def _near_rows(scored: Sequence[Row], numbers: Sequence[int], trained: Sequence[Row]) -> Iterator[Match]:
    """Of the scored rows with these numbers those that are nearly a trained one."""
    ours = {text: place for place, text in enumerate(dict.fromkeys(text for each in numbers for text in scored[each]))}
    theirs = {text: place for place, text in enumerate(dict.fromkeys(text for row in trained for text in row))}
    if not ours:
        return
    alike = similarities(list(ours), list(theirs), by_minhash=len(trained) > MOST_ROWS)
    holding: dict[int, list[tuple[int, int]]] = defaultdict(list)  # of a text the rows, and the other text of each
    for number, row in enumerate(trained):
        for text, other in zip(row, reversed(row), strict=True):
            holding[theirs[text]].append((number, theirs[other]))
    for number in numbers:
        nearest = [_nearest(alike, ours[text]) for text in scored[number]]
        found = [
            (min(similarity, nearest[-1][other]), -place)
            for text, similarity in nearest[0].items()
            for place, other in holding[text]
            if other in nearest[-1]
        ]
        if found:
            similarity, place = max(found)
            yield Match(number, -place, round(similarity, 4), exact=False)


def _nearest(alike: sparse.csr_array, place: int) -> dict[int, float]:
    """Of one of our texts the similarities of theirs, by their places."""
    held = slice(alike.indptr[place], alike.indptr[place + 1])
    return dict(zip(alike.indices[held].tolist(), alike.data[held].tolist(), strict=True))


def similarities(ours: Sequence[str], theirs: Sequence[str], *, by_minhash: bool = False) -> sparse.csr_array:
    """The cosines of two lists of texts as sets of five characters, N×M, those below `NEAR` left out.

    Args:
        by_minhash: compare only the texts whose MinHash signatures collide (Broder 1997), of which few near ones are
            missed; for very many texts.
    """
    vectorizer = HashingVectorizer(
        analyzer="char", ngram_range=(_GRAM, _GRAM), lowercase=False, binary=True, norm=None, alternate_sign=False,
        n_features=2**22, dtype=np.float32,
    )  # fmt: skip
    first, second = (sparse.csr_array(vectorizer.transform(texts)) for texts in (ours, theirs))
    sizes, other_sizes = (np.diff(each.indptr).astype(np.float64) for each in (first, second))
    pairs = _minhash_pairs(ours, theirs) if by_minhash else _sized_pairs(first, second)
    places: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float64]] = []
    for rows, others, shared in pairs:
        if shared is None:
            shared = np.asarray(first[rows].multiply(second[others]).sum(axis=1)).ravel()
        cosines = shared / np.sqrt(np.maximum(sizes[rows] * other_sizes[others], 1))
        near = cosines >= NEAR
        places.append(np.stack([rows[near], others[near]]))
        values.append(cosines[near])
    short = {text: place for place, text in enumerate(theirs) if not other_sizes[place]}  # of no run of characters
    same = [(place, short[text]) for place, text in enumerate(ours) if text in short]
    places.append(np.array(same, dtype=np.int64).reshape(-1, 2).T)
    values.append(np.ones(len(same)))
    return sparse.csr_array(
        (np.concatenate(values), tuple(np.concatenate(places, axis=1))), shape=(len(ours), len(theirs))
    )


_Pairs: TypeAlias = Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64] | None]]
"""Places among our texts, among theirs, and how many runs of characters they share; None for not counted yet."""


def _sized_pairs(first: sparse.csr_array, second: sparse.csr_array) -> _Pairs:
    """All texts that share anything, of sizes from which the cosine can be `NEAR`: none is 1/NEAR² of the other's."""
    sizes, other_sizes = (np.diff(each.indptr) for each in (first, second))
    order, other_order = (np.argsort(each, kind="stable") for each in (sizes, other_sizes))
    sorted_sizes = other_sizes[other_order]
    at_once = max(1, min(200, _PRODUCTS_AT_ONCE // max(1, len(other_order))))
    for start in range(0, len(order), at_once):
        chosen = order[start : start + at_once]
        low, high = sizes[chosen[0]] * NEAR**2, sizes[chosen[-1]] / NEAR**2
        window = other_order[
            np.searchsorted(sorted_sizes, low - 1e-6) : np.searchsorted(sorted_sizes, high + 1e-6, side="right")
        ]
        product = sparse.coo_array(first[chosen] @ second[window].T)
        yield chosen[product.row], window[product.col], product.data


def _minhash_pairs(ours: Sequence[str], theirs: Sequence[str]) -> _Pairs:
    """Texts whose MinHash signatures collide; a cosine of 0.8 is a Jaccard index of 0.64 or more."""
    from datasketch import MinHash, MinHashLSH

    def signature(text: str) -> Any:
        found = MinHash(num_perm=128, seed=1)
        found.update_batch({text[start : start + _GRAM].encode() for start in range(len(text) - _GRAM + 1)})
        return found

    index = MinHashLSH(threshold=0.5, num_perm=128)
    with index.insertion_session() as session:
        for place, text in enumerate(theirs):
            if len(text) >= _GRAM:
                session.insert(place, signature(text))
    for place, text in enumerate(ours):
        found = np.array(sorted(index.query(signature(text))) if len(text) >= _GRAM else [], dtype=np.int64)
        yield np.full(len(found), place), found, None


# --- what is told -----------------------------------------------------------------------------------------------------


def _counts(data: Data, split: str, matches: Matches) -> dict[str, int | None]:
    exact = sum(match.exact for match in matches.splits[split])
    near = len(matches.splits[split]) - exact if matches.looked_for_near else None
    return {"rows": len(data.splits[split]), "exact": exact, "near": near}


def _shown(matches: Matches) -> list[tuple[str, Match]]:
    every = [(split, match) for split, found in matches.splits.items() for match in found]
    return sorted(every, key=lambda each: -each[1].similarity)[:_SHOWN]


def _example(data: Data, split: str, match: Match) -> dict[str, Any]:
    labelled = len(data.splits["train"])
    trained_split = "train" if match.trained < labelled else "unlabelled"
    trained_row = match.trained - (0 if trained_split == "train" else labelled)
    return {
        "split": split,
        "row": match.row,
        "text": shown_texts(data, split, match.row),
        "trained_split": trained_split,
        "trained_row": trained_row,
        "trained_text": shown_texts(data, trained_split, trained_row),
        "similarity": match.similarity,
    }


def shown_texts(data: Data, split: str, row: int, longest: int = _LONGEST_SHOWN) -> list[str] | None:
    """Read the texts of one row as a reader is shown them, cut where they are long; None for images.

    Args:
        data: the rows.
        split: the name of the row's split.
        row: its number in the split.
        longest: characters of a text that are kept; an ellipsis follows where more are cut off.
    """
    its = KINDS[data.task.kind]
    if its.reads == "images":
        return None
    values = data.splits[split].select_columns(list(data.task.text))[row]
    texts = (" ".join(values[column]) if its.reads == "words" else values[column] for column in data.task.text)
    return [text if len(text) <= longest else f"{text[:longest]}…" for text in texts]
