"""GPTQ against the paper's equations, step by step, and what its weights become when they are quantized."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill.compression.moments import gradient_moments
from distill.compression.quantization.embeddings import Nf4Embedding
from distill.compression.quantization.formats import QuantizationSettings, choose_formats
from distill.compression.quantization.gptq import compensate, round_together
from distill.compression.quantization.layers import dequantized
from distill.compression.quantization.quantize import apply_formats, quantize_model
from distill.compression.quantization.simulated import (
    fake_linear_weight,
    fake_nf4_rows,
    row_scales,
    twice_quantized,
)
from tests.architectures import ARCHITECTURES, small_model
from tests.conftest import tiny_bert

SETTINGS = [
    QuantizationSettings(format="nf4", compute_dtype="fp32"),
    QuantizationSettings(format="fp4", compute_dtype="fp32", double_quant=False, block_size=32),
]


def correlated(count, width, seed=0):
    """Inputs that move together, as those of real layers do."""
    torch.manual_seed(seed)
    return torch.randn(count, width // 4) @ torch.randn(width // 4, width) + 0.3 * torch.randn(count, width)


def cheapest_scale(block, costs, values):
    """The scale of one block that costs least, by trying each."""
    largest = int(block.abs().argmax())
    tried = []
    for percent in range(70, 110, 5):
        scale = float(block[largest].abs()) * percent / 100
        nearest = scale * values[(block[:, None] - scale * values).abs().argmin(1)]
        nearest[largest] = scale * float(block[largest].sign())
        tried.append((float(((block - nearest) ** 2 * costs).sum()), scale))
    return min(tried)[1]


def one_by_one(weight, moments, format, settings):
    """Equations 2 and 3 of the paper, the inverse updated explicitly and in float64, largest second moments first."""
    values = bnb.functional.get_4bit_type(format, device="cpu").double().unique()
    size = settings.block_size
    blocks = weight.double().reshape(-1, size)
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(len(moments))
    costs = (1 / torch.linalg.inv(damped).diagonal()).expand(weight.shape).reshape(-1, size)
    scales = torch.tensor([cheapest_scale(*each, values) for each in zip(blocks, costs, strict=True)])
    kept = twice_quantized(scales) if settings.double_quant else scales
    factor = kept.repeat_interleave(size).view(weight.shape).double()
    pinned = (blocks.abs() == blocks.abs().amax(1)[:, None]).view(weight.shape)
    rest, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
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
    before, after = (
        nn.functional.pad(each.flatten(), (0, 32)).view(-1, 64).abs().amax(1) for each in (weight, rounded)
    )
    shares = (after / before.clamp(min=1e-9) * 20).round() / 20
    assert torch.allclose(after, shares * before)  # the scale that was chosen is the one that quantizing finds
    assert len(shares[before > 0].unique()) > 1
    assert not rounded[2].any()


def test_a_scale_clips_a_weight_whose_input_is_small():
    settings = QuantizationSettings(format="nf4", compute_dtype="fp32", double_quant=False)
    torch.manual_seed(2)
    weight = torch.randn(3, 64)
    weight[:, 0] = 8.0
    for size, at_least, at_most in ((1e-3, 5, 6), (1e3, 7.9, 8.1)):
        moments = torch.eye(64)
        moments[0, 0] = size**2
        rounded = round_together(weight, moments, "nf4", settings)
        assert torch.equal(rounded.abs().amax(1), rounded[:, 0])
        assert (rounded[:, 0] > at_least).all()
        assert (rounded[:, 0] < at_most).all()


def test_what_blocks_of_zeros_are_handed_goes_on_to_others():
    settings = QuantizationSettings(format="nf4", compute_dtype="fp32")
    torch.manual_seed(2)
    weight, inputs = torch.randn(7, 128), correlated(300, 128)
    weight[:4, 64:] = 0
    rounded, larger = (round_together(by * weight, inputs.T @ inputs, "nf4", settings) / by for by in (1, 400))
    assert not rounded[:4, 64:].any()
    assert (larger - rounded).abs().gt(1e-4).float().mean() < 0.01


def as_quantized(module, weight, settings):
    """What a quantized module computes with, and what it should: the weights as they were when it was quantized."""
    if isinstance(module, Nf4Embedding):
        return module.dense().float(), fake_nf4_rows(weight, row_scales(weight, settings), settings)
    return dequantized(module), fake_linear_weight(weight, "nf4", settings)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_quantized_model_has_these_weights_and_padding_counts_for_nothing(family):
    settings = QuantizationSettings(format="nf4", embeddings="nf4", compute_dtype="fp32", rest_dtype="fp32")
    torch.manual_seed(3)
    batch = {"input_ids": torch.randint(5, 50, (6, 12)), "attention_mask": torch.ones(6, 12, dtype=torch.long)}
    padded = {name: nn.functional.pad(values, (0, 4)) for name, values in batch.items()}
    plain, here, there = (small_model(family) for _ in range(3))
    for model in (plain, here, there):
        model.config.pad_token_id = 0  # GPT-2 classifies at the last token that is none
    formats = choose_formats(plain, settings)
    compensate(here, formats, settings, [batch])
    compensate(there, formats, settings, [padded])
    before = {name: here.get_submodule(name).weight.clone() for name in formats}
    for name, weight in before.items():
        assert not torch.equal(plain.get_submodule(name).weight, weight), name
        assert (there.get_submodule(name).weight != weight).float().mean() < 0.05, name
    assert not any(parameter.grad is not None for parameter in here.parameters())
    assert all(parameter.requires_grad for parameter in here.parameters())
    with torch.no_grad():
        logits = [model(**batch).logits for model in (plain, apply_formats(small_model(family), formats, settings))]
        quantized = apply_formats(here, formats, settings)
        logits.append(quantized(**batch).logits)
    for name, weight in before.items():
        weight = weight.T if isinstance(plain.get_submodule(name), Conv1D) else weight
        assert torch.equal(*as_quantized(quantized.get_submodule(name), weight, settings)), name
    kept, rounded, together = (each.log_softmax(-1) for each in logits)
    errors = [((kept - other) * kept.exp()).sum(-1).mean() for other in (rounded, together)]
    assert errors[1] < errors[0]


def test_gradients_at_embeddings_are_those_of_the_looked_up_rows():
    model = tiny_bert(num_labels=1)
    batch = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    words = model.get_input_embeddings()
    rows = words(batch["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=rows, attention_mask=batch["attention_mask"]).logits.sum().backward()
    gradient = rows.grad[0]
    found = gradient_moments(model, {"words": words}, [batch, batch])["words"]
    torch.testing.assert_close(found, 2 * gradient.T @ gradient)


def test_layers_that_no_row_reaches_are_rounded_plainly(caplog):
    settings, model = QuantizationSettings(format="nf4"), small_model("bert")
    idle = nn.Linear(96, 96)
    model.bert.encoder.layer[0].idle = idle
    before = idle.weight.clone()
    batch = {"input_ids": torch.randint(5, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    compensate(model, choose_formats(model, settings), settings, [batch])
    assert torch.equal(idle.weight, before)
    assert "never reach bert.encoder.layer.0.idle" in caplog.text


def test_an_embedding_that_is_the_output_layer_too_is_left_to_plain_rounding():
    settings = QuantizationSettings(format="nf4", embeddings="nf4")
    model = small_model("bert", language_model=True)
    before = model.get_input_embeddings().weight.clone()
    batch = {"input_ids": torch.randint(5, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    compensate(model, choose_formats(model, settings), settings, [batch])
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_python_gets_it_with_calibration_rows():
    batch = {"input_ids": torch.randint(5, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    settings, model = QuantizationSettings(format="nf4"), small_model("bert")
    compensate(model, choose_formats(model, settings), settings, [batch])
    expected = apply_formats(model, choose_formats(small_model("bert"), settings), settings)
    found = quantize_model(small_model("bert"), format="nf4", calibration=[batch])
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
