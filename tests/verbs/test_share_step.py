"""The share verb in whole runs: what check says of it, what it decides, and what may come after it."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import distill  # noqa: F401  (registers what plain transformers can't describe)
from distill.errors import InputError
from distill.models.replacements import structure_of
from distill.recipes.check import estimate_step
from distill.recipes.dry_run import runnable_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from distill.verbs.all import VERBS
from tests.verbs.test_factorize_step import model  # noqa: F401  (a fixture)
from tests.verbs.test_prune_step import write_recipe

STEPS = """
  shared: {run: share, model: MODEL, groups: 1, calibration_rows: 20}
  half: {run: share, model: MODEL, groups: 2, what: attention, start: mean}
  taught: {run: distill, model: shared, teacher: MODEL, hidden_weight: 1, attention_weight: 1, max_steps: 2}
  aware: {run: distill, model: shared, teacher: MODEL, qat: int8, max_steps: 2}
  small: {run: quantize, model: taught, format: nf4, gptq: true, calibration_rows: 20}
  narrow: {run: factorize, model: half, modules: all, rank: 12, calibration_rows: 20}
  merged: {run: distill, model: half, teacher: MODEL, lora: {}, merge: true, max_steps: 2}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, sst2_folder):  # noqa: F811
    made = make_plan(load_recipe(write_recipe(tmp_path_factory.mktemp("runs"), model, sst2_folder, STEPS)))
    run_plan(made)
    return made


def test_the_start_is_decided_and_stands_in_record_and_card(finished, tmp_path, model, sst2_folder):  # noqa: F811
    folder = finished.steps["shared"].folder
    decided = json.loads((folder / "step.json").read_text())["decided"]
    assert decided["start"] == min(decided["divergences"], key=decided["divergences"].get)
    card = ModelCard.load(folder / "README.md")
    assert "Distinct blocks: 1, started from the" in card.text
    assert "weight-sharing" in ModelCard.load(finished.steps["small"].folder / "README.md").data.tags
    assert json.loads((finished.steps["half"].folder / "step.json").read_text())["decided"] is None
    step = f"\n  said: {{run: share, model: MODEL, groups: 1, start: {decided['start']}}}\n"
    made = make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, step)))
    run_plan(made, only=["said"])
    said, found = (load_file(each / "model.safetensors") for each in (made.steps["said"].folder, folder))
    assert said.keys() == found.keys()
    assert all(torch.equal(said[name], found[name]) for name in said)


def test_what_comes_after_shares_and_reloads(finished):
    structures = {
        name: structure_of(AutoConfig.from_pretrained(planned.folder)) for name, planned in finished.steps.items()
    }
    assert structures["shared"] == structures["taught"] == structures["small"] == structures["aware"] != []
    assert structures["half"] == structures["merged"] == structures["narrow"][: len(structures["half"])] != []
    for name, planned in finished.steps.items():
        stored = load_file(planned.folder / "model.safetensors")
        found = AutoModelForSequenceClassification.from_pretrained(planned.folder).state_dict()
        assert all(torch.equal(found[key].view(value.shape), value) for key, value in stored.items()), name
    sizes = {name: (planned.folder / "model.safetensors").stat().st_size for name, planned in finished.steps.items()}
    assert sizes["shared"] == sizes["taught"] < sizes["half"]


def test_check_knows_the_sizes(finished):
    for name in ("shared", "half"):
        planned = finished.steps[name]
        weights = load_file(planned.folder / "model.safetensors")
        counted = sum(each.numel() for each in weights.values() if each.ndim and each.is_floating_point())
        assert estimate_step(finished, planned).num_parameters == counted, name
    planned = finished.steps["half"]
    assert VERBS["share"].lines(planned.step.options, planned.plan) == ["2 distinct attention layers for 3 blocks"]


@pytest.mark.parametrize(("steps", "problem"), [
    ("  wrong: {run: share, model: MODEL}", "groups"),
    ("  wrong: {run: share, model: MODEL, groups: 3}", "groups: 3; the model has 3 blocks, so say 1 to 2"),
    ("  wrong: {run: share, model: MODEL, groups: 1, start: mean, calibration_rows: 9}", "calibration_rows: has no"),
    ("  one: {run: share, model: MODEL, groups: 1}\n  wrong: {run: share, model: one, groups: 1}", "shared already"),
    ("  one: {run: share, model: MODEL, groups: 1}\n  wrong: {run: prune, model: one, neurons: 0.5}", "or shared, and"),
    (
        "  one: {run: share, model: MODEL, groups: 1}\n"
        "  wrong: {run: distill, model: one, teacher: MODEL, layers: [0]}",
        "its layers have other sizes",
    ),
])  # fmt: skip
def test_what_cannot_be_is_told_before_anything_runs(tmp_path, model, sst2_folder, steps, problem):  # noqa: F811
    with pytest.raises(InputError) as error:
        runnable_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, f"\n{steps}\n")))
    assert problem in str(error.value)
