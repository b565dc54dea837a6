"""What identifies a step, and which rows change what it makes."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from distill.recipes.inputs import needs_head
from distill.recipes.plan import FINGERPRINT_VERSION, _fingerprint
from distill.recipes.recipe import load_recipe
from distill.verbs.all import VERBS

STEPS = """
task: sst2
output_dir: runs/x
steps:
  a: {run: finetune, model: some/model, learning_rate: 2e-5}
  b: {run: finetune, model: some/model, load_best_model_at_end: true, eval_strategy: epoch, save_strategy: epoch}
  c: {run: distill, teacher: a, num_layers: 3, logging_steps: 7}
  d: {run: distill, teacher: [a, data], model: b, soft_weight: 0.3}
  e: {run: quantize, model: c, format: int8}
  f: {run: quantize, model: c, bits_budget: 5.2}
"""
TASK = SimpleNamespace(label_names=["no", "yes"])
DATA = SimpleNamespace(task=TASK, max_length=64, fingerprint="all rows", train_fingerprint="training rows")
"""The parts of `Data` that a fingerprint is of."""


@pytest.fixture
def steps(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(STEPS)
    return load_recipe(path).steps


@pytest.mark.parametrize(
    ("name", "run", "options", "inputs", "rows"),
    [
        ("a", "finetune", {"learning_rate": 2e-5}, {}, "training rows"),
        (
            "b",
            "finetune",
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            {},
            "all rows",
        ),
        ("c", "distill", {"num_layers": 3}, {}, "training rows"),
        ("d", "distill", {"soft_weight": 0.3}, {"data": "data"}, "training rows"),
        ("e", "quantize", {"format": "int8"}, {}, [["no", "yes"], 64]),
        ("f", "quantize", {"bits_budget": 5.2}, {}, [["no", "yes"], 64, "training rows"]),
    ],
)
def test_fingerprints_are_of_the_options_given_the_inputs_and_the_rows(steps, name, run, options, inputs, rows):
    for data, of_rows in ((DATA, rows), (None, None)):
        identity = json.dumps([2, run, options, {"model": "its", **inputs}, of_rows], sort_keys=True)
        expected = hashlib.sha256(identity.encode()).hexdigest()
        assert _fingerprint(steps[name], {"model": "its"}, data) == expected
    assert FINGERPRINT_VERSION == 2


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("a", {"train", "unlabelled"}),
        ("b", {"train", "validation"}),
        ("c", {"train", "unlabelled"}),
        ("e", set()),
        ("f", {"train", "unlabelled"}),
    ],
)
def test_the_splits_that_change_a_model_follow_from_its_options(steps, name, splits):
    step = steps[name]
    assert VERBS[step.run].splits(step.options, ["train", "validation"]) == splits


def test_only_what_is_trained_gets_a_head_drawn_anew():
    of_the_task = {
        (name, option) for name in VERBS for option in ("teacher", "teacher 2", "model") if needs_head(option, name)
    }
    made_otherwise = {(name, "model") for name in VERBS if not VERBS[name].trains}
    assert of_the_task == {("distill", "teacher"), ("distill", "teacher 2")} | made_otherwise
