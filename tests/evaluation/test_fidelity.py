import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from distill.evaluation.fidelity import (
    brier_scores,
    calibration_error,
    calibration_of,
    fit_temperature,
    flips,
    holm,
    mcnemar,
    negative_log_likelihoods,
    reliability_bins,
)
from distill.tasks import scorers
from distill.tasks.base import GLUE
from distill.tasks.kinds import KINDS, own_task


def drawn(rows, classes, *, temperature=1.0, seed=0):
    """Logits B×1×C whose softmax, once divided by the temperature, is what the outcomes B×1 are drawn from."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(rows, 1, classes))
    chances = softmax(logits, axis=-1)[:, 0]
    truth = (chances.cumsum(1) > generator.random((rows, 1))).argmax(1)
    return temperature * logits, truth[:, None]


def test_flips_by_hand():
    right = np.array([1, 1, 1, 0, 0, 0, 0, 1], dtype=bool)
    baseline = np.array([1, 0, 1, 1, 1, 1, 0, 1], dtype=bool)
    classes = {"a": np.arange(8) < 4, "b": np.arange(8) >= 4}
    found = flips(right, baseline, classes)
    assert (found.gained, found.lost) == (1, 3)
    assert found.p == pytest.approx(2 * (1 + 4) / 16)  # of four tosses at most one head, on either side
    assert found.classes == {"a": {"gained": 1, "lost": 1, "p": 1.0}, "b": {"gained": 0, "lost": 2, "p": 1.0}}
    assert flips(right, right).p == 1.0


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 9), (3, 12), (7, 7), (40, 20)])
def test_mcnemar_is_the_binomial_test(gained, lost):
    either = min(gained, lost)
    by_sum = min(1.0, 2 * stats.binom.cdf(either, gained + lost, 0.5)) if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(by_sum)


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04, times 4 3 2 1, and never less than the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_calibration_error_by_hand():
    shares = np.array([0.6, 0.7, 0.8, 0.9])  # of the first of two outcomes
    logits = np.log(np.stack([shares, 1 - shares], axis=-1))[:, None, :]
    truth = np.array([0, 1, 0, 0])[:, None]
    error = scorers.whole(calibration_error(logits, truth, bins=2), 4)
    assert error == pytest.approx((abs(1 - (0.6 + 0.7)) + abs(2 - (0.8 + 0.9))) / 4)  # right − confident, of both bins
    weights = np.array([[0.0, 2, 1, 1]])  # the bins stay in a resample
    assert calibration_error(logits, truth, bins=2)(weights) == pytest.approx((1.4 + 0.3) / 4)
    found = reliability_bins(logits, truth, bins=2)
    assert np.array(found) == pytest.approx(np.array([[0.65, 0.5, 2], [0.85, 1.0, 2]]))
    assert len(reliability_bins(logits, truth)) == 4  # empty ones are left out


def test_the_calibration_error_is_that_of_scikit_learns_quantile_bins():
    logits, truth = drawn(3000, 4, temperature=1.7)
    chances = softmax(logits[:, 0], axis=-1)
    right = chances.argmax(1) == truth[:, 0]
    shares, confidences = calibration_curve(right, chances.max(1), n_bins=15, strategy="quantile")
    error = scorers.whole(calibration_error(logits, truth), 3000)  # 200 rows in each bin
    assert error == pytest.approx(np.abs(shares - confidences).mean())
    expected = np.stack([confidences, shares, np.full(15, 200)], axis=1)
    assert np.array(reliability_bins(logits, truth)) == pytest.approx(expected)
    assert calibration_of(logits, truth).bins == reliability_bins(logits, truth)


@pytest.mark.parametrize("classes", [2, 5])
def test_brier_and_likelihood_are_scikit_learns(classes):
    logits, truth = drawn(500, classes)
    chances = softmax(logits[:, 0], axis=-1)
    expected = brier_score_loss(
        truth[:, 0], chances if classes > 2 else chances[:, 1], labels=range(classes), scale_by_half=False
    )
    assert brier_scores(logits, truth).mean() == pytest.approx(expected)
    assert negative_log_likelihoods(logits, truth).mean() == pytest.approx(log_loss(truth[:, 0], chances))


def test_sets_of_labels_are_scored_label_by_label():
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(50, 3)), generator.integers(2, size=(50, 3))
    of_labels, truth = KINDS["multi-label"].outcomes(logits, labels)
    by_label = [log_loss(labels[:, each], expit(logits[:, each])) for each in range(3)]
    assert negative_log_likelihoods(of_labels, truth).mean() == pytest.approx(np.mean(by_label))
    by_label = [brier_score_loss(labels[:, each], expit(logits[:, each]), scale_by_half=False) for each in range(3)]
    assert brier_scores(of_labels, truth).mean() == pytest.approx(np.mean(by_label))
    error = calibration_error(of_labels, truth, bins=1)
    confidence, right = np.maximum(expit(logits), 1 - expit(logits)), (logits > 0) == (labels == 1)
    assert scorers.whole(error, 50) == pytest.approx(abs(right.mean() - confidence.mean()))


def test_the_temperature_of_two_classes_is_a_logistic_regressions():
    logits, truth = drawn(2000, 2, temperature=3.0)
    margin = (logits[:, 0, 1] - logits[:, 0, 0])[:, None]
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8).fit(margin, truth[:, 0])
    assert fit_temperature(logits, truth) == pytest.approx(1 / fitted.coef_[0, 0], rel=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_miscalibrated_model_is_found_and_mended(temperature):
    found = calibration_of(*drawn(2000, 3, temperature=temperature))
    assert found.temperature == pytest.approx(temperature, rel=0.15)
    assert found.held_out["nll_gain_low"] > 0
    assert found.held_out["ece_mended"] < 0.6 * found.held_out["ece"]
    assert found.interval[0] <= found.ece <= found.interval[1]
    fine = calibration_of(*drawn(2000, 3))
    assert fine.temperature == pytest.approx(1, rel=0.15)
    assert fine.held_out["nll_gain_low"] < 0
    assert fine.ece < found.interval[0]


def test_a_calibrated_model_is_rarely_called_miscalibrated():
    found = [calibration_of(*drawn(400, 3, seed=seed)).held_out["nll_gain_low"] > 0 for seed in range(40)]
    assert np.mean(found) <= 0.075  # one-sided at 2.5 %


def test_few_rows_and_certain_models():
    one = calibration_of(np.array([[[1.0, 0.0]]]), np.array([[0]]))
    assert one.temperature is None
    assert one.held_out is None
    sure = calibration_of(np.tile([[[1.0, 0.0]]], (20, 1, 1)), np.zeros((20, 1), dtype=int))
    assert 0.01 <= sure.temperature < 0.05  # all right: as sure as it gets


def test_what_is_right_of_each_kind():
    task = own_task("multi-label", ("text",), "label").with_label_names(("a", "b"))
    kind = KINDS["multi-label"]
    truth, found = [[1, 0], [1, 1], [0, 0]], [[1, 0], [1, 0], [0, 0]]
    assert kind.row_metric.of_rows(task, found, truth).tolist() == [True, False, True]
    assert {name: rows.tolist() for name, rows in kind.classes(task, truth).items()} == {
        "a": [True, True, False],
        "b": [False, True, False],
    }
    assert [kind.in_words(task, each) for each in truth] == [["a"], ["a", "b"], []]
    kind, task = KINDS["token-classification"], own_task("token-classification", ("words",), "tags")
    task = task.with_label_names(("O", "B-x"))
    truth, found = [[0, 1], [0, -100], [1, 0]], [[0, 1], [0, 1], [1, -100]]
    assert kind.row_metric.of_rows(task, found, truth).tolist() == [True, True, False]  # a word was not read
    assert {name: rows.tolist() for name, rows in kind.classes(task, truth).items()} == {
        "O": [True, True, True],
        "B-x": [True, False, True],
    }
    assert kind.in_words(task, found[2]) == ["B-x", None]
    kind, task = KINDS["question-answering"], own_task("question-answering", ("question", "context"), "answers")
    truth = [{"text": ["The hive"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    assert kind.row_metric.of_rows(task, ["hive", "bees"], truth).tolist() == [True, False]
    assert kind.in_words(task, truth[0]) == ["The hive"]
    assert KINDS["regression"].row_metric.of_rows(GLUE["stsb"], [1.0, 2.0], [1.5, 2.0]).tolist() == [0.25, 0.0]
    kind = KINDS["classification"]
    assert kind.in_words(GLUE["sst2"], 1) == "positive"
    assert {name: rows.tolist() for name, rows in kind.classes(GLUE["sst2"], [1, 0, 1]).items()} == {
        "negative": [False, True, False],
        "positive": [True, False, True],
    }
    assert KINDS["masked-lm"].row_metric is None
