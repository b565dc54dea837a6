import evaluate
import numpy as np
import pytest
from scipy import stats

from distill.tasks.base import GLUE, is_better_lower
from distill.tasks.kinds import own_task
from distill.tasks.metrics import compute_metrics, computed
from distill.tasks.rows import F1, METRICS, Accuracy
from distill.tasks.targets import kl_of_classes, kl_of_labels, squared_differences
from distill.tasks.token_classification import tag_scores
from distill.training.config import TrainingConfig

LABELS = np.array([0, 1, 1, 0, 1, 0])
PREDICTED = np.array([0, 1, 0, 0, 1, 1])  # 2 true positives, 1 false positive, 1 false negative, 2 true negatives


def logits_of(classes, num_classes=2):
    return np.eye(num_classes)[classes]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("sst2", {"accuracy": 4 / 6}),
        ("qqp", {"accuracy": 4 / 6, "f1": 2 / 3, "average": (4 / 6 + 2 / 3) / 2}),
        ("cola", {"matthews_correlation": (2 * 2 - 1 * 1) / 9}),
    ],
)
def test_classification_by_hand(task, expected):
    assert compute_metrics(GLUE[task], logits_of(PREDICTED), LABELS) == pytest.approx(expected)


def test_regression_against_its_definition():
    scores, labels = np.array([1.0, 2.5, 2.0, 4.5]), np.array([0.5, 2.0, 3.0, 5.0])
    centred = (scores - scores.mean(), labels - labels.mean())
    pearson = (centred[0] @ centred[1]) / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    ranks = (stats.rankdata(scores), stats.rankdata(labels))
    spearman = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (4 * 15)
    found = compute_metrics(GLUE["stsb"], scores[:, None], labels)
    assert found == pytest.approx({"pearson": pearson, "spearmanr": spearman, "average": (pearson + spearman) / 2})


def test_a_users_own_task_has_macro_f1_and_the_auc_of_two_classes():
    task = own_task("classification", ("text",), "label").with_label_names(("a", "b"))
    margins = np.array([-1.0, 2.0, -0.5, -2.0, 1.0, 0.5])
    found = compute_metrics(task, np.stack([np.zeros(6), margins], 1), LABELS)
    pairs = [(p, n) for p in margins[LABELS == 1] for n in margins[LABELS == 0]]
    assert found["roc_auc"] == pytest.approx(np.mean([p > n for p, n in pairs]))
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    three = own_task("classification", ("text",), "label").with_label_names(("a", "b", "c"))
    assert "roc_auc" not in compute_metrics(three, logits_of(PREDICTED, 3), LABELS)


def test_constant_predictions_have_no_correlation_rather_than_nan():
    assert compute_metrics(GLUE["stsb"], np.ones((4, 1)), np.arange(4.0))["average"] == 0
    assert compute_metrics(GLUE["cola"], logits_of(np.ones(6, int)), LABELS)["matthews_correlation"] == 0


def test_metrics_are_evaluates_and_combine():
    assert all(issubclass(metric, evaluate.Metric) for metric in METRICS.values())
    combined = evaluate.combine([Accuracy(), F1()])
    assert combined.compute(predictions=PREDICTED, references=LABELS) == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3})


def test_divergences_by_hand():
    reference, logits = np.array([[0.0, 0.0], [3.0, 1.0]]), np.array([[np.log(3.0), 0.0], [13.0, 11.0]])
    by_hand = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    found = kl_of_classes(reference, logits)
    np.testing.assert_allclose(found, [by_hand, 0.0], atol=1e-12)
    two_outcomes = kl_of_labels(np.array([[0.0, 5.0]]), np.array([[np.log(3.0), 5.0]]))
    np.testing.assert_allclose(two_outcomes, [by_hand / 2])
    np.testing.assert_allclose(squared_differences(np.array([[1.0], [2.0]]), np.array([[1.5], [2.0]])), [0.25, 0])


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("perplexity", True), ("eval_perplexity", True), ("test_perplexity", True), ("loss", True),
        ("eval_loss", True), ("eval_loss/soft", True), ("accuracy", False), ("eval_entity_f1", False),
    ],
)  # fmt: skip
def test_the_best_checkpoint_is_chosen_by_the_metrics_direction(tmp_path, metric, lower):
    assert is_better_lower(metric) is lower
    assert TrainingConfig(output_dir=str(tmp_path), metric_for_best_model=metric).greater_is_better is not lower
    said = TrainingConfig(output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=lower)
    assert said.greater_is_better is lower


@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression", "token-classification"])
def test_the_keys_that_are_computed_are_known_before(kind):
    task = own_task(kind, ("text",), "label")
    task = task if kind == "regression" else task.with_label_names(("O", "B-a"))
    logits, labels = np.random.default_rng(0).normal(size=(6, 2)), LABELS
    if kind == "multi-label":
        labels = np.eye(2)[LABELS]
    elif kind == "regression":
        logits = logits[:, :1]
    if kind == "token-classification":
        assert set(tag_scores(task, [PREDICTED], [LABELS])) == set(computed(task))
        return
    assert set(compute_metrics(task, logits, labels)) == set(computed(task))
