"""Losses against independent float64 implementations, written from the papers."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from distill import losses


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_soft_loss_is_scaled_kl_over_rows(temperature):
    student, teacher = random(7, 5, seed=1) * 3, random(7, 5, seed=2) * 3
    log_p, log_q = log_softmax(teacher / temperature, axis=1), log_softmax(student / temperature, axis=1)
    expected = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum() / 7
    loss = losses.soft_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_soft_loss_gradient_is_the_difference_of_distributions():
    student, teacher, temperature = random(3, 4, seed=1), random(3, 4, seed=2), 2.0
    logits = torch.tensor(student, requires_grad=True)
    losses.soft_loss(logits, torch.tensor(teacher), temperature).backward()
    softmax = lambda x: np.exp(log_softmax(x / temperature, axis=1))  # noqa: E731
    expected = temperature * (softmax(student) - softmax(teacher)) / 3  # Hinton et al. 2015, equation 2, times T²
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_soft_loss_of_scores_is_squared_error_and_not_zero():
    student, teacher = random(6, 1, seed=1), random(6, 1, seed=2)
    loss = losses.soft_loss(torch.tensor(student), torch.tensor(teacher), temperature=4.0)
    assert loss.item() == pytest.approx(((student - teacher) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_loss_is_smoothed_cross_entropy(smoothing):
    logits, labels = random(6, 3), np.array([0, 2, 1, 1, 0, 2])
    targets = np.eye(3)[labels] * (1 - smoothing) + smoothing / 3
    expected = -(targets * log_softmax(logits, axis=1)).sum() / 6
    loss = losses.hard_loss(torch.tensor(logits), torch.tensor(labels), smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_hard_loss_of_scores_is_squared_error():
    logits, labels = random(6, 1), random(6, seed=1)
    loss = losses.hard_loss(torch.tensor(logits), torch.tensor(labels))
    assert loss.item() == pytest.approx(((logits[:, 0] - labels) ** 2).mean(), rel=1e-5)


def test_hidden_loss_counts_valid_tokens_only():
    student, teacher = [random(2, 4, 3, seed=s) for s in (1, 2)], [random(2, 4, 3, seed=s) for s in (3, 4)]
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    per_layer = [(((s - t) ** 2).mean(-1) * mask).sum() / mask.sum() for s, t in zip(student, teacher, strict=True)]
    as_tensors = lambda arrays: [torch.tensor(array) for array in arrays]  # noqa: E731
    loss = losses.hidden_loss(as_tensors(student), as_tensors(teacher), torch.tensor(mask))
    assert loss.item() == pytest.approx(np.mean(per_layer), rel=1e-5)


def test_hidden_loss_ignores_what_stands_in_padding():
    student, teacher = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    clean = losses.hidden_loss([student], [teacher], mask)
    student[:, 2:], teacher[:, 2:] = torch.nan, torch.inf
    assert losses.hidden_loss([student], [teacher], mask) == clean


def test_hidden_loss_of_an_empty_mask_is_zero_with_a_gradient():
    student = torch.randn(1, 4, 3, requires_grad=True)
    loss = losses.hidden_loss([student], [torch.randn(1, 4, 3)], torch.zeros(1, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_equal_models_lose_nothing():
    logits, hidden = torch.randn(4, 3), torch.randn(4, 5, 8)
    assert losses.soft_loss(logits, logits, 2.0).item() == 0
    assert losses.hidden_loss([hidden], [hidden], torch.ones(4, 5)).item() == 0


@pytest.mark.parametrize("loss", [losses.soft_loss, losses.hard_loss])
def test_parts_add_up_to_the_whole_by_count(loss):
    student, targets = torch.randn(8, 3), torch.randn(8, 3)
    targets = targets if loss is losses.soft_loss else targets.argmax(1)
    option = 2.0 if loss is losses.soft_loss else 0.1  # temperature, or smoothing
    parts = [loss(student[rows], targets[rows], option, torch.tensor(8)) for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(parts), loss(student, targets, option))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_half_precision_logits_stay_finite(dtype):
    student = torch.tensor([[6e4, -6e4, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-6e4, 6e4, 0.0]], dtype=dtype)
    loss = losses.soft_loss(student, teacher, 1.0) + losses.hard_loss(student, torch.tensor([1]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
