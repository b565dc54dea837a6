import numpy as np
import pytest
import torch
from torch import nn

from distill.compression.factorization.spectra import (
    factors_at,
    measurements,
    spectrum_of,
    spectrum_of_inputs,
    spectrum_of_outputs,
)
from tests.architectures import small_model
from tests.conftest import tiny_bert


def layer(rows, columns, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows)


def product(module, spectrum, rank):
    factors = factors_at(module, spectrum, rank)
    if isinstance(module, nn.Embedding):
        return factors["table.weight"] @ factors["projection.weight"].T
    return factors["up.weight"] @ factors["down.weight"]


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_without_measurements_it_is_the_truncated_svd(shape):
    linear = layer(*shape)
    left, values, right = np.linalg.svd(linear.weight.detach().double().numpy(), full_matrices=False)
    spectrum = spectrum_of(linear, None, "svd")
    torch.testing.assert_close(spectrum.energies[: min(shape)], torch.tensor(values**2))
    for rank in (1, 3, 5):
        known = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(product(linear, spectrum, rank), torch.tensor(known))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("tokens", [5, 200])
def test_with_inputs_it_is_the_svd_of_the_weight_times_the_root_of_their_covariance(shape, tokens):
    linear = layer(*shape)
    inputs = torch.randn(tokens, shape[1], dtype=torch.float64) @ torch.randn(shape[1], shape[1], dtype=torch.float64)
    moments = inputs.T @ inputs
    spectrum = spectrum_of_outputs(linear.weight.detach(), moments)
    energies, vectors = np.linalg.eigh(moments.numpy())
    root = vectors * np.sqrt(energies.clip(0)) @ vectors.T  # C^½
    weight = linear.weight.detach().double().numpy()
    left, values, right = np.linalg.svd(weight @ root, full_matrices=False)
    torch.testing.assert_close(spectrum.energies[:4], torch.tensor(values[:4] ** 2))
    for rank in (1, 3):
        truncated = left[:, :rank] * values[:rank] @ right[:rank] @ np.linalg.pinv(root, rcond=1e-6)
        found = product(linear, spectrum, rank)
        torch.testing.assert_close(inputs @ found.T, inputs @ torch.tensor(truncated).T, atol=1e-6, rtol=1e-6)
        plain = product(linear, spectrum_of(linear, None, "svd"), rank)
        errors = [
            float((inputs @ (linear.weight.detach().double() - each).T).square().sum()) for each in (found, plain)
        ]
        assert errors[0] == pytest.approx(float(spectrum.energies[rank:].sum()), rel=1e-6, abs=1e-9)
        assert errors[0] < 0.9 * errors[1]


def test_important_rows_are_kept_as_fwsvd_keeps_them():
    linear, importance = layer(8, 5), torch.tensor([9.0, 1, 0.1, 4, 2, 0.5, 3, 7])
    spectrum = spectrum_of_inputs(linear.weight.detach(), importance)
    weight, root = linear.weight.detach().double().numpy(), np.sqrt(importance.double().numpy())
    left, values, right = np.linalg.svd(root[:, None] * weight, full_matrices=False)
    for rank in (1, 2, 4):
        known = (left[:, :rank] * values[:rank] @ right[:rank]) / root[:, None]
        found = product(linear, spectrum, rank)
        torch.testing.assert_close(found, torch.tensor(known))
        plain = product(linear, spectrum_of(linear, None, "svd"), rank)
        errors = [
            float(((linear.weight.detach() - each).square().sum(1) * importance).sum()) for each in (found, plain)
        ]
        assert errors[0] < errors[1]


def test_rows_of_an_embedding_count_as_often_as_they_are_read_and_others_a_little():
    torch.manual_seed(0)
    embedding = nn.Embedding(9, 4)
    counts = torch.tensor([0, 0, 5, 1, 0, 3, 0, 0, 0])
    importance = counts + counts.double().mean()
    known = spectrum_of_inputs(embedding.weight.detach(), importance)
    found = spectrum_of(embedding, counts, "activation")
    torch.testing.assert_close(found.energies, known.energies)
    torch.testing.assert_close(product(embedding, found, 2), product(embedding, known, 2))
    assert not found.of_outputs


def test_moments_and_information_are_those_of_autograd():
    model = tiny_bert(num_labels=1).eval()
    rows = [torch.tensor([[2, 7, 7, 9, 3]]), torch.tensor([[2, 5, 6, 7, 3]])]
    batch = {"input_ids": torch.cat(rows), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    block = model.bert.encoder.layer[0]
    modules = {"words": model.get_input_embeddings(), "wide": block.intermediate.dense}
    seen = dict.fromkeys(modules, 0)
    for ids in rows:  # of scores the drawn likelihood is the score and a constant
        model.zero_grad()
        model(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        seen = {name: seen[name] + module.weight.grad.double().square().sum(1) for name, module in modules.items()}
    model.zero_grad()
    found = measurements(model, modules, [batch], "fisher")
    for name in modules:
        torch.testing.assert_close(found[name], seen[name], rtol=1e-3, atol=1e-12)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    counts = measurements(model, modules, [batch], "activation")["words"]
    assert {token: int(count) for token, count in enumerate(counts) if count} == {2: 2, 3: 2, 5: 1, 6: 1, 7: 3, 9: 1}


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert"])
def test_padding_is_not_counted(family):
    model = small_model(family)
    short = {"input_ids": torch.tensor([[2, 5, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    padded = {
        "input_ids": torch.tensor([[2, 5, 9, 3, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    }
    name = next(name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D"))
    modules = {name: model.get_submodule(name), "words": model.get_input_embeddings()}
    for method in ("activation", "fisher"):
        first, second = (measurements(model, modules, [batch], method) for batch in (short, padded))
        for each in modules:
            torch.testing.assert_close(second[each], first[each], rtol=1e-3, atol=1e-6)
