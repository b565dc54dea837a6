"""Reconstructed output layers against least squares on the tokens themselves."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from distill.compression.pruning.reconstruction import Moments, contributions, output_moments, refit_output
from distill.compression.pruning.structure import columns_of, keep_units, prunable_sublayers
from tests.compression.pruning.test_structure import BATCH, PIXELS, model_of

MORE = {
    "input_ids": torch.randint(4, 25, (24, 20), generator=torch.Generator().manual_seed(0)),
    "attention_mask": (torch.arange(20) < torch.arange(5, 29)[:, None]).long(),
}
FAMILIES = ("BertConfig", "GPT2Config", "ModernBertConfig", "AlbertConfig", "ViTConfig", "Qwen2Config")


def tokens_of(model, layer, batch):
    """All inputs and outputs of a layer in one call, padding left out."""
    calls = []
    hook = layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    kept = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(calls[0][0].shape[:2]).bool()
    return [torch.cat([call[side][kept] for call in calls]) for side in (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_least_squares_solution(family):
    reference, batch = model_of(family)
    model, _ = model_of(family)
    batches = [batch] if family == "ViTConfig" else [BATCH, MORE]
    reference.config.pad_token_id = model.config.pad_token_id = 0
    first = prunable_sublayers(model)[0]
    keep_units(model, first, torch.arange(first.units - 1))  # the model has gone another way since
    sublayer = prunable_sublayers(model)[1]
    kept = torch.tensor([0, 3, 4, 9, 20])
    moments = output_moments(model, reference, [sublayer], batches)[0]
    layer, other = (each.get_submodule(f"{sublayer.block}.{sublayer.output}") for each in (model, reference))
    x = torch.cat([tokens_of(model, layer, each)[0] for each in batches])[:, kept]
    y = torch.cat([tokens_of(reference, other, each)[1] for each in batches])
    weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
    rest = weight.clone()
    has_bias = layer.bias is not None
    damping = (1e-4 * moments.inputs.diagonal()[:-1].mean()).sqrt()
    held = damping * torch.eye(len(kept), len(kept) + has_bias, dtype=torch.float64)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1) if has_bias else x
    expected = torch.linalg.lstsq(torch.cat([x, held]), torch.cat([y, damping * weight[:, kept].T])).solution
    refit_output(model, sublayer, kept, moments)
    weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
    torch.testing.assert_close(weight[:, kept], expected[: len(kept)].T, rtol=1e-7, atol=1e-9)
    if has_bias:
        torch.testing.assert_close(layer.bias.data, expected[-1], rtol=1e-7, atol=1e-9)
    others = [column for column in range(64) if column not in kept.tolist()]
    assert torch.equal(weight[:, others], rest[:, others])


@pytest.mark.parametrize("family", ["BertConfig", "GPT2Config", "Qwen2Config"])
def test_what_units_add_is_the_norm_of_their_part_of_the_output(family):
    model, _ = model_of(family)
    model.config.pad_token_id = 0
    for sublayer in prunable_sublayers(model)[:2]:
        layer = model.get_submodule(f"{sublayer.block}.{sublayer.output}")
        x = tokens_of(model, layer, MORE)[0]
        weight = layer.weight.data if isinstance(layer, Conv1D) else layer.weight.data.T
        expected = []
        for unit in range(sublayer.units):
            columns = slice(unit * sublayer.width, (unit + 1) * sublayer.width)
            expected.append((x[:, columns] @ weight[columns]).square().sum())
        found = contributions(model, sublayer, output_moments(model, model, [sublayer], [MORE])[0])
        torch.testing.assert_close(found, torch.stack(expected))


def test_heads_and_what_is_left_of_a_sublayer_without_any():
    model, _ = model_of("BertConfig")
    sublayer = prunable_sublayers(model)[0]
    moments = output_moments(model, model, [sublayer], [MORE])[0]
    layer = model.get_submodule(f"{sublayer.block}.{sublayer.output}")
    x, y = tokens_of(model, layer, MORE)
    before = layer.weight.data.clone()

    def error(kept):
        columns = columns_of(kept, 8)
        return (x[:, columns] @ layer.weight[:, columns].T + layer.bias - y).square().mean().item()

    kept = torch.tensor([0, 2])
    plain = error(kept)
    refit_output(model, sublayer, kept, moments)
    assert error(kept) < 0.9 * plain
    layer.weight.data = before
    refit_output(model, sublayer, torch.arange(0), moments)
    torch.testing.assert_close(layer.bias.data, y.mean(0))
    assert torch.equal(layer.weight.data, before)


def test_without_removal_nothing_changes():
    model, _ = model_of("DistilBertConfig")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sublayers = prunable_sublayers(model)
    for sublayer, moments in zip(sublayers, output_moments(model, model, sublayers, [MORE]), strict=True):
        refit_output(model, sublayer, torch.arange(sublayer.units), moments)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=1e-6, atol=1e-8)


def test_weights_stay_where_the_tokens_say_nothing():
    model, _ = model_of("BertConfig")
    sublayer = prunable_sublayers(model)[1]
    layer = model.get_submodule(f"{sublayer.block}.{sublayer.output}")
    before = layer.weight.data.clone()
    empty = Moments(torch.zeros(65, 65, dtype=torch.float64), torch.zeros(65, 32, dtype=torch.float64))
    empty.inputs[-1, -1] = 1
    refit_output(model, sublayer, torch.arange(8), empty)
    torch.testing.assert_close(layer.weight.data, before)


def test_images_have_no_padding():
    model, _ = model_of("ViTConfig")
    sublayer = prunable_sublayers(model)[1]
    moments = output_moments(model, model, [sublayer], [PIXELS, PIXELS])[0]
    assert moments.inputs[-1, -1] == 2 * 2 * 5  # two batches of two images of four patches and [CLS]
