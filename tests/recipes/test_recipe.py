from dataclasses import fields
from pathlib import Path

import pytest
import transformers

from distill.cli import main
from distill.errors import InputError
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.recipes.yaml12 import parse_yaml
from distill.runs.launch import find_config
from distill.training.config import TrainingConfig
from distill.verbs.distill import DistillOptions
from distill.verbs.finetune import FinetuneOptions
from distill.verbs.quantize import QuantizeOptions

RECIPE = """
task: sst2
output_dir: runs/x
data: {max_length: 64}
steps:
  teacher:
    run: finetune
    model: some/model
    learning_rate: 2e-5
    lr_scheduler_type: cosine
    eval_strategy: no
  student.v1: {run: distill, teacher: teacher, num_layers: 3, layer_map: [[0, 0], [3, 6]]}
  q: {run: quantize, model: student.v1, format: int8}
"""


def load(tmp_path, text=RECIPE, **overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def problems(tmp_path, text, **overrides):
    with pytest.raises(InputError) as error:
        load(tmp_path, text, **overrides)
    assert all(str(tmp_path / "recipe.yaml") in problem or "--" in problem for problem in error.value.problems)
    return error.value.problems


def test_values_get_the_types_of_their_fields(tmp_path):
    recipe = load(tmp_path)
    teacher, student, quantized = (step.options for step in recipe.steps.values())
    assert isinstance(teacher, FinetuneOptions)
    assert teacher.learning_rate == 2e-5
    assert teacher.eval_strategy == "no"  # YAML 1.1 would make it false
    assert isinstance(student, DistillOptions)
    assert student.layer_map == [(0, 0), (3, 6)]
    assert isinstance(quantized, QuantizeOptions)
    assert recipe.output_dir == Path("runs/x")
    assert student.output_dir == "runs/x/student.v1/checkpoints"
    assert recipe.data.max_length == 64


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, pretrained, sst2_folder, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(pretrained)
    (tmp_path / "rows").symlink_to(sst2_folder)
    (tmp_path / "fsdp.json").write_text('{"min_num_params": 7}')
    (tmp_path / "r.yaml").write_text(
        "task: sst2\noutput_dir: ~/run\ndata: {path: ~/rows, max_length: 24}\nsteps:\n"
        "  a: {run: finetune, model: ~/model, max_steps: 1, fsdp_config: ~/fsdp.json}\n"
        "  b: {run: distill, teacher: a, cache_dir: ~/cache, num_layers: 2}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.output_dir == tmp_path / "run"
    first, second = (step.options for step in recipe.steps.values())
    assert first.output_dir == str(tmp_path / "run" / "a" / "checkpoints")
    assert first.fsdp_config["min_num_params"] == 7
    assert second.cache_dir == str(tmp_path / "cache")
    made = make_plan(recipe)
    assert made.steps["a"].plan.inputs["model"].location == str(tmp_path / "model")
    for command, folder in (("report", "~/run"), ("push", "~/run/a"), ("run", "~/no.yaml")):
        assert main([command, folder, *(["--repo-id", "me/it"] if command == "push" else [])]) == 2
        assert str(tmp_path) in "".join(capsys.readouterr().err.split())
    assert find_config("~/fsdp.json") == tmp_path / "fsdp.json"


def test_overrides_by_path(tmp_path):
    recipe = load(
        tmp_path,
        **{
            "teacher.learning_rate": "1e-4",
            "student.v1.temperature": "4",
            "data.max_length": "32",
            "output_dir": "runs/y",
            "baseline": "q",
            "student.v1.layers": "[0, 2, 5]",
            "teacher.eval_strategy": "no",
        },
    )
    assert recipe.steps["teacher"].options.learning_rate == 1e-4
    assert recipe.steps["student.v1"].options.temperature == 4.0
    assert recipe.steps["student.v1"].options.layers == [0, 2, 5]
    assert recipe.steps["teacher"].options.output_dir == "runs/y/teacher/checkpoints"
    assert (recipe.data.max_length, recipe.baseline) == (32, "q")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("off", "off"), ("true", True), ("null", None), ("", None), ("2e-5", 2e-5), (".5", 0.5),
        ("1:30", "1:30"), ("012", 12), ("0x10", 16), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("-3", -3),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def test_every_problem_is_told_at_once_with_the_nearest_name(tmp_path):
    found = problems(
        tmp_path,
        """
taks: sst2
output_dir: runs/x
steps:
  teacher: {run: finetun, model: m}
  student: {run: distill, techer: teacher, temprature: 2, soft_weight: much, num_train_epochs: -}
  q: {run: quantize, model: student, format: int4}
  "bad name": {run: quantize}
  data: {run: quantize}
""",
        **{"studnt.temperature": "4"},
    )
    text = "\n".join(found)
    for part in (
        "taks: unknown key; did you mean 'task'?",
        "steps.teacher.run: no verb 'finetun'; did you mean 'finetune'?",
        "steps.student.techer: unknown option; did you mean 'teacher'?",
        "steps.student.temprature: unknown option; did you mean 'temperature'?",
        "steps.student.soft_weight: should be a valid number, unable to parse string as a number; got 'much'",
        "steps.student.teacher: missing. The fine-tuned teacher",
        "steps.q.format: should be 'int8', 'nf4', 'fp4' or 'bf16'; got 'int4'",
        "steps.bad name: a step's name is at most 100 letters, digits",
        "steps.data: a step's name is",
        "--studnt.temperature: no such step or key; did you mean 'student'?",
    ):
        assert part in text, f"{part!r} is not in\n{text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {", "not readable as YAML"),
        ("[1, 2]", "a recipe is a mapping"),
        ("task: sst2\noutput_dir: x", "steps: missing"),
        ("output_dir: x\nsteps: {a: {run: finetune, model: m, seed: 1, seed: 2}}", "key 'seed' stands there twice"),
        ("steps: {a: {run: finetune, model: m}}", "output_dir: missing"),
        ("output_dir: x\nsteps: {a: {run: finetune, model: m, output_dir: y}}", "is set by the run itself"),
        (
            "output_dir: x\nsteps: {a: {run: finetune, model: m, fp16: true, bf16: true}}",
            "At most one of fp16 and bf16",
        ),
        ("output_dir: x\nsteps: {a: {run: distill, teacher: t, temperature: 0}}", "should be greater than 0; got 0"),
        ("output_dir: x\nsteps: {report.json: {run: quantize, model: m, format: nf4}}", "no file that a run writes"),
        ("output_dir: x\nsteps: {a: [1]}", r"steps.a.run: missing; one of finetune, distill, "),
        ("output_dir: x\ndata: 3\nsteps: {a: {run: finetune, model: m}}", "data: should be a mapping"),
        ("output_dir: x\ndata: {max_lenth: 3}\nsteps: {a: {run: finetune, model: m}}", "did you mean 'max_length'"),
        ("output_dir: x\nsteps: {a: {run: distill, teacher: t, layer_map: [[1, b]]}}", "valid integer"),
    ],
)
def test_wrong_recipes(tmp_path, text, message):
    assert any(message in problem for problem in problems(tmp_path, text))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("learning_rate", "-1e-3", "should be greater than 0"),
        ("learning_rate", "0", "should be greater than 0"),
        ("weight_decay", "-1", "should be greater than or equal to 0"),
        ("num_train_epochs", "0", "should be greater than 0"),
        ("gradient_accumulation_steps", "0", "should be greater than or equal to 1"),
        ("per_device_train_batch_size", "0", "should be greater than or equal to 1"),
        ("per_device_eval_batch_size", "0", "should be greater than or equal to 1"),
        ("label_smoothing_factor", "1", "should be less than 1"),
        ("max_grad_norm", "-0.1", "should be greater than or equal to 0"),
        ("warmup_steps", "-1", "should be greater than or equal to 0"),
        ("adam_beta1", "1", "should be less than 1"),
        ("adam_beta2", "-0.1", "should be greater than or equal to 0"),
        ("adam_epsilon", "0", "should be greater than 0"),
        ("max_steps", "0", "should be -1 or should be greater than or equal to 1"),
        ("max_steps", "-2", "should be -1 or should be greater than or equal to 1"),
    ],
)
def test_values_out_of_range_are_told(tmp_path, option, value, message):
    (problem,) = problems(tmp_path, RECIPE, **{f"teacher.{option}": value})
    assert f"teacher.{option}: {message}; got" in problem


def test_values_and_what_the_options_say_together_are_told_at_once(tmp_path):
    found = problems(
        tmp_path,
        "output_dir: x\nsteps: {a: {run: finetune, fp16: true, bf16: true, learning_rate: -1, num_layer: 2}}",
    )
    text = "\n".join(found)
    for part in (
        "steps.a.learning_rate: should be greater than 0",
        "steps.a.num_layer: unknown option; did you mean 'num_layers'?",
        "steps.a.model: missing",
        "steps.a: At most one of fp16 and bf16",
    ):
        assert part in text, f"{part!r} is not in\n{text}"
    assert len(found) == 4


def test_ranges_keep_the_defaults_and_help_of_transformers():
    theirs = {field.name: field for field in fields(transformers.TrainingArguments)}
    ours = {field.name: field for field in fields(TrainingConfig)}
    for name in ("learning_rate", "num_train_epochs", "max_grad_norm", "adam_beta1", "adam_epsilon", "max_steps"):
        assert ours[name].default == theirs[name].default
        assert ours[name].metadata["help"] == theirs[name].metadata["help"]
    assert TrainingConfig(output_dir="x").max_steps == -1


def test_a_missing_recipe_names_a_near_one(tmp_path):
    (tmp_path / "sst2.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match=r"no such recipe; did you mean '.*sst2.yaml'"):
        load_recipe(tmp_path / "stt2.yaml")


def test_a_missing_recipe_suggests_recipes_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".pre-commit-config.yaml").write_text("repos: []")
    with pytest.raises(InputError, match=r"^pre-commit.yaml: no such recipe$"):
        load_recipe(Path("pre-commit.yaml"))
    recipe = tmp_path / "recipes" / "glue" / "sst2.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(RECIPE)
    (recipe.parent / ".sst3.yaml").write_text("hidden")
    for given in ("sst3.yaml", "recipes/sst2.yaml", "nowhere/st2.yml"):
        with pytest.raises(InputError, match=r"no such recipe; did you mean 'recipes/glue/sst2.yaml'\?"):
            load_recipe(Path(given))
    with pytest.raises(InputError, match=r"no such recipe; known: recipes/glue/sst2.yaml$"):
        load_recipe(Path("pre-commit.yaml"))


def test_anchors_and_unicode(tmp_path):
    recipe = load(
        tmp_path,
        "output_dir: läufe\nsteps:\n  a: {run: finetune, model: &m org/x}\n  b: {run: finetune, model: *m, seed: 7}\n",
    )
    assert recipe.steps["b"].options.model == "org/x"
    assert recipe.output_dir == Path("läufe")


def test_a_merged_mapping_may_be_overridden(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        "output_dir: x\nsteps:\n  a: &a {run: finetune, model: m, seed: 1}\n  b: &b\n    <<: *a\n    seed: 2\n"
        "  c:\n    <<: *b\n    model: n\n"
    )
    steps = load_recipe(path).steps
    assert [(step.options.model, step.options.seed) for step in steps.values()] == [("m", 1), ("m", 2), ("n", 2)]
