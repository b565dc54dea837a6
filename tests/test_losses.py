"""Losses against independent float64 implementations, written from the papers."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax

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
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    expected = temperature * (q - p) / 3  # Hinton et al. 2015, equation 2, times T²
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_other_divergences(divergence):
    student, teacher, temperature = random(7, 5, seed=1) * 3, random(7, 5, seed=2) * 3, 2.0
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    kl = lambda a, b: (a * np.log(a / b)).sum() / 7  # noqa: E731
    expected = kl(q, p) if divergence == "reverse_kl" else (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    loss = losses.soft_loss(torch.tensor(student), torch.tensor(teacher), temperature, divergence=divergence)
    assert loss.item() == pytest.approx(temperature**2 * expected, rel=1e-5)


def test_logit_loss_is_squared_error_without_a_temperature():
    student, teacher = random(6, 3, seed=1), random(6, 3, seed=2)
    loss = losses.logit_loss(torch.tensor(student), torch.tensor(teacher))
    assert loss.item() == pytest.approx(((student - teacher) ** 2).mean(), rel=1e-5)


def test_decoupled_loss_with_known_and_unknown_targets():
    student, teacher, temperature = random(4, 5, seed=1) * 3, random(4, 5, seed=2) * 3, 2.0
    targets = np.array([0, 3, -100, 4])
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    total = 0.0
    for row, target in enumerate(np.where(targets < 0, teacher.argmax(1), targets)):
        rest = np.arange(5) != target
        binary = [np.array([x[row, target], x[row, rest].sum()]) for x in (p, q)]
        among = [x[row, rest] / x[row, rest].sum() for x in (p, q)]
        total += 0.7 * (binary[0] * np.log(binary[0] / binary[1])).sum()
        total += 3.0 * (among[0] * np.log(among[0] / among[1])).sum()
    loss = losses.decoupled_loss(
        torch.tensor(student), torch.tensor(teacher), torch.tensor(targets), temperature, alpha=0.7, beta=3.0
    )
    assert loss.item() == pytest.approx(temperature**2 * total / 4, rel=1e-5)


def test_decoupled_loss_with_the_classical_weights_is_kl():
    """With α = 1 and β = 1 − p_target of the teacher it is Hinton's loss (Zhao et al. 2022, equation 6)."""
    student, teacher = torch.tensor(random(1, 5, seed=1)), torch.tensor(random(1, 5, seed=2))
    beta = 1 - (teacher / 2).softmax(-1)[0, 3].item()
    decoupled = losses.decoupled_loss(student, teacher, torch.tensor([3]), 2.0, alpha=1.0, beta=beta)
    torch.testing.assert_close(decoupled, losses.soft_loss(student, teacher, 2.0))


def test_label_sets_are_distributions_of_their_own():
    student, teacher, temperature = random(4, 3, seed=1) * 3, random(4, 3, seed=2) * 3, 2.0
    p, q = expit(teacher / temperature), expit(student / temperature)
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    as_pairs = [losses.per_label(torch.tensor(logits)) for logits in (student, teacher)]
    assert losses.soft_loss(*as_pairs, temperature).item() == pytest.approx(temperature**2 * expected, rel=1e-5)


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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_loss_with_class_weights_and_rows_without_a_label(smoothing):
    logits, labels, weights = random(6, 3), np.array([0, -100, 1, 1, -100, 2]), np.array([1.0, 2.0, 0.5])
    known = labels >= 0
    targets = np.eye(3)[labels[known]] * (1 - smoothing) + smoothing / 3
    entropies = -(targets * weights * log_softmax(logits[known], axis=1)).sum()
    loss = losses.hard_loss(
        torch.tensor(logits), torch.tensor(labels), smoothing, class_weights=torch.tensor(weights, dtype=torch.float32)
    )
    assert loss.item() == pytest.approx(entropies / weights[labels[known]].sum(), rel=1e-5)
    if not smoothing:
        torchs = torch.nn.functional.cross_entropy(*map(torch.tensor, (logits, labels, weights)))
        assert loss.item() == pytest.approx(torchs.item(), rel=1e-5)


def test_hard_loss_of_label_sets_is_binary_cross_entropy():
    logits, labels = random(4, 3), np.array([[0, 1, 1], [1, 0, 0], [np.nan] * 3, [0, 0, 0]])
    known = ~np.isnan(labels).any(1)
    p = expit(logits[known])
    expected = -(labels[known] * np.log(p) + (1 - labels[known]) * np.log(1 - p)).mean()
    assert losses.hard_loss(torch.tensor(logits), torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", [[-100, -100], [float("nan")] * 2])
def test_hard_loss_without_any_label_is_zero_with_a_gradient(labels):
    outputs = 3 if labels[0] == -100 else 1
    logits = torch.randn(2, outputs, requires_grad=True)
    loss = losses.hard_loss(logits, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, outputs))


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


def masks():
    return {
        "some padding": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "none": torch.ones(2, 4, dtype=torch.int64),
        "an empty row": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]),
    }


def as_tensors(arrays):
    return [torch.tensor(array) for array in arrays]


@pytest.mark.parametrize("mask", masks())
def test_cosine_loss(mask):
    mask = masks()[mask].numpy()
    student, teacher = [random(2, 4, 3, seed=s) for s in (1, 2)], [random(2, 4, 3, seed=s) for s in (3, 4)]
    cosines = [
        (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
        for s, t in zip(student, teacher, strict=True)
    ]
    expected = np.mean([((1 - cosine) * mask).sum() / mask.sum() for cosine in cosines])
    loss = losses.cosine_loss(as_tensors(student), as_tensors(teacher), torch.tensor(mask))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_pkd_loss_is_the_squared_distance_of_normalised_first_states():
    student, teacher = [random(3, 4, 5, seed=s) for s in (1, 2)], [random(3, 4, 5, seed=s) for s in (3, 4)]
    unit = lambda x: x[:2, 0] / np.linalg.norm(x[:2, 0], axis=-1, keepdims=True)  # noqa: E731
    expected = np.mean([((unit(s) - unit(t)) ** 2).sum() / 2 for s, t in zip(student, teacher, strict=True)])
    loss = losses.pkd_loss(as_tensors(student), as_tensors(teacher), torch.tensor([1, 1, 0]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def attention_maps(mask, seed):
    """Probabilities over the valid keys, B×H×T×T."""
    scores = random(2, 3, 4, 4, seed=seed) + np.where(mask, 0.0, -1e30)[:, None, None, :]
    return softmax(scores, axis=-1)


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize("mask", ["some padding", "none"])
def test_attention_loss(distance, mask):
    mask = masks()[mask].numpy()
    student, teacher = ([attention_maps(mask, seed) for seed in seeds] for seeds in ((1, 2), (3, 4)))
    expected = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for row, head, query in np.ndindex(2, 3, 4):
            if mask[row, query]:
                p, q = (maps[row, head, query][mask[row] == 1] for maps in (t, s))
                total += ((p - q) ** 2).mean() if distance == "mse" else (p * np.log(p / q)).sum()
        expected.append(total / 3 / mask.sum())
    loss = losses.attention_loss(as_tensors(student), as_tensors(teacher), torch.tensor(mask), distance=distance)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("mask", ["some padding", "none"])
def test_relation_loss_between_widths_and_head_counts(mask):
    mask = masks()[mask].numpy()
    student, teacher = [random(2, 4, 6, seed=s) for s in (1, 2, 3)], [random(2, 4, 12, seed=s) for s in (4, 5, 6)]

    def relation(states, row, head):
        width = states.shape[-1] // 2
        part = states[row][mask[row] == 1][:, head * width : (head + 1) * width]
        return softmax(part @ part.T / np.sqrt(width), axis=-1)

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for row, head in np.ndindex(2, 2):
            p, q = relation(t, row, head), relation(s, row, head)
            total += (p * np.log(p / q)).sum() / 2 / mask.sum()
    loss = losses.relation_loss([as_tensors(student)], [as_tensors(teacher)], torch.tensor(mask), num_heads=2)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


def test_contrastive_loss_against_fixed_negatives():
    student, teacher, negatives = random(3, 5, seed=1), random(3, 5, seed=2), random(7, 5, seed=3)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    own = (unit(student) * unit(teacher)).sum(-1) / 0.2
    against = unit(student) @ unit(negatives).T / 0.2
    expected = -(own - np.log(np.exp(own) + np.exp(against).sum(-1))).mean()
    loss = losses.contrastive_loss(*as_tensors([student, teacher, negatives]), 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    with_itself = np.concatenate([negatives, teacher[:1]])  # a row among the negatives is none for itself
    loss = losses.contrastive_loss(*as_tensors([student[:1], teacher[:1], with_itself]), 0.2)
    alone = losses.contrastive_loss(*as_tensors([student[:1], teacher[:1], negatives]), 0.2)
    torch.testing.assert_close(loss, alone)


def token_losses():
    """Each loss over tokens as a function of (student's and teacher's states B×T×6, mask)."""

    def maps(states, mask):  # B×1×T×T, padding attended to by nobody
        return states[:, None, :, :4].masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)

    return {
        "hidden": lambda s, t, mask, count=None: losses.hidden_loss([s], [t], mask, count),
        "cosine": lambda s, t, mask, count=None: losses.cosine_loss([s], [t], mask, count),
        "attention mse": lambda s, t, mask, count=None: losses.attention_loss(
            [maps(s, mask)], [maps(t, mask)], mask, count
        ),
        "attention kl": lambda s, t, mask, count=None: losses.attention_loss(
            [maps(s, mask)], [maps(t, mask)], mask, count, distance="kl"
        ),
        "relation": lambda s, t, mask, count=None: losses.relation_loss([[s]], [[t]], mask, count, num_heads=2),
        "kl of tokens": lambda s, t, mask, count=None: losses.soft_loss(s, t, 2.0, count, mask=mask),
        "dkd of tokens": lambda s, t, mask, count=None: losses.decoupled_loss(
            s, t, torch.zeros(s.shape[:-1], dtype=torch.int64), 2.0, count, mask=mask
        ),
    }


@pytest.mark.parametrize("name", token_losses())
def test_padding_reaches_neither_value_nor_gradient(name):
    loss, mask = token_losses()[name], torch.tensor([[1, 1, 0, 0]])
    student, teacher = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    results = []
    for filler in (0.0, 1e4, torch.nan):
        with_filler = [states.masked_fill(mask.unsqueeze(-1) == 0, filler) for states in (student, teacher)]
        shown = with_filler[0].requires_grad_()
        if name.startswith("attention") and filler is torch.nan:
            continue  # not possible: maps hold probabilities
        value = loss(shown, with_filler[1], mask)
        value.backward()
        results.append((value.detach(), shown.grad[:, :2]))
        assert torch.equal(shown.grad[:, 2:], torch.zeros(1, 2, 6))
    assert results[0][0] > 0
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


@pytest.mark.parametrize("name", token_losses())
def test_an_empty_mask_gives_zero_with_a_gradient(name):
    student = torch.randn(1, 4, 6, requires_grad=True)
    loss = token_losses()[name](student, torch.randn(1, 4, 6), torch.zeros(1, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("name", token_losses())
def test_token_losses_of_parts_add_up_by_count_and_vanish_for_equal_models(name):
    loss, mask = token_losses()[name], torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    student, teacher = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    parts = [loss(student[rows], teacher[rows], mask[rows], mask.sum()) for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), loss(student, teacher, mask))
    same = student.clone().requires_grad_()
    value = loss(same, student, mask)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert same.grad.norm().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", token_losses())
def test_gradients_against_finite_differences(name):
    """gradcheck needs float64; our losses compute in float32, so the differences are taken by hand and wide."""
    loss, mask = token_losses()[name], torch.tensor([[1, 1, 1, 0]])
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    shown = student.clone().requires_grad_()
    loss(shown, teacher, mask).backward()
    direction = torch.randn(1, 4, 6)
    ahead, behind = (loss(student + sign * 1e-2 * direction, teacher, mask).item() for sign in (1, -1))
    assert (shown.grad * direction).sum().item() == pytest.approx((ahead - behind) / 2e-2, rel=2e-2, abs=1e-4)


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


EXTREME = {
    "kl": lambda s, t: losses.soft_loss(s, t, 1.0),
    "cold kl": lambda s, t: losses.soft_loss(s, t, 0.1),
    "reverse_kl": lambda s, t: losses.soft_loss(s, t, 1.0, divergence="reverse_kl"),
    "js": lambda s, t: losses.soft_loss(s, t, 1.0, divergence="js"),
    "mse": losses.logit_loss,
    "dkd": lambda s, t: losses.decoupled_loss(s, t, torch.tensor([1]), 1.0),
    "hard": lambda s, t: losses.hard_loss(s, torch.tensor([1])),
    "hidden": lambda s, t: losses.hidden_loss([s[None]], [t[None]], torch.ones(1, 1)),
    "cosine": lambda s, t: losses.cosine_loss([s[None]], [t[None]], torch.ones(1, 1)),
    "pkd": lambda s, t: losses.pkd_loss([s[None]], [t[None]], torch.ones(1)),
    "relation": lambda s, t: losses.relation_loss([[s[None]]], [[t[None]]], torch.ones(1, 1), num_heads=1),
    "contrastive": lambda s, t: losses.contrastive_loss(s, t, -t, 0.05),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", [False, True])
def test_half_precision_extremes_stay_finite(name, dtype, zero):
    large = 1e4 if name in ("mse", "hidden") else 6e4  # the gradient of a square is as large as the difference
    student = torch.tensor([[0.0] * 3 if zero else [large, -large, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-large, large, 0.0]], dtype=dtype)
    loss = EXTREME[name](student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
