import importlib.util
import random

import numpy as np
import pytest

from distill.data.load import DataOptions, load_data
from distill.evaluation import contamination
from distill.evaluation.contamination import (
    NEAR,
    contamination_of,
    find_matches,
    folded,
    match_rows,
    similarities,
)
from distill.tasks import scorers
from tests.conftest import missing, write_rows

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
    "bright",
    "potions",
    "near",
    "cold",
    "rivers",
]


def text(seed, words=12):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def cosine(one, other):
    """Of sets of five characters, by hand."""
    first, second = ({each[start : start + 5] for start in range(len(each) - 4)} for each in (one, other))
    return len(first & second) / np.sqrt(len(first) * len(second)) if first and second else 0.0


def by_hand(scored, trained):
    """For each scored row the greatest similarity to a trained one, over all pairs of rows and both orders."""

    def likeness(one, other):
        return 1.0 if one == other else cosine(one, other)

    def of_rows(one, other):
        orders = [other, other[::-1]]
        return max(min(likeness(*pair) for pair in zip(one, order, strict=True)) for order in orders)

    return [max(of_rows(tuple(map(folded, row)), tuple(map(folded, each))) for each in trained) for row in scored]


def test_the_same_text_is_found_in_other_case_form_and_white_space():
    assert folded("  Die  STRASSE\n\ufb01nal ① ") == "die strasse final 1" == folded("die straße final 1")
    trained = [(text(seed),) for seed in range(5)] + [("Die STRASSE",), ("die straße ",)]
    found = match_rows([(text(3).upper().replace(" ", "\t"),), (text(9),), ("die straße",)], trained)
    assert [(match.row, match.trained, match.exact) for match in found] == [(0, 3, True), (2, 5, True)]


def test_near_texts_are_those_of_a_large_cosine():
    ours, theirs = ([text(seed, words=40) for seed in range(start, start + 30)] for start in (0, 100))
    generator = random.Random(7)
    for place in range(20):  # copies with more and more words replaced
        words = theirs[place].split()
        for _ in range(place):
            words[generator.randrange(40)] = generator.choice(["apple", "banana", "cherry"])
        ours[place] = " ".join(words)
    found = similarities(ours, theirs).toarray()
    expected = np.array([[cosine(one, other) for other in theirs] for one in ours])
    assert found == pytest.approx(np.where(expected >= NEAR, expected, 0), abs=1e-6)
    assert 3 < (found > 0).sum() < 20


@pytest.mark.parametrize("copies", [0, 4])
def test_pairs_are_found_in_both_orders_and_nowhere_else(copies):
    trained = [(text(2 * seed), text(2 * seed + 1)) for seed in range(20)] + [("yes", text(70)), (text(71), text(71))]
    scored = [(text(seed), text(seed + 1)) for seed in range(200, 206)]
    scored += [(trained[each][1], trained[each][0] + " !") for each in range(copies)]
    scored += [
        (trained[5][1].title(), trained[5][0]),  # the same, turned round
        (trained[6][0], trained[7][0]),  # both texts are there, but not together
        (trained[6][0], trained[6][0]),  # so is this one twice
        (text(70) + " dog", "Yes"),  # a text of no five characters
        (text(71) + " fox", text(71)),
    ]
    found = {match.row: match for match in match_rows(scored, trained)}
    expected = by_hand(scored, trained)
    assert sorted(found) == [row for row, similarity in enumerate(expected) if similarity >= NEAR]
    assert all(match.similarity == pytest.approx(expected[row], abs=1e-4) for row, match in found.items())
    at = 6 + copies
    assert [found[row].trained for row in range(6, at)] == list(range(copies))
    assert {row: (found[row].trained, found[row].exact) for row in (at, at + 3, at + 4)} == {
        at: (5, True),
        at + 3: (20, False),
        at + 4: (21, False),
    }
    assert at + 1 not in found
    assert at + 2 not in found
    exact_alone = match_rows(scored, trained, near=False)
    assert [match.row for match in exact_alone] == [row for row in found if found[row].exact]


def test_rows_copied_from_train_into_validation_are_found(tmp_path):
    train = [{"sentence": text(seed), "label": seed % 2} for seed in range(60)]
    copied = [{"sentence": train[each]["sentence"].upper(), "label": 1 - each % 2} for each in range(6)]
    copied += [{"sentence": train[each]["sentence"] + " dog", "label": each % 2} for each in range(10, 14)]
    validation = [{"sentence": text(seed), "label": seed % 2} for seed in range(200, 230)] + copied
    write_rows(tmp_path / "train.jsonl", train)
    write_rows(tmp_path / "validation.jsonl", validation)
    write_rows(tmp_path / "test.jsonl", validation[:5] + copied[:1])
    unlabelled = [{"sentence": validation[0]["sentence"]}, {"sentence": text(999)}]
    options = {"path": str(tmp_path), "unlabelled": str(write_rows(tmp_path / "more.jsonl", unlabelled))}
    data = load_data("sst2", DataOptions(**options))
    matches = find_matches(data)
    labels = np.array(data.labels("validation"))
    score = scorers.accuracy(labels, np.zeros_like(labels))
    found = contamination_of(data, matches, {"zero": score, "of windows": None})
    assert (found.rows, found.exact, found.near) == (40, 7, 4)
    assert found.splits == {
        "validation": {"rows": 40, "exact": 7, "near": 4},
        "test": {"rows": 6, "exact": 2, "near": 0},
    }
    assert found.metrics_without == {"zero": pytest.approx((labels[1:30] == 0).mean()), "of windows": None}
    example = next(each for each in found.examples if each["trained_split"] == "unlabelled")
    assert (example["row"], example["trained_row"], example["similarity"]) == (0, 0, 1.0)
    assert example["text"] == example["trained_text"] == [validation[0]["sentence"]]
    assert len(found.examples) == 10
    assert find_matches(load_data("sst2", DataOptions(path=str(tmp_path / "test.jsonl")), to_score=True)) is None


def test_minhash_finds_what_the_products_find(monkeypatch):
    if importlib.util.find_spec("datasketch") is None:
        missing("datasketch is not installed")
    trained = [(text(seed, words=25),) for seed in range(300)]
    scored = [(trained[each][0] + " and one",) for each in range(0, 40)] + [
        (text(seed, 25),) for seed in range(900, 950)
    ]
    by_products = match_rows(scored, trained)
    assert len(by_products) == 40
    monkeypatch.setattr(contamination, "MOST_ROWS", 100)
    assert match_rows(scored, trained) == by_products


def test_without_minhash_near_rows_of_very_many_are_not_looked_for(monkeypatch, sst2_folder):
    data = load_data("sst2", DataOptions(path=str(sst2_folder)))
    monkeypatch.setattr(contamination, "MOST_ROWS", 10)
    monkeypatch.setattr(contamination, "has_minhash", lambda: False)
    matches = find_matches(data)
    assert not matches.looked_for_near
    found = contamination_of(data, matches, {})
    assert found.near is None
    assert found.splits["validation"]["near"] is None
