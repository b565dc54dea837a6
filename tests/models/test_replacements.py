import pytest
import torch

from tests.models.restructured import LAYOUTS, cut_heads_and_neurons, family_model, outputs, remove


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_model_without_heads_and_neurons_computes_as_if_they_added_nothing_and_reloads_bit_for_bit(tmp_path, family):
    model = family_model(family)
    before = model.num_parameters()
    known = cut_heads_and_neurons(family, model)
    torch.testing.assert_close(outputs(model), known, atol=2e-5, rtol=0)
    assert model.num_parameters() < before
    again = reloaded(model, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(("family", "part"), [
    (family, part) for family in LAYOUTS for part in ("attention", "feed-forward")
    if (family, part) != ("albert", "attention")  # whose residual and norm lie inside of it
])  # fmt: skip
def test_a_model_without_a_sublayer_computes_as_if_it_added_its_bias_alone_and_reloads_bit_for_bit(
    tmp_path, family, part
):
    model = family_model(family)
    known = remove(family, model, part)
    torch.testing.assert_close(outputs(model), known, atol=2e-5, rtol=0)
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))
