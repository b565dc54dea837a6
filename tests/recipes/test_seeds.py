"""`seeds:` of a recipe: which steps are there once per seed, what they start from, and what is told of wrong ones."""

import pytest
import yaml

from distill.errors import InputError
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import save_recipe

STEPS = {
    "trimmed": {"run": "trim_vocabulary", "model": "any", "vocab_size": 100},
    "teacher": {"run": "finetune", "model": "trimmed"},
    "other": {"run": "finetune", "model": "any", "max_steps": 3},
    "student": {"run": "distill", "teacher": ["teacher", "other"], "num_layers": 2},
    "small": {"run": "quantize", "model": "student", "format": "nf4"},
    "plain": {"run": "quantize", "model": "any", "format": "int8"},
}


def load(folder, steps=STEPS, overrides=None, **more):
    path = folder / "recipe.yaml"
    content = {"task": "sst2", "output_dir": str(folder / "run"), **more, "steps": steps}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(path, overrides)


def test_what_depends_on_a_training_is_there_once_per_seed(tmp_path):
    recipe = load(tmp_path, seeds=[7, 1])
    assert list(recipe.steps) == [
        *("trimmed", "teacher", "teacher.seed1", "other", "other.seed1", "student", "student.seed1"),
        *("small", "small.seed1", "plain"),
    ]
    assert recipe.seeds == (7, 1)
    assert recipe.copies == {name: (name, f"{name}.seed1") for name in ("teacher", "other", "student", "small")}
    given = {name: step.given for name, step in recipe.steps.items()}
    assert given["teacher"] == {"model": "trimmed", "seed": 7}
    assert given["teacher.seed1"] == {"model": "trimmed", "seed": 1}
    assert given["student.seed1"] == {"teacher": ["teacher.seed1", "other.seed1"], "num_layers": 2, "seed": 1}
    assert given["small.seed1"] == {"model": "student.seed1", "format": "nf4"}
    assert given["small"] == {"model": "student", "format": "nf4"}


def test_an_override_counts_for_every_seed(tmp_path):
    recipe = load(tmp_path, overrides={"student.temperature": "4", "seeds": "[0, 3, 5]"})
    assert [recipe.steps[name].options.temperature for name in recipe.copies["student"]] == [4, 4, 4]
    assert recipe.copies["student"] == ("student", "student.seed3", "student.seed5")


def test_the_recipe_in_the_folder_is_the_one_that_was_run(tmp_path):
    recipe = load(tmp_path, seeds=[0, 1])
    save_recipe(recipe)
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["seeds"] == [0, 1]
    assert written["steps"] == STEPS
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert {name: step.given for name, step in again.steps.items()} == {
        name: step.given for name, step in recipe.steps.items()
    }


def test_a_recipe_without_seeds_is_written_as_before(tmp_path):
    save_recipe(load(tmp_path, {"teacher": {"run": "finetune", "model": "any", "seed": 3}}))
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert "seeds" not in written
    assert written["steps"] == {"teacher": {"run": "finetune", "model": "any", "seed": 3}}


@pytest.mark.parametrize(
    ("seeds", "changes", "messages"),
    [
        ([0], {}, ["seeds: should be two or more different whole numbers"]),
        ([0, 0], {}, ["seeds: should be two or more different whole numbers"]),
        ([0, -1], {}, ["seeds: should be two or more different whole numbers"]),
        ([0, 1.5], {}, ["seeds: should be two or more different whole numbers"]),
        (3, {}, ["seeds: should be two or more different whole numbers"]),
        ([0, 1], {"teacher": {**STEPS["teacher"], "seed": 4}}, ["steps.teacher.seed: seeds gives every training"]),
        ([0, 1], {"student.seed1": STEPS["plain"]}, ["steps.student.seed1: is what seeds calls"]),
        ([0, 1], {"student": {"run": "distill", "teacher": "teacher", "nums": 2}}, ["steps.student.nums: unknown"]),
    ],
)  # fmt: skip
def test_wrong_seeds_are_told_once(tmp_path, seeds, changes, messages):
    with pytest.raises(InputError) as error:
        load(tmp_path, {**STEPS, **changes}, seeds=seeds)
    assert len(error.value.problems) == len(messages)
    for problem, message in zip(error.value.problems, messages, strict=True):
        assert message in problem


def test_seeds_without_a_training_are_refused(tmp_path):
    with pytest.raises(InputError, match="no step trains"):
        load(tmp_path, {"plain": STEPS["plain"]}, seeds=[0, 1])


def test_no_step_is_called_seeds(tmp_path):
    with pytest.raises(InputError, match="no top-level key"):
        load(tmp_path, {"seeds": STEPS["plain"]})


def test_problems_of_models_are_told_once_and_fingerprints_are_of_the_seed_alone(tmp_path, pretrained, sst2_folder):
    data = {"path": str(sst2_folder), "max_length": 24}
    steps = {
        "teacher": {"run": "finetune", "model": str(pretrained)},
        "student": {"run": "distill", "teacher": "teacher", "num_layers": 9},
    }
    with pytest.raises(InputError) as error:
        make_plan(load(tmp_path, steps, seeds=[0, 1, 2], data=data))
    assert len(error.value.problems) == 1
    steps["student"]["num_layers"] = 2
    seeded = make_plan(load(tmp_path, steps, seeds=[42, 1], data=data)).steps
    by_hand = {
        "teacher": steps["teacher"],
        "again": {**steps["teacher"], "seed": 1},
        "student": steps["student"],
        "once-more": {**steps["student"], "teacher": "again", "seed": 1},
    }
    found = make_plan(load(tmp_path, by_hand, data=data)).steps
    pairs = [("teacher", "teacher"), ("teacher.seed1", "again"), ("student", "student"), ("student.seed1", "once-more")]
    for ours, other in pairs:
        assert seeded[ours].fingerprint == found[other].fingerprint
    assert seeded["student.seed1"].folder == tmp_path / "run" / "student.seed1"
