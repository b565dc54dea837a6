"""The prune verb in whole runs: what check says of it, what it decides, and what may come after it."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import distill  # noqa: F401  (registers what plain transformers can't describe)
from distill import cli
from distill.compression.pruning.structure import BlockSizes, block_sizes, prunable_sublayers
from distill.errors import InputError
from distill.models.replacements import structure_of
from distill.recipes.check import estimate_step
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from tests.conftest import tiny_bert

SIZES = BlockSizes((4, 0, 2), (0, 64, 128))
"""What the clock is made to decide: whole sublayers go, too."""

STEPS = """
  fast: {run: prune, model: MODEL, speedup: 1.5}
  recovered: {run: distill, model: fast, teacher: MODEL, hidden_weight: 1, max_steps: 2}
  small: {run: quantize, model: recovered, format: nf4}
  int8: {run: quantize, model: recovered, format: int8}
  gptq: {run: quantize, model: recovered, format: nf4, embeddings: nf4, gptq: true, calibration_rows: 20}
  budget: {run: quantize, model: recovered, bits_budget: 7, calibration_rows: 20}
  adapted: {run: distill, model: small, teacher: MODEL, lora: {}, max_steps: 2}
  qat: {run: distill, model: fast, teacher: MODEL, qat: nf4, max_steps: 2}
  again: {run: prune, model: recovered, neurons: 0.5, rounds: 2, importance: taylor}
  wider: {run: finetune, model: again, max_steps: 2}
"""


def write_recipe(folder, model, data, steps):
    path = folder / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {data}, max_length: 24, max_train_rows: 40}}\n"
        "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
        f"steps:{steps.replace('MODEL', str(model))}"
    )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A classifier of three blocks with 4 heads and 128 neurons each, its labels named."""
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
    """All steps in one run, which were planned before the first one decided."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("distill.verbs.prune.decide_sizes", lambda *_, **__: (SIZES, 1.49))
        made = make_plan(load_recipe(write_recipe(tmp_path_factory.mktemp("runs"), model, sst2_folder, STEPS)))
        run_plan(made)
    return made


def sizes_of(folder):
    return block_sizes(prunable_sublayers(AutoModelForSequenceClassification.from_pretrained(folder)))


def test_what_was_decided_stands_in_the_record_and_on_the_card(finished):
    folder = finished.steps["fast"].folder
    decided = json.loads((folder / "step.json").read_text())["decided"]
    assert decided == {
        "heads": [4, 0, 2],
        "neurons": [0, 64, 128],
        "speedup": 1.49,
        "threads": torch.get_num_threads(),
    }
    card = ModelCard.load(folder / "README.md")
    assert "Left: 4, 0, 2 heads; 0, 64, 128 neurons" in card.text
    assert "pruning" in card.data.tags
    assert "pruning" in ModelCard.load(finished.steps["small"].folder / "README.md").data.tags


def test_what_comes_after_keeps_the_structure_and_reloads(finished):
    for name in ("fast", "recovered", "qat"):
        assert sizes_of(finished.steps[name].folder) == SIZES, name
    assert sizes_of(finished.steps["again"].folder) == BlockSizes((4, 0, 2), (0, 32, 64))
    assert sizes_of(finished.steps["wider"].folder) == BlockSizes((4, 0, 2), (0, 32, 64))
    removed = AutoConfig.from_pretrained(finished.steps["recovered"].folder)
    for name in ("small", "int8", "gptq", "budget"):
        config = AutoConfig.from_pretrained(finished.steps[name].folder)
        assert structure_of(config) == structure_of(removed), name
    for name in finished.steps.keys() - {"adapted"}:
        folder = finished.steps[name].folder
        loaded = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        stored = load_file(folder / "model.safetensors")
        assert all(torch.equal(loaded[key].view(value.shape), value) for key, value in stored.items()), name


def test_all_layers_of_a_pruned_student_can_be_compared(finished):
    record = json.loads((finished.steps["recovered"].folder / "step.json").read_text())
    assert record["layer_pairs"] == {record["options"]["teacher"]: {"hidden": [[1, 1], [2, 2], [3, 3]]}}
    assert any("loss/hidden" in line for line in record["log"])


def test_the_decided_sizes_make_the_same_model(finished, tmp_path, model, sst2_folder):
    decided = json.loads((finished.steps["fast"].folder / "step.json").read_text())["decided"]
    step = f"\n  said: {{run: prune, model: MODEL, heads: {decided['heads']}, neurons: {decided['neurons']}}}\n"
    made = make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, step)))
    run_plan(made)
    said, found = (load_file(each / "model.safetensors") for each in (
        made.steps["said"].folder, finished.steps["fast"].folder
    ))  # fmt: skip
    assert said.keys() == found.keys()
    assert all(torch.equal(said[name], found[name]) for name in said)
    assert json.loads((made.steps["said"].folder / "step.json").read_text())["decided"] is None


def test_check_knows_the_sizes_that_options_say(tmp_path, model, sst2_folder):
    steps = """
  half: {run: prune, model: MODEL, neurons: 0.5}
  heads: {run: prune, model: half, heads: [4, 2, 1], importance: magnitude, reconstruct: false}
"""
    made = make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    assert made.steps["half"].plan.config.intermediate_size == 64
    run_plan(made)
    for name, planned in made.steps.items():
        estimate = estimate_step(made, planned)
        weights = load_file(planned.folder / "model.safetensors")
        counted = sum(each.numel() for each in weights.values() if each.ndim and each.is_floating_point())
        assert estimate.num_parameters == counted, name
        assert planned.plan.sizes == sizes_of(planned.folder)
    assert not hasattr(AutoConfig.from_pretrained(made.steps["half"].folder), "quantization_config")


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("{run: prune, model: MODEL}", "heads, neurons, intermediate_size or speedup: say what to remove"),
        ("{run: prune, model: MODEL, neurons: 0.5, dtype: bf16}", "dtype: has no effect without speedup"),
        ("{run: prune, model: MODEL, heads: [4, 4]}", "heads: 2 sizes, and the model has 3 blocks"),
        (
            "{run: prune, model: MODEL, neurons: 0.5, importance: magnitude, reconstruct: false, calibration_rows: 9}",
            "calibration_rows: has no effect with importance: magnitude and reconstruct: false",
        ),
    ],
)
def test_wrong_options_are_told_before_anything_runs(tmp_path, model, sst2_folder, step, problem):
    with pytest.raises(InputError) as error:
        make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, f"\n  wrong: {step}\n")))
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("{run: distill, model: fast, teacher: MODEL, num_layers: 2}", "its layers have other sizes"),
        ("{run: distill, model: fast, teacher: MODEL, attention_weight: 1}", "compares heads, and a model lacks some"),
        ("{run: distill, model: fast, teacher: MODEL, relation_weight: 1}", "compares heads, and a model lacks some"),
        ("{run: distill, model: fast, teacher: MODEL, student_arch: distilbert}", "its layers have other sizes"),
    ],
)
def test_what_cannot_come_after_a_speedup_is_told_before_it_runs(tmp_path, model, sst2_folder, step, problem):
    steps = f"\n  fast: {{run: prune, model: MODEL, speedup: 1.5}}\n  wrong: {step}\n"
    with pytest.raises(InputError) as error:
        make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    assert problem in str(error.value)


def test_a_quantized_model_is_refused_with_what_to_take_instead(tmp_path, model, sst2_folder):
    steps = """
  small: {run: quantize, model: MODEL, format: nf4}
  wrong: {run: prune, model: small, neurons: 0.5}
"""
    with pytest.raises(InputError, match="small is quantized; start from the model it was made from"):
        make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))


def test_a_speedup_that_was_missed_is_said(tmp_path, model, sst2_folder, monkeypatch, capsys):
    monkeypatch.setattr("distill.verbs.prune.decide_sizes", lambda *_, **__: (SIZES, 1.3))
    steps = "\n  fast: {run: prune, model: MODEL, speedup: 1.5, batch_size: 2, sequence_length: 8, dtype: bf16}\n"
    path = write_recipe(tmp_path, model, sst2_folder, steps)
    assert cli.main(["run", str(path)]) == 0
    said = capsys.readouterr().err
    assert "measured 1.30 × as fast: 4, 0, 2 heads; 0, 64, 128 neurons" in said
    assert "speedup: 1.5 was not met; these sizes came nearest" in said


def test_a_trained_model_that_keeps_its_layers_learns_at_a_quarter_of_the_rate(tmp_path, model, sst2_folder):
    steps = """
  half: {run: prune, model: MODEL, neurons: 0.5}
  recovered: {run: distill, model: half, teacher: MODEL, max_steps: 1}
  said: {run: distill, model: half, teacher: MODEL, max_steps: 1, learning_rate: 3e-3}
  cut: {run: distill, model: half, teacher: MODEL, num_layers: 2, max_steps: 1}
  adapted: {run: distill, model: half, teacher: MODEL, lora: {}, max_steps: 1}
"""
    made = make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    run_plan(made, only=["half", "recovered", "said", "cut"])
    rates = {
        name: json.loads((made.steps[name].folder / "step.json").read_text())["learning_rate"]
        for name in ("recovered", "said", "cut")
    }
    of_width = 2e-4 * 384 / 64
    assert rates == pytest.approx({"recovered": of_width / 4, "said": 3e-3, "cut": of_width})
    assert made.steps["adapted"].plan.learning_rate == pytest.approx(of_width)
