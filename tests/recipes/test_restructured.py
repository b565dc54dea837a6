"""Models with cut heads and neurons in whole runs: checked, trained on, distilled into, quantized."""

import json

import pytest
from transformers import AutoModelForSequenceClassification

from distill.errors import InputError
from distill.models.replacements import is_quantized, structure_of
from distill.recipes.check import estimate_step
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from tests.conftest import tiny_bert
from tests.models.restructured import cut_heads_and_neurons, remove

STEPS = """
  tuned: {run: finetune, model: MODEL, max_steps: 2, per_device_train_batch_size: 8}
  recovered: {run: distill, model: MODEL, teacher: WHOLE, hidden_weight: 1.0, max_steps: 2}
  alike: {run: distill, teacher: MODEL, num_layers: 2, max_steps: 2}
  adapted: {run: finetune, model: MODEL, lora: {r: 2}, merge: true, max_steps: 2}
  small: {run: quantize, model: recovered, format: nf4}
  on_small: {run: finetune, model: small, lora: {r: 2}, max_steps: 2}
  picked: {run: quantize, model: MODEL, bits_budget: 6, calibration_rows: 16}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A model, and the same with a head and neurons of its first block and the second block's attention cut out."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 160}
    for name in ("whole", "pruned"):
        model = tiny_bert(**sizes, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
        if name == "pruned":
            cut_heads_and_neurons("bert", model)
            remove("bert", model, "attention")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def plan_of(folder, folders, data, steps):
    path = folder / "r.yaml"
    steps = steps.replace("MODEL", str(folders / "pruned")).replace("WHOLE", str(folders / "whole"))
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {data}, max_length: 24}}\n"
        f"benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}\nsteps:{steps}"
    )
    return make_plan(load_recipe(path))


def test_every_step_keeps_what_was_cut(tmp_path, folders, sst2_folder):
    plan = plan_of(tmp_path, folders, sst2_folder, STEPS)
    estimates = {name: estimate_step(plan, planned) for name, planned in plan.steps.items()}
    run_plan(plan)
    source = AutoModelForSequenceClassification.from_pretrained(folders / "pruned")
    for name in ("tuned", "recovered", "alike", "adapted", "small", "picked"):
        folder = tmp_path / "run" / name
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert structure_of(model.config) == structure_of(source.config) != [], name
        assert is_quantized(model.config) == (name in ("small", "picked"))
        stored = (folder / "model.safetensors").stat().st_size
        assert estimates[name].weight_bytes == pytest.approx(stored, rel=0.15)
        assert estimates[name].num_parameters == source.num_parameters()
        card = (folder / "README.md").read_text()
        assert "import distill  # registers its format" in card
        assert ("bitsandbytes saves memory" in card) == is_quantized(model.config)
    write_report(plan)
    models = {each["name"]: each for each in json.loads((tmp_path / "run" / "report.json").read_text())["models"]}
    assert models["recovered"]["num_parameters"] == source.num_parameters()
    assert models["small"]["num_parameters"] == source.num_parameters()


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (
            "{run: distill, teacher: MODEL, num_layers: 1}",
            "no student is cut from it; keep all of its layers and sizes",
        ),
        ("{run: finetune, model: MODEL, num_layers: 1}", "no student is cut from it"),
        (
            "{run: distill, teacher: WHOLE, model: MODEL, relation_weight: 1}",
            "a model lacks some of those that its config",
        ),
    ],
)
def test_what_would_undo_the_cuts_is_told_at_once(tmp_path, folders, sst2_folder, step, problem):
    with pytest.raises(InputError, match=problem):
        plan_of(tmp_path, folders, sst2_folder, f"\n  one: {step}\n")
