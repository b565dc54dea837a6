import numpy as np
import pytest

from distill.evaluation.intervals import (
    agreement,
    divergence_from,
    paired_difference,
    score_interval,
    won_back,
)
from distill.tasks.base import GLUE
from distill.tasks.kinds import KINDS, own_task
from distill.tasks.metrics import compute_metrics


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


def test_the_bootstrap_of_a_mean_is_that_of_the_normal_distribution():
    task = own_task("question-answering", ("question", "context"), "answers")
    answers = ["good"] * 700 + ["bad"] * 300
    accepted = [{"text": ["good"], "answer_start": [0]}] * 1000
    error = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert score_interval(task, answers, accepted) == pytest.approx((0.7 - error, 0.7 + error), abs=0.05 * error)
    others = ["good"] * 600 + ["bad"] * 400
    difference, (low, high) = paired_difference(task, answers, others, accepted)
    error = 1.96 * np.sqrt(0.1 * 0.9 / 1000)  # a tenth of the rows differ, and all in one direction
    assert (difference, low, high) == pytest.approx((0.1, 0.1 - error, 0.1 + error), abs=0.05 * error)


def test_resamples_do_not_hang_on_what_is_held_at_once(monkeypatch):
    generator = np.random.default_rng(3)
    labels, found = generator.integers(2, size=(2, 50))
    together = score_interval(GLUE["qqp"], found, labels)
    monkeypatch.setattr("distill.evaluation.intervals._DRAWN_AT_ONCE", 1000)
    assert score_interval(GLUE["qqp"], found, labels) == together


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb"])
@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_a_metric_lies_in_its_own_interval(name, rows):
    task, generator = GLUE[name], np.random.default_rng(rows)
    labels = generator.normal(size=rows) if name == "stsb" else generator.integers(2, size=rows)
    for logits in (generator.normal(size=(rows, 2)), np.eye(2)[labels.astype(int) % 2]):
        logits = logits[:, :1] if name == "stsb" else logits
        low, high = score_interval(task, KINDS[task.kind].predict(logits), labels)
        assert low <= compute_metrics(task, logits, labels)[task.primary_metric] <= high


def test_rows_without_a_difference_are_left_out_of_what_is_won_back():
    reference, before = np.zeros((4, 1)), np.array([[1.0], [0.0], [0.0], [0.0]])
    assert won_back(GLUE["stsb"], reference, before, before / 2) == (0.75, [0.75, 0.75])  # no warning, no NaN


def test_words_that_no_model_read_are_no_agreement():
    task = own_task("token-classification", ("tokens",), "label").with_label_names(("O", "B-a"))
    assert agreement(task, [[0, 1, -100], [1, -100]], [[0, 0, -100], [1, 0]]) == 2 / 4
