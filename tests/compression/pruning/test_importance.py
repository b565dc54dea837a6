"""Importance against finite differences, row by row and unit by unit, in float64."""

import pytest
import torch
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForTokenClassification

from distill.compression.pruning import importance
from distill.compression.pruning.importance import fisher_information, magnitudes, taylor_of_divergence
from distill.compression.pruning.structure import keep_units, prunable_sublayers
from distill.compression.student import Width, build_student
from tests.compression.pruning.test_structure import BATCH, PIXELS, model_of
from tests.conftest import tiny_bert, tiny_config

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}


def small_bert(**changes):
    return tiny_bert(**{**SMALL, **changes}).double()


def with_unit_scaled(model, sublayer, unit, factor, call):
    """What a call gives while the columns of one unit are multiplied by a factor."""

    def scale(_, inputs):
        scaled = inputs[0].clone()
        scaled[..., unit * sublayer.width : (unit + 1) * sublayer.width] *= factor
        return (scaled,)

    hook = model.get_submodule(f"{sublayer.block}.{sublayer.output}").register_forward_pre_hook(scale)
    with torch.no_grad():
        result = call()
    hook.remove()
    return result


def derivative(model, sublayer, unit, call, step=1e-5):
    above, below = (with_unit_scaled(model, sublayer, unit, 1 + sign * step, call) for sign in (1, -1))
    return (above - below) / (2 * step)


def rows_of(batch):
    for row in range(len(next(iter(batch.values())))):
        yield {name: values[row : row + 1] for name, values in batch.items()}


def by_finite_differences(model, sublayers, batch, of_row):
    """For every unit the sum over rows of what `of_row` makes of a derivative, given a row."""
    return [
        torch.stack([sum(of_row(row, sublayer, unit) for row in rows_of(batch)) for unit in range(sublayer.units)])
        for sublayer in sublayers
    ]


def information(model, sublayer, unit, log_probabilities, step=1e-5):
    """Σ p (∂ log p/∂ mask)² of one row."""
    with torch.no_grad():
        probabilities = log_probabilities().exp()
    return (probabilities * derivative(model, sublayer, unit, log_probabilities, step).square()).sum()


def of_classes(model, row):
    return lambda: model(**row).logits.log_softmax(-1)[0]


@pytest.mark.parametrize("labels", [2, 3])
def test_information_of_classes(labels):
    model = small_bert(num_labels=labels)
    sublayers = prunable_sublayers(model)

    expected = by_finite_differences(
        model, sublayers, BATCH, lambda row, *unit: information(model, *unit, of_classes(model, row))
    )
    found = fisher_information(model, sublayers, [BATCH, BATCH])
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, 2 * other, rtol=1e-6, atol=1e-12)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_information_of_scores_is_the_squared_derivative():
    model = small_bert(num_labels=1)
    sublayers = prunable_sublayers(model)
    expected = by_finite_differences(
        model, sublayers, BATCH, lambda row, *unit: derivative(model, *unit, lambda: model(**row).logits[0, 0]).square()
    )
    for each, other in zip(fisher_information(model, sublayers, [BATCH]), expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-6, atol=1e-12)


def test_information_of_sets_of_labels():
    model = small_bert(num_labels=3, problem_type="multi_label_classification")
    sublayers = prunable_sublayers(model)

    def of_both(row, *unit):  # that the label is there, or not
        return sum(
            information(model, *unit, lambda sign=sign: (sign * model(**row).logits[0]).sigmoid().log())
            for sign in (1, -1)
        )

    expected = by_finite_differences(model, sublayers, BATCH, of_both)
    for each, other in zip(fisher_information(model, sublayers, [BATCH]), expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["AlbertConfig", "Qwen2Config", "GPT2Config", "ViTConfig", "ModernBertConfig"])
def test_information_in_other_families(family):
    """Shared blocks, where a unit acts several times; groups of queries; a gated network; images."""
    model, _ = model_of(family)
    batch = PIXELS if family == "ViTConfig" else BATCH
    model.config.pad_token_id = 0
    in_float32 = family in ("Qwen2Config", "ModernBertConfig")  # norms or positions
    step, tolerance = (1e-3, 1e-2) if in_float32 else (1e-5, 1e-6)
    sublayers = prunable_sublayers(model)[:2]
    found = fisher_information(model, sublayers, [batch])
    for sublayer, of_sublayer in zip(sublayers, found, strict=True):
        for unit in (0, sublayer.units - 1):
            expected = sum(information(model, sublayer, unit, of_classes(model, row), step) for row in rows_of(batch))
            torch.testing.assert_close(of_sublayer[unit], expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("model_class", [BertForTokenClassification, BertForQuestionAnswering, BertForMaskedLM])
def test_information_of_tokens_and_spans_is_right_in_expectation(model_class, monkeypatch):
    torch.manual_seed(0)
    model = model_class(tiny_config(**SMALL, initializer_range=0.2, vocab_size=25, num_labels=2)).double().eval()
    sublayers = prunable_sublayers(model)[:2]
    monkeypatch.setattr(importance, "_SIGNS", 1500)
    found = fisher_information(model, sublayers, [BATCH])
    mask = BATCH["attention_mask"].bool()

    def log_probabilities(row):
        output = model(**{name: values[row : row + 1] for name, values in BATCH.items()})
        if model_class is BertForQuestionAnswering:
            both = torch.stack([output.start_logits[0, mask[row]], output.end_logits[0, mask[row]]])
            return both.log_softmax(-1)
        return output.logits[0, mask[row]].log_softmax(-1)

    for sublayer, of_sublayer in zip(sublayers, found, strict=True):
        for unit in range(sublayer.units):
            expected = sum(
                information(model, sublayer, unit, lambda row=row: log_probabilities(row)) for row in range(2)
            )
            assert of_sublayer[unit].item() == pytest.approx(expected.item(), rel=0.15)


def test_the_first_derivative_of_the_divergence_once_something_is_gone():
    reference, model = small_bert(), small_bert()
    gone = prunable_sublayers(model)[1]
    keep_units(model, gone, torch.tensor([0, 2, 5]))
    sublayers = prunable_sublayers(model)

    def slope(row, sublayer, unit):
        wanted = reference(**row).logits.log_softmax(-1)[0].detach()
        return derivative(
            model, sublayer, unit, lambda: (wanted.exp() * (wanted - model(**row).logits.log_softmax(-1)[0])).sum()
        ).abs()

    expected = by_finite_differences(model, sublayers, BATCH, slope)
    for each, other in zip(taylor_of_divergence(model, sublayers, [BATCH], reference), expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-10)
    for each in taylor_of_divergence(model, sublayers, [BATCH], model):
        assert not each.any()


def test_the_first_derivative_for_scores():
    reference, model = small_bert(num_labels=1), small_bert(num_labels=1, seed=1)
    sublayers = prunable_sublayers(model)
    expected = by_finite_differences(
        model, sublayers, BATCH,
        lambda row, *unit: derivative(
            model, *unit, lambda: 0.5 * (model(**row).logits[0, 0] - reference(**row).logits[0, 0].detach()) ** 2
        ).abs(),
    )  # fmt: skip
    for each, other in zip(taylor_of_divergence(model, sublayers, [BATCH], reference), expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-10)


def test_magnitude_keeps_the_neurons_that_a_narrower_student_keeps():
    model = tiny_bert(initializer_range=0.2)
    student = build_student(model, width=Width(intermediate_size=48))
    for sublayer, size in zip(prunable_sublayers(model), magnitudes(model, prunable_sublayers(model)), strict=True):
        assert size.mean() == pytest.approx(1)
        if sublayer.kind == "neurons":
            keep_units(model, sublayer, size.topk(48).indices.sort().values)
    for name, weight in student.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_magnitude_of_heads_by_hand():
    model, _ = model_of("ModernBertConfig")
    sublayer = prunable_sublayers(model)[0]
    attention = model.model.layers[0].attn
    expected = []
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        parts = [part[rows].norm() for part in attention.Wqkv.weight.detach().split(32)]
        expected.append(torch.stack([*parts, attention.Wo.weight.detach()[:, rows].norm()]).prod())
    expected = torch.stack(expected)
    torch.testing.assert_close(magnitudes(model, [sublayer])[0], expected / expected.mean())
