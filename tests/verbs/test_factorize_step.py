"""The factorize verb in whole runs: what check says of it, what it decides, and what may come after it."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import distill  # noqa: F401  (registers what plain transformers can't describe)
from distill.errors import InputError
from distill.models.modules import FactorizedEmbedding, FactorizedLinear
from distill.models.replacements import structure_of
from distill.recipes.check import estimate_step
from distill.recipes.dry_run import runnable_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from distill.verbs.all import VERBS
from tests.conftest import tiny_bert
from tests.verbs.test_prune_step import write_recipe

STEPS = """
  words: {run: factorize, model: MODEL, rank: 16, calibration_rows: 20}
  sized: {run: factorize, model: MODEL, modules: all, size: 330kB, method: svd}
  recovered: {run: distill, model: sized, teacher: MODEL, hidden_weight: 1, attention_weight: 1, max_steps: 2}
  aware: {run: distill, model: words, teacher: MODEL, qat: nf4, max_steps: 2}
  small: {run: quantize, model: recovered, format: nf4, embeddings: nf4, gptq: true, calibration_rows: 20}
  budget: {run: quantize, model: words, bits_budget: 7, calibration_rows: 20}
  adapted: {run: distill, model: small, teacher: MODEL, lora: {}, max_steps: 2}
  merged: {run: distill, model: recovered, teacher: MODEL, lora: {}, merge: true, max_steps: 2}
  pruned: {run: prune, model: words, heads: [4, 0, 2], neurons: [0, 64, 128], calibration_rows: 20}
  both: {run: factorize, model: pruned, modules: linear, rank: 12, method: fisher, calibration_rows: 20}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A classifier of three blocks, its labels named."""
    folder = tmp_path_factory.mktemp("models") / "start"
    torch.manual_seed(0)
    start = tiny_bert(num_hidden_layers=3, intermediate_size=128, initializer_range=0.1)
    start.config.id2label = {0: "negative", 1: "positive"}
    start.config.label2id = {"negative": 0, "positive": 1}
    start.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, sst2_folder):
    made = make_plan(load_recipe(write_recipe(tmp_path_factory.mktemp("runs"), model, sst2_folder, STEPS)))
    run_plan(made)
    return made


def loaded(made, name):
    return AutoModelForSequenceClassification.from_pretrained(made.steps[name].folder)


def test_ranks_are_decided_within_the_size_and_stand_in_record_and_card(finished):
    folder = finished.steps["sized"].folder
    ranks = json.loads((folder / "step.json").read_text())["decided"]["ranks"]
    assert (folder / "model.safetensors").stat().st_size <= 330_000
    assert ranks == {
        name: entry.fields["rank"] for entry in structure_of(AutoConfig.from_pretrained(folder)) for name in entry.names
    }
    card = ModelCard.load(folder / "README.md")
    assert "Factorized (all, size 330kB) by truncated SVD" in card.text
    assert "Left: " in card.text
    assert "low-rank" in card.data.tags
    assert "low-rank" in ModelCard.load(finished.steps["small"].folder / "README.md").data.tags
    assert json.loads((finished.steps["words"].folder / "step.json").read_text())["decided"] is None


def test_what_comes_after_keeps_the_factors_and_reloads(finished):
    of_sized = structure_of(AutoConfig.from_pretrained(finished.steps["sized"].folder))
    for name in ("recovered", "small", "merged"):
        assert structure_of(AutoConfig.from_pretrained(finished.steps[name].folder)) == of_sized, name
    for name in ("words", "aware", "budget", "pruned", "both"):
        assert isinstance(loaded(finished, name).get_input_embeddings(), FactorizedEmbedding), name
    assert any(isinstance(module, FactorizedLinear) for module in loaded(finished, "both").modules())
    for name in finished.steps.keys() - {"adapted"}:
        stored = load_file(finished.steps[name].folder / "model.safetensors")
        found = loaded(finished, name).state_dict()
        assert all(torch.equal(found[key].view(value.shape), value) for key, value in stored.items()), name


def test_the_decided_ranks_make_the_same_model(finished, tmp_path, model, sst2_folder):
    ranks = json.loads((finished.steps["sized"].folder / "step.json").read_text())["decided"]["ranks"]
    step = f"\n  said: {{run: factorize, model: MODEL, rank: {json.dumps(ranks)}, method: svd}}\n"
    made = make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, step)))
    run_plan(made)
    said, found = (
        load_file(each / "model.safetensors") for each in (made.steps["said"].folder, finished.steps["sized"].folder)
    )
    assert said.keys() == found.keys()
    assert all(torch.equal(said[name], found[name]) for name in said)


def test_check_knows_the_sizes_and_says_what_stays_whole(finished, tmp_path, model, sst2_folder):
    for name in ("words", "both"):
        planned = finished.steps[name]
        weights = load_file(planned.folder / "model.safetensors")
        counted = sum(each.numel() for each in weights.values() if each.ndim and each.is_floating_point())
        assert estimate_step(finished, planned).num_parameters == counted, name
    steps = "\n  all: {run: factorize, model: MODEL, modules: all, rank: 33, method: svd}\n"
    made = make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    planned = made.steps["all"]
    assert VERBS["factorize"].lines(planned.step.options, planned.plan) == [
        "6 matrices of rank 33",
        "13 matrices left whole, as factors would be no smaller: bert.embeddings.word_embeddings, …",
    ]


@pytest.mark.parametrize(("step", "problem"), [
    ("{run: factorize, model: MODEL}", "rank, energy, size: say exactly one"),
    ("{run: factorize, model: MODEL, rank: 9, method: svd, calibration_rows: 9}", "calibration_rows: has no effect"),
    ("{run: factorize, model: MODEL, rank: 900}", "rank: the factors would be larger than the matrices"),
    ("{run: factorize, model: MODEL, size: 1kB}", "size: 1kB is too little"),
    ("{run: factorize, model: MODEL, size: 8}", "size"),
    ("{run: factorize, model: MODEL, rank: {querry: 9}}", "rank: 'querry' matches no linear layer"),
])  # fmt: skip
def test_wrong_options_are_told_before_anything_runs(tmp_path, model, sst2_folder, step, problem):
    with pytest.raises(InputError) as error:
        make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, f"\n  wrong: {step}\n")))
    assert problem in str(error.value)


@pytest.mark.parametrize(("step", "problem"), [
    ("{run: distill, model: low, teacher: MODEL, num_layers: 2}", "its layers have other sizes"),
    ("{run: prune, model: low, neurons: 0.5}", "its layers are factorized or shared, and heads"),
    ("{run: factorize, model: low, modules: linear, rank: 4}", "has no linear left to factorize"),
    ("{run: finetune, model: low, lora: {target_modules: [query]}}", "lora: "),
])  # fmt: skip
def test_what_cannot_come_after_is_told_before_it_runs(tmp_path, model, sst2_folder, step, problem):
    steps = f"\n  low: {{run: factorize, model: MODEL, modules: all, rank: 12}}\n  wrong: {step}\n"
    with pytest.raises(InputError) as error:
        runnable_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    assert problem in str(error.value)
