import itertools
import json

import numpy as np
import pytest
import torch
from transformers import BertForQuestionAnswering

from distill.compression.quantization.formats import QuantizationSettings, model_size
from distill.compression.quantization.mixed import (
    Sensitivity,
    best_formats,
    budget_in_bytes,
    calibration_logits,
    check_budget,
    choose_mix,
    divergence,
    write_sensitivity,
)
from distill.compression.quantization.quantize import apply_formats, weight_memory
from distill.errors import InputError
from distill.tasks.classification import CLASSES, LABEL_SETS, SCORES
from distill.tasks.language_modeling import MASKED_WORDS
from distill.tasks.question_answering import ENDS
from tests.architectures import IDS, MASK, logits, small_model


def test_divergence_is_the_mean_kl_or_squared_error():
    reference, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]]) + 3.0
    by_hand = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert divergence(CLASSES, reference, other) == pytest.approx(by_hand)
    assert divergence(SCORES, np.array([[1.0], [2.0]]), np.array([[1.5], [2.0]])) == pytest.approx(0.125)
    one_of_two = np.log(0.5 / 0.5), np.log(0.25 / 0.75)  # logits of probabilities 1/2 and 1/4
    sets = divergence(LABEL_SETS, np.array([[one_of_two[0]]]), np.array([[one_of_two[1]]]))
    assert sets == pytest.approx(2 * by_hand)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_formats_are_those_of_an_exhaustive_search(seed):
    random = np.random.default_rng(seed)
    measured = [
        Sensitivity(f"m{module}", format, int(size * random.integers(100, 1000)), float(random.exponential() / size))
        for module in range(6)
        for format, size in (("none", 4), ("int8", 2), ("nf4", 1))
    ]
    choices = [measured[start : start + 3] for start in range(0, 18, 3)]
    budget = int(0.6 * sum(max(each.size for each in module) for module in choices))
    fitting = [mix for mix in itertools.product(*choices) if sum(each.size for each in mix) <= budget]
    best = min(sum(each.divergence for each in mix) for mix in fitting)
    formats = best_formats(measured, budget)
    chosen = [each for each in measured if formats[each.module] == each.format]
    assert len(chosen) == 6
    assert sum(each.size for each in chosen) <= budget
    assert sum(each.divergence for each in chosen) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_the_best_formats_are_exact_to_the_byte_over_magnitudes(seed, capfd):
    random = np.random.default_rng(seed)
    measured = []
    for module in range(random.integers(1, 7)):
        weights, error = int(10 ** random.uniform(2, 8)), 10 ** random.uniform(-8, 0)
        measured += [
            Sensitivity(f"m{module}", "none", 2 * weights, 0.0),
            Sensitivity(f"m{module}", "int8", weights + 4, float(error * random.random() / 10)),
            Sensitivity(f"m{module}", "nf4", weights // 2 + 16, float(error * random.random())),
        ]
    mixes = list(itertools.product(*(measured[start : start + 3] for start in range(0, len(measured), 3))))
    budget = sum(each.size for each in mixes[random.integers(len(mixes))])  # one of them fits to the byte
    best = min(sum(each.divergence for each in mix) for mix in mixes if sum(each.size for each in mix) <= budget)
    formats = best_formats(measured, budget)
    chosen = [each for each in measured if formats[each.module] == each.format]
    assert sum(each.size for each in chosen) <= budget
    assert sum(each.divergence for each in chosen) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert capfd.readouterr() == ("", "")


def test_of_formats_that_diverge_equally_the_first_that_fits_is_taken():
    sizes = {"none": 4, "int8": 2, "nf4": 1}
    measured = [Sensitivity(module, format, size, 0.0) for module in "ab" for format, size in sizes.items()]
    assert best_formats(measured, 8) == {"a": "none", "b": "none"}
    assert best_formats(measured, 7) == {"a": "int8", "b": "none"}
    assert best_formats(measured, 4) == {"a": "int8", "b": "int8"}
    assert best_formats(measured, 2) == {"a": "nf4", "b": "nf4"}


def test_every_module_has_its_smallest_format_where_none_fit():
    measured = [Sensitivity("a", "none", 4, 0.0), Sensitivity("a", "nf4", 1, 1.0), Sensitivity("b", "int8", 2, 0.5)]
    assert best_formats(measured, 2) == {"a": "nf4", "b": "int8"}
    assert best_formats(measured, 5) == {"a": "nf4", "b": "int8"}


@pytest.fixture(scope="module")
def measured():
    """A GPT-2 (its layers are transposed) within what int8 embeddings and nf4 layers take."""
    model = small_model("gpt2")
    fixed = {"h.1.attn.c_attn": "int8"}
    settings = QuantizationSettings(overrides=fixed, rest_dtype="fp32", compute_dtype="fp32")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    budget = budget_in_bytes(10, model, settings)
    found = choose_mix(model, settings, budget, predict=lambda model: logits(model).numpy(), targets=CLASSES)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after.keys() == before.keys()
    return model, settings, budget, *found


def test_the_mix_keeps_the_budget_and_is_no_worse_than_uniform_formats(measured):
    _, _, budget, mixes, singles = measured
    assert mixes[0].size <= budget
    assert all(mix.divergence >= mixes[0].divergence for mix in mixes)
    assert {"mixed", "nf4, embeddings nf4"} <= {mix.name for mix in mixes}
    assert {each.module for each in singles} == set(mixes[0].formats)
    assert all(mix.formats["transformer.h.1.attn.c_attn"] == "int8" for mix in mixes)
    by_format = {f: np.mean([each.divergence for each in singles if each.format == f]) for f in ("none", "int8", "nf4")}
    assert by_format["none"] == 0 < by_format["int8"] < by_format["nf4"]


def test_what_was_measured_is_what_the_quantized_model_does(measured):
    model, settings, _, mixes, _ = measured
    chosen = {name: format for name, format in mixes[0].formats.items() if format != "none"}
    reference = logits(model).numpy()
    quantized = apply_formats(small_model("gpt2"), chosen, settings)
    found = divergence(CLASSES, reference, logits(quantized).numpy())
    assert found == pytest.approx(mixes[0].divergence, rel=1e-3)
    assert weight_memory(quantized) == pytest.approx(mixes[0].size, rel=0.01)


def test_the_table_and_the_plot_are_written(measured, tmp_path):
    _, _, budget, mixes, singles = measured
    write_sensitivity(tmp_path, budget, mixes, singles)
    table = json.loads((tmp_path / "sensitivity.json").read_text())
    assert table["chosen"] == mixes[0].name
    chosen = {each["module"]: each["format"] for each in table["modules"] if each["chosen"]}
    assert chosen == mixes[0].formats
    assert (tmp_path / "sensitivity.png").stat().st_size > 10_000


def test_budgets_in_bits_and_bytes():
    with torch.device("meta"):
        model = small_model("bert")
    settings = QuantizationSettings()
    everything_16 = model_size(model, {}, settings)
    assert budget_in_bytes(16, model, settings) == everything_16
    assert budget_in_bytes("1.5MB", model, settings) == 1_500_000
    assert check_budget(model, settings, everything_16 - 1) == everything_16 - 1
    with pytest.raises(InputError, match="leave room for every weight in bf16"):
        check_budget(model, settings, everything_16)
    int8 = QuantizationSettings(embeddings="int8")
    assert check_budget(model, int8, 10**9) < everything_16
    with pytest.raises(InputError, match=r"bits_budget: 0.00 MB are too few; .* take 0\.\d\d MB"):
        check_budget(model, settings, 1000)


def test_only_predictions_that_count_are_compared():
    model = small_model("bert", language_model=True)
    batches = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:1], "attention_mask": MASK[:1]}]
    with torch.no_grad():
        expected = torch.cat([model(**batch).logits[batch["attention_mask"].bool()] for batch in batches])
    assert np.array_equal(calibration_logits(model, batches), expected.numpy())
    assert len(expected) == 5 + 7 + 5
    many = calibration_logits(model, batches * 200)  # 3,400 tokens
    assert 800 < len(many) <= 1200


def test_spans_of_batches_of_different_lengths_stand_together():
    torch.manual_seed(0)
    config = small_model("bert").config
    config.num_labels = 2
    model = BertForQuestionAnswering(config).eval()
    batches = [{"input_ids": IDS[:, :5], "attention_mask": MASK[:, :5]}, {"input_ids": IDS, "attention_mask": MASK}]
    found = calibration_logits(model, batches)
    assert found.shape == (2 * 2 + 2 * 2, 7)  # a start and an end a row
    assert (found[:4, 5:] == -1e4).all()
    assert (found[4, 5:] == -1e4).all()  # padding of the first row
    assert divergence(ENDS, found, found) == 0


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_tied_embeddings_are_measured_in_the_output_layer_too(architecture):
    model = small_model(architecture, language_model=True)
    words = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    settings = QuantizationSettings(
        overrides={words: "nf4", "*.[01].*": "none"}, rest_dtype="fp32", compute_dtype="fp32"
    )
    batches = [{"input_ids": IDS, "attention_mask": MASK}]
    reference = calibration_logits(model, batches)
    mixes, measured = choose_mix(
        model, settings, 10**9, predict=lambda model: calibration_logits(model, batches), targets=MASKED_WORDS
    )
    quantized = apply_formats(small_model(architecture, language_model=True), {words: "nf4"}, settings)
    found = divergence(MASKED_WORDS, reference, calibration_logits(quantized, batches))
    assert found > 0
    assert mixes[0].divergence == pytest.approx(found, rel=1e-3)
    assert next(each for each in measured if each.module == words).divergence == pytest.approx(found, rel=1e-3)
