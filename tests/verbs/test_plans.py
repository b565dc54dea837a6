"""What was planned is what runs: check tells the plan, the step is handed it, and step.json records it."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification

from distill import InputError, prune_model
from distill.common.records import read_step
from distill.compression.pruning.structure import block_sizes, prunable_sublayers
from distill.compression.replacements import formats_of
from distill.models.load import size_on_disk
from distill.recipes.check import print_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from tests.conftest import make_tokenizer, tiny_bert

CHOOSING = (
    "distill.verbs.training.planning.choose_layers",
    "distill.verbs.training.planning.layer_pairs",
    "distill.verbs.training.planning.student_config",
    "distill.training.teachers.layer_pairs",
    "distill.training.arguments.resolve_layer_map",
    "distill.verbs.quantize.choose_formats",
    "distill.verbs.quantize.budget_in_bytes",
    "distill.verbs.quantize.check_budget",
    "distill.compression.quantization.quantize.choose_formats",
)
"""What decides layers, pairs, sizes and formats."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, sst2_folder):
    folder = tmp_path_factory.mktemp("plans")
    teacher = tiny_bert(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    teacher.save_pretrained(folder / "big")
    make_tokenizer().save_pretrained(folder / "big")
    path = folder / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {sst2_folder}, max_length: 24}}\nsteps:\n"
        f"  tuned: {{run: finetune, model: {folder / 'big'}, num_layers: 3, max_steps: 1}}\n"
        f"  student: {{run: distill, teacher: [{folder / 'big'}, tuned], num_layers: 2, hidden_weight: 1, "
        "attention_weight: 1, layer_map: uniform, attention_layer_map: last, max_steps: 1}\n"
        "  small: {run: quantize, model: student, format: nf4, overrides: {'*.0.output.dense': int8}}\n"
        "  mixed: {run: quantize, model: student, bits_budget: 7.5, calibration_rows: 16}\n"
    )
    return path


@pytest.fixture(scope="module")
def made(recipe):
    """The finished plan, what check said of each step, and with what choices forbidden after that."""
    plan = make_plan(load_recipe(recipe))
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("distill.recipes.check.results.print", lambda text="": said.append(str(text)))
        print_plan(plan)
        for name in CHOOSING:
            patch.setattr(name, _forbidden(name))
        run_plan(plan)
    blocks = re.split(r"\n\n(?=\w+: \w+ of )", "\n".join(said))
    return plan, {block.partition(":")[0]: block for block in blocks}


def _forbidden(name):
    def refuse(*arguments, **options):
        raise AssertionError(f"{name} was asked again")

    return refuse


def test_layers_and_pairs_are_those_that_check_told(made):
    plan, said = made
    for name in ("tuned", "student"):
        record = read_step(plan.steps[name].folder)
        assert f"source layers {', '.join(map(str, record.layers))} (from 0)" in said[name]
        told = {
            (teacher, part): [[int(layer) for layer in pair.split("→")] for pair in pairs.split(", ")]
            for part, pairs, teacher in re.findall(r"(\w+) loss: (.+) \(student→(.+); 0 is", said[name])
        }
        recorded = {
            (teacher, part): pairs for teacher, maps in record.layer_pairs.items() for part, pairs in maps.items()
        }
        assert told == recorded
        assert record.decided is None
        config = json.loads((plan.steps[name].folder / "config.json").read_text())
        assert config["num_hidden_layers"] == len(record.layers)
    big = read_step(plan.steps["student"].folder).parents[0]
    assert recorded == {
        (big, "hidden"): [[1, 2], [2, 4]],
        (big, "attention"): [[1, 3], [2, 4]],
        ("tuned", "hidden"): [[1, 2], [2, 3]],  # 1 × 3 / 2, to the even number
        ("tuned", "attention"): [[1, 2], [2, 3]],
    }


def test_formats_are_those_that_check_told(made):
    plan, said = made
    folder = plan.steps["small"].folder
    formats = formats_of(AutoConfig.from_pretrained(folder))[0]
    assert formats == plan.steps["small"].plan.formats
    counts = {each: list(formats.values()).count(each) for each in ("int8", "nf4")}
    assert counts == {"int8": 2, "nf4": 11}  # an override and the word embeddings; else 2 blocks of 6 linear layers
    assert all(f"{count} modules in {each}" in said["small"] for each, count in counts.items())
    assert read_step(folder).decided is None


def test_a_budget_is_a_bound_and_the_step_records_what_it_decided(made):
    plan, said = made
    planned = plan.steps["mixed"]
    told = float(re.search(r"picked within ([\d.]+) MB", said["mixed"])[1])
    decided = read_step(planned.folder).decided
    assert decided.keys() == {"formats", "weight_bytes"}
    assert decided["weight_bytes"] <= planned.plan.budget == pytest.approx(told * 1e6, abs=5e3)
    kept = {name: each for name, each in decided["formats"].items() if each != "none"}
    assert kept == formats_of(AutoConfig.from_pretrained(planned.folder))[0]
    with safe_open(planned.folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"{name}.weight" for name in decided["formats"]} <= names
    assert size_on_disk(planned.folder) == pytest.approx(decided["weight_bytes"], rel=0.2)  # and the file's header


def pruned_recipe(folder, sst2_folder, weights):
    """A pruned model that lacks heads, neurons and one whole sublayer, which learns from the one it was made from."""
    teacher = tiny_bert(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    teacher.save_pretrained(folder / "teacher")
    pruned = prune_model(
        teacher, heads=[4, 2, 0, 4], neurons=[64, 128, 96, 0], importance="magnitude", reconstruct=False
    )
    pruned.save_pretrained(folder / "pruned")
    for name in ("teacher", "pruned"):
        make_tokenizer().save_pretrained(folder / name)
    path = folder / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {sst2_folder}, max_length: 24}}\nsteps:\n"
        f"  recovered: {{run: distill, model: {folder / 'pruned'}, teacher: {folder / 'teacher'}, {weights}, "
        "max_steps: 3, learning_rate: 1e-3}\n"
    )
    return path


def test_a_pruned_model_recovers_with_all_its_layers_and_keeps_its_structure(tmp_path, sst2_folder):
    plan = make_plan(load_recipe(pruned_recipe(tmp_path, sst2_folder, "hidden_weight: 1")))
    planned = plan.steps["recovered"]
    every = [(layer, layer) for layer in range(1, 5)]
    assert planned.plan.layer_pairs == {str(tmp_path / "teacher"): {"hidden": every}}
    assert (planned.plan.layers, planned.plan.is_built) == ((0, 1, 2, 3), False)
    run_plan(plan)
    made, before = (
        AutoModelForSequenceClassification.from_pretrained(folder) for folder in (planned.folder, tmp_path / "pruned")
    )
    sizes = [block_sizes(prunable_sublayers(model, ("heads", "neurons"))) for model in (made, before)]
    assert sizes[0] == sizes[1]
    assert (list(sizes[0].heads), list(sizes[0].neurons)) == ([4, 2, 0, 4], [64, 128, 96, 0])
    assert any(not torch.equal(weight, before.state_dict()[name]) for name, weight in made.state_dict().items())
    losses = [line["loss/hidden"] for line in read_step(planned.folder).log if "loss/hidden" in line]
    assert losses[-1] > 0


@pytest.mark.parametrize("part", ["attention", "relation"])
def test_heads_that_a_pruned_model_lacks_are_not_compared(tmp_path, sst2_folder, part):
    with pytest.raises(InputError, match=rf"recovered.{part}_weight: compares heads, and a model lacks some"):
        make_plan(load_recipe(pruned_recipe(tmp_path, sst2_folder, f"{part}_weight: 1")))
