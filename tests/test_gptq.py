"""GPTQ against the paper's equations, step by step, and what its weights become when they are quantized."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from distill.fake_weights import fake_linear_weight, twice_quantized
from distill.formats import QuantizationSettings, choose_formats
from distill.gptq import compensate, round_together
from distill.linears import dequantized
from distill.quantize import apply_formats
from tests.architectures import small_model

SETTINGS = [
    QuantizationSettings(format="nf4", compute_dtype="fp32"),
    QuantizationSettings(format="fp4", compute_dtype="fp32", double_quant=False, block_size=32),
]


def correlated(count, width, seed=0):
    """Inputs that move together, as those of real layers do."""
    torch.manual_seed(seed)
    return torch.randn(count, width // 4) @ torch.randn(width // 4, width) + 0.3 * torch.randn(count, width)


def one_by_one(weight, moments, format, settings):
    """Equations 2 and 3 of the paper, the inverse updated explicitly and in float64, largest second moments first."""
    values = bnb.functional.get_4bit_type(format, device="cpu").double().unique()
    size = settings.block_size
    blocks = weight.reshape(-1, size)
    scales = blocks.abs().amax(1)
    kept = twice_quantized(scales) if settings.double_quant else scales
    factor = kept.repeat_interleave(size).view(weight.shape).double()
    pinned = (blocks.abs() == scales[:, None]).view(weight.shape)
    rest, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(len(moments))
    left = moments.diagonal().argsort(descending=True).tolist()
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        column = left[0]
        wanted = rest[:, column] / factor[:, column]
        nearest = values[(wanted[:, None] - values).abs().argmin(1)]
        nearest = torch.where(pinned[:, column], weight[:, column].sign().double(), nearest)
        result[:, column] = nearest * factor[:, column]
        error = (rest[:, column] - result[:, column]) / inverse[0, 0]
        rest[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return result


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.format)
def test_it_rounds_as_the_papers_equations_do(settings):
    inputs = correlated(400, 192)
    torch.manual_seed(1)
    weight = torch.randn(5, 192)
    moments = inputs.T @ inputs
    rounded = fake_linear_weight(round_together(weight, moments, settings.format, settings), settings.format, settings)
    expected = one_by_one(weight, moments, settings.format, settings)
    same = (rounded - expected).abs() < 1e-5
    assert same.float().mean() > 0.99  # a weight midway between two values may go either way

    def error(other):
        return (inputs @ (other - weight).T).square().mean().item()

    assert error(rounded) == pytest.approx(error(expected.float()), rel=0.02)
    assert error(rounded) < 0.5 * error(fake_linear_weight(weight, settings.format, settings))


def test_blocks_that_go_over_rows_and_blocks_of_zeros():
    settings = QuantizationSettings(format="nf4", compute_dtype="fp32")
    torch.manual_seed(2)
    weight, inputs = torch.randn(7, 96), correlated(300, 96)
    weight[2] = 0
    rounded = round_together(weight, inputs.T @ inputs, "nf4", settings)
    scales = [nn.functional.pad(each.flatten(), (0, 32)).view(-1, 64).abs().amax(1) for each in (weight, rounded)]
    assert torch.equal(*scales)
    assert not rounded[2].any()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_quantized_model_has_these_weights_and_padding_counts_for_nothing(family):
    settings = QuantizationSettings(format="nf4", compute_dtype="fp32", rest_dtype="fp32")
    ids = torch.randint(5, 50, (6, 12))
    mask = torch.ones_like(ids)
    padded = {
        name: nn.functional.pad(values, (0, 4)) for name, values in (("input_ids", ids), ("attention_mask", mask))
    }
    models = [small_model(family) for _ in range(3)]
    formats = choose_formats(models[0], settings)
    linears = [name for name, format in formats.items() if not isinstance(models[0].get_submodule(name), nn.Embedding)]
    compensate(models[1], formats, settings, [{"input_ids": ids, "attention_mask": mask}])
    compensate(models[2], formats, settings, [padded])
    for name in linears:
        plain, here, there = (model.get_submodule(name).weight for model in models)
        assert not torch.equal(plain, here)
        assert (here != there).float().mean() < 0.02, name
    before = {name: models[1].get_submodule(name).weight.clone() for name in linears}
    quantized = apply_formats(models[1], formats, settings)
    for name in linears:
        weight = before[name].T if family == "gpt2" else before[name]
        assert torch.equal(dequantized(quantized.get_submodule(name)), fake_linear_weight(weight, "nf4", settings))
