"""Weighted metrics against scikit-learn's and scipy's of the rows that the weights stand for."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from distill.tasks import scorers


def correlation(of, first, second):
    return 0.0 if np.ptp(first) == 0 or np.ptp(second) == 0 else of(first, second).statistic


REFERENCES = {
    "accuracy": (scorers.accuracy, "classes", sk.accuracy_score),
    "accuracy of sets": (scorers.accuracy, "sets", sk.accuracy_score),
    "f1": (scorers.f1_of_ones, "two", lambda y, p: sk.f1_score(y, p, zero_division=0)),
    "f1_micro": (scorers.f1_of_ones, "sets", lambda y, p: sk.f1_score(y, p, average="micro", zero_division=0)),
    "matthews": (scorers.matthews, "classes", sk.matthews_corrcoef),
    "pearson": (scorers.pearson, "scores", lambda y, p: correlation(stats.pearsonr, y, p)),
    "spearman": (scorers.spearman, "scores", lambda y, p: correlation(stats.spearmanr, y, p)),
}


@pytest.mark.parametrize("size", [2, 5, 120])
@pytest.mark.parametrize("name", REFERENCES)
def test_a_weight_is_how_often_a_row_counts(name, size):
    scorer, kind, reference = REFERENCES[name]
    generator = np.random.default_rng(size)
    draw = {
        "classes": lambda: generator.integers(3, size=size),
        "two": lambda: generator.integers(2, size=size),
        "sets": lambda: generator.integers(2, size=(size, 4)),
        "scores": lambda: generator.normal(size=size).round(1),  # with ties
    }[kind]
    truth, found = draw(), draw()
    rows = generator.integers(size, size=(20, size))
    weights = np.stack([np.bincount(each, minlength=size) for each in rows]).astype(float)
    expected = [reference(truth[each], found[each]) for each in rows]
    np.testing.assert_allclose(scorer(truth, found)(weights), expected, atol=1e-9)
    assert scorers.whole(scorer(truth, found), size) == pytest.approx(reference(truth, found), abs=1e-9)


def test_what_has_nothing_to_divide_by_is_zero():
    assert scorers.whole(scorers.ratio([0, 0], [0, 0]), 2) == 0
    assert scorers.whole(scorers.pearson(np.full(3, 0.1), np.arange(3)), 3) == 0
