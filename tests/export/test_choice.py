"""What computes in 8 bit, by what each layer costs alone."""

import math

import numpy as np
import pytest

from distill import InputError
from distill.export.choice import Closeness, Limits, choose_layers, closeness
from distill.tasks.kinds import KINDS

COSTS = {"a": 1.0, "b": 8.0, "c": 2.0, "d": 5.0}


def measure(chosen):
    cost = sum(COSTS[name] for name in chosen)
    return Closeness(1 - cost / 1000, cost / 1000)


@pytest.mark.parametrize(("most", "chosen"), [(16, "abcd"), (15, "acd"), (8, "acd"), (7, "ac"), (2, "a"), (0.5, "")])
def test_as_few_layers_as_possible_stay_in_float_and_those_that_hurt_most(most, chosen):
    names, found = choose_layers(list(COSTS), measure, Limits(0.9, most / 1000))
    assert "".join(names) == chosen
    assert found == measure(chosen)


def test_all_layers_are_tried_once_where_the_limits_hold_at_once():
    calls = []
    choose_layers(["a", "b"], lambda chosen: calls.append(list(chosen)) or Closeness(1.0, 0.0), Limits(1.0, 0.0))
    assert calls == [["a", "b"]]


def test_limits_that_no_choice_reaches_are_told():
    with pytest.raises(InputError, match=r"agreement: 0\.99 with a divergence of 0\.1 is not reached with any layer"):
        choose_layers(["a"], lambda chosen: Closeness(0.9, 0.0), Limits(0.99, 0.1))


def test_closeness_is_the_share_of_equal_predictions_and_the_mean_kl():
    reference, logits = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[math.log(3), 0.0], [0.0, 2.0]])
    found = closeness(KINDS["classification"].targets, reference, logits)
    p, q = np.exp([1, 0]) / (np.e + 1), np.exp([0, 2]) / (1 + np.e**2)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found.agreement == 0.5
    assert found.divergence == pytest.approx((first + float((p * np.log(p / q)).sum())) / 2)


def test_closeness_of_label_sets_counts_labels_and_of_values_their_variance():
    found = closeness(
        KINDS["multi-label"].targets, np.array([[1.0, -1.0, 1.0, -1.0]]), np.array([[2.0, 1.0, 1.0, -3.0]])
    )
    assert found.agreement == 0.75
    found = closeness(KINDS["regression"].targets, np.array([[-2.0], [2.0]]), np.array([[-1.0], [2.0]]))
    assert found.divergence == 0.5
    assert found.agreement == 1 - 0.5 / 4
