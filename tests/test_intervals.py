import numpy as np
import pytest

from distill.intervals import divergence_from, score_interval, won_back
from distill.tasks import GLUE


@pytest.mark.parametrize(("right", "rows"), [(50, 50), (0, 50), (43, 50), (1, 1)])
def test_accuracys_interval_is_wilsons(right, rows):
    labels = np.ones(rows, dtype=int)
    predictions = (np.arange(rows) < right).astype(int)
    z, share = 1.959963984540054, right / rows
    centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    reach = z / (1 + z**2 / rows) * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    low, high = score_interval(GLUE["sst2"], predictions, labels)
    assert (low, high) == pytest.approx((centre - reach, centre + reach), abs=1e-9)
    assert low < high  # a perfect score is no certainty
    assert low <= share <= high + 1e-12


def test_other_metrics_keep_the_bootstrap():
    generator = np.random.default_rng(1)
    labels = generator.normal(size=60)
    scores = labels + generator.normal(size=60)
    low, high = score_interval(GLUE["stsb"], scores, labels)
    fisher = np.arctanh(np.corrcoef(labels, scores)[0, 1]) + np.array([-1.96, 1.96]) / np.sqrt(57)
    assert (low, high) == pytest.approx(tuple(np.tanh(fisher)), abs=0.07)


def test_what_is_won_back_is_the_part_of_the_divergence_that_is_gone():
    generator = np.random.default_rng(2)
    reference = generator.normal(size=(200, 1))
    errors = generator.normal(size=(200, 1))
    task = GLUE["stsb"]
    share, (low, high) = won_back(task, reference, reference + errors, reference + errors / 2)
    assert (share, low, high) == pytest.approx((0.75, 0.75, 0.75))  # the squared error of every row is a quarter
    other = errors * generator.uniform(0, 2, size=(200, 1))
    share, (low, high) = won_back(task, reference, reference + errors, reference + other)
    assert share == pytest.approx(1 - np.square(other).sum() / np.square(errors).sum())
    means = [divergence_from(task, reference, reference + each)["mean"] for each in (errors, other)]
    assert share == pytest.approx(1 - means[1] / means[0])
    assert low < share < high < 0  # 4/3 of the divergence in the mean
    assert won_back(task, reference, reference, reference + errors) is None
