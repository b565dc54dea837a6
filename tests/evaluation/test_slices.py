from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from distill.evaluation.fidelity import holm
from distill.evaluation.slices import by_value, chance_of_loss, compare_slices, quarters, shares_of_rare


def mask(rows, chosen):
    return np.isin(np.arange(rows), chosen)


def of_groups(labels):
    return {str(label): labels == label for label in np.unique(labels)}


@pytest.mark.parametrize("size", [2, 4, 7])
def test_the_chance_is_that_of_all_choices_of_rows(size):
    loss = np.array([1, 1, 1, -1, 0, 0, 0, 0, -1, 0.0])
    chosen = mask(10, range(size))
    sums = np.array([loss[list(rows)].sum() for rows in combinations(range(10), size)])
    assert chance_of_loss(loss, chosen) == pytest.approx((sums >= loss[chosen].sum()).mean())


def test_the_chance_without_gains_is_fishers_exact_test():
    loss = mask(200, range(30)).astype(float)
    chosen = mask(200, [*range(20), *range(100, 130)])
    table = [[20, 30], [10, 140]]
    assert chance_of_loss(loss, chosen) == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue)


def test_a_model_made_worse_on_one_slice_is_found_and_no_other_slice():
    generator = np.random.default_rng(0)
    topic, length = generator.integers(5, size=1000), generator.integers(4, size=1000)
    baseline = generator.random(1000) < 0.9
    noise = generator.random(1000) < 0.03
    student = np.where(noise, ~baseline, baseline)
    worse = student & ~((topic == 2) & (generator.random(1000) < 0.2))
    groups = {"topic": of_groups(topic), "length": of_groups(length)}
    models = {"teacher": baseline, "student": student, "worse": worse}
    found = compare_slices(groups, models, metric="accuracy", baseline="teacher")
    assert len(found) == 9
    named = [(each.by, each.slice, model) for each in found for model, p in each.p.items() if p < 0.05]
    assert named == [("topic", "2", "worse")]
    two = found[2]
    assert two.rows == (topic == 2).sum()
    assert two.metrics["worse"] == pytest.approx(worse[topic == 2].mean())
    assert two.intervals["worse"][1] < two.intervals["teacher"][0]
    interval = stats.binomtest(int(worse[topic == 2].sum()), two.rows).proportion_ci(method="wilson")
    assert two.intervals["worse"] == pytest.approx([interval.low, interval.high])
    everywhere = baseline & (generator.random(1000) < 0.8)  # worse, but nowhere more than elsewhere
    found = compare_slices(groups, {"teacher": baseline, "weak": everywhere}, metric="accuracy", baseline="teacher")
    assert min(p for each in found for p in each.p.values()) > 0.05


def test_scores_that_are_numbers_are_compared_by_their_ranks():
    generator = np.random.default_rng(1)
    topic = generator.integers(3, size=300)
    baseline = generator.gamma(1, size=300)
    student = baseline + np.abs(generator.normal(size=300)) * np.where(topic == 1, 1.0, 0.2)
    models = {"teacher": baseline, "student": student}
    found = compare_slices({"topic": of_groups(topic)}, models, metric="squared_error", baseline="teacher")
    loss = student - baseline
    raw = [
        stats.mannwhitneyu(loss[topic == each], loss[topic != each], alternative="greater").pvalue for each in (0, 1)
    ]
    assert [each.p["student"] < 0.05 for each in found] == [False, True, False]
    assert found[1].p["student"] == pytest.approx(3 * raw[1])
    low, high = found[1].intervals["student"]
    values = student[topic == 1]
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), rel=0.05)


@pytest.mark.parametrize("of_numbers", [False, True])
def test_random_slices_report_no_more_than_chance(of_numbers):
    """200 random slicings, each of four columns of five values: at most 8 % report a finding at the 5 % level."""
    generator, reported = np.random.default_rng(2), 0
    for _ in range(200):
        baseline = generator.random(600) < 0.9
        student = np.where(generator.random(600) < 0.08, ~baseline, baseline) & (generator.random(600) < 0.97)
        loss = generator.standard_t(3, size=600) if of_numbers else baseline.astype(float) - student
        columns = [generator.integers(5, size=600) for _ in range(4)]
        p_values = [chance_of_loss(loss, rows) for column in columns for rows in of_groups(column).values()]
        reported += min(holm(p_values)) < 0.05
    assert reported <= 16


def test_small_slices_and_whole_ones_are_left_out():
    rows = np.arange(100)
    groups = {"column": {"small": rows < 29, "fits": rows < 30, "all": rows >= 0}}
    found = compare_slices(groups, {"student": rows % 2 == 0}, metric="accuracy", baseline=None)
    assert [(each.slice, each.rows, each.p) for each in found] == [("fits", 30, {})]
    assert compare_slices({}, {"student": rows % 2 == 0}, metric="accuracy", baseline="student") == []


def test_rows_are_grouped_by_numbers_and_values():
    found = quarters([1, 1, 1, 1, 1, 2, 3, 4], "{:g}".format)
    assert {name: rows.sum() for name, rows in found.items()} == {"1": 5, "2": 1, "3 to 4": 2}
    found = by_value(["b", "a", "b", None, 3])
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "b": [True, False, True, False, False],
        "a": [False, True, False, False, False],
        "none": [False, False, False, True, False],
        "3": [False, False, False, False, True],
    }
    assert list(by_value([str(number) for number in range(100)])) == ["0 to 24", "25 to 49", "50 to 74", "75 to 99"]
    assert len(by_value([f"id-{number}" for number in range(100)])) == 20


def test_rare_tokens_are_those_that_training_rows_hold_seldom():
    trained = np.array([100, 5, 4, 0])
    rows = [np.array([0, 1, 2, 3]), np.array([0, 0]), np.array([7]), np.array([], dtype=int)]
    assert shares_of_rare(rows, trained).tolist() == [0.5, 0.0, 1.0, 0.0]
