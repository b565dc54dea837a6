"""Which of Trainer's options a recipe may give, and what their values may be."""

import json
from dataclasses import fields
from typing import get_type_hints

import pytest
from transformers import TrainingArguments

from distill.errors import InputError
from distill.recipes.recipe import load_recipe
from distill.recipes.trainer_options import annotations_of, refusal
from distill.verbs.finetune import FinetuneOptions
from distill.verbs.quantize import QuantizeOptions

OF_THE_HUB = [
    field.name for field in fields(TrainingArguments) if field.name.startswith(("hub_", "push_to_hub", "trackio_"))
]


def problems(tmp_path, options, verb="finetune", **overrides):
    path = tmp_path / "r.yaml"
    path.write_text(f"task: sst2\noutput_dir: out\nsteps:\n  a: {{run: {verb}, model: some/model, {options}}}\n")
    with pytest.raises(InputError) as error:
        load_recipe(path, overrides)
    return [problem.removeprefix(f"{path}: ") for problem in error.value.problems]


def test_what_uploads_around_push_is_refused_and_names_it(tmp_path):
    assert {"push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_private_repo"} <= set(OF_THE_HUB)
    for verb in ("finetune", "quantize"):
        found = problems(tmp_path, ", ".join(f"{name}: hf_secret" for name in OF_THE_HUB), verb)
        assert len(found) == len(OF_THE_HUB)
        for name, problem in zip(OF_THE_HUB, found, strict=True):
            assert problem.startswith(f"steps.a.{name}: ")
            assert "`push:`" in problem
            assert "hf_secret" not in problem
    (flag,) = problems(tmp_path, "seed: 1", **{"a.hub_token": "hf_secret"})
    assert flag.startswith("--a.hub_token: ")
    assert "hf_secret" not in flag


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("optim: adam", "optim: should be 'adamw_torch', 'adamw_torch_fused', "),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: should be 'linear', 'cosine', "),
        ("eval_strategy: sometimes", "eval_strategy: should be 'no', 'steps' or 'epoch'; got 'sometimes'"),
        ("save_strategy: sometimes", "save_strategy: should be 'no', 'steps', 'epoch' or 'best'"),
        ("log_level: loud", "log_level: should be "),
        ("train_sampling_strategy: by_length", "train_sampling_strategy: should be 'random', 'sequential', "),
        ("neftune_noise_alpha: -5", "neftune_noise_alpha: should be greater than 0"),
        ("deepspeed: none.json", "deepspeed: the package deepspeed is not installed"),
        ("fsdp_config: none.json", "fsdp_config: no such file, and no mapping; got 'none.json'"),
        ("lr_scheduler_kwargs: '{power'", "lr_scheduler_kwargs: is not JSON ("),
        ("enable_jit_checkpoint: true", "enable_jit_checkpoint: a training that it ends early would count as finished"),
        ("save_only_model: true", "save_only_model: a run that is cut off could not go on"),
        ("label_names: [y]", "label_names: is set by the run itself"),
        ("resume_from_checkpoint: x", "resume_from_checkpoint: is set by the run itself"),
    ],
)
def test_a_value_that_trainer_refuses_later_is_told_with_its_option(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr("distill.recipes.trainer_options.is_deepspeed_available", lambda: False)
    (found,) = problems(tmp_path, options)
    assert found.startswith(f"steps.a.{message}")


def test_mappings_may_stand_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("distill.recipes.trainer_options.is_deepspeed_available", lambda: True)
    path = tmp_path / "r.yaml"
    text = "task: sst2\noutput_dir: out\nsteps: {{a: {{run: finetune, model: some/model, {}}}}}\n"
    (tmp_path / "power.json").write_text(json.dumps({"power": 2}))
    for value in ("~/power.json", str(tmp_path / "power.json"), "'{\"power\": 2}'", "{power: 2}"):
        path.write_text(text.format(f"lr_scheduler_type: polynomial, lr_scheduler_kwargs: {value}"))
        assert load_recipe(path).steps["a"].options.lr_scheduler_kwargs == {"power": 2}
    for content, message in (("[1]", "should be a mapping"), ("{", "is not JSON")):
        (tmp_path / "ds.json").write_text(content)
        (found,) = problems(tmp_path, "deepspeed: ~/ds.json")
        assert found.startswith(f"steps.a.deepspeed: {message}")


def test_options_of_others_keep_their_names():
    assert refusal(QuantizeOptions, "label_names") is None  # also data.label_names
    assert refusal(FinetuneOptions, "label_names")
    assert refusal(FinetuneOptions, "report_to") is None


def test_annotations_differ_from_the_fields_own_only_where_these_are_too_wide():
    given, narrowed = get_type_hints(FinetuneOptions, include_extras=True), annotations_of(FinetuneOptions)
    changed = {name for name in given if narrowed[name] != given[name]}
    assert {"optim", "lr_scheduler_type", "eval_strategy", "save_strategy", "logging_strategy", "log_level"} <= changed
    assert not changed & {"learning_rate", "report_to", "lora", "lr_scheduler_kwargs", "debug", "seed"}


def test_an_enumerations_value_is_kept_as_a_word(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("task: sst2\noutput_dir: o\nsteps: {a: {run: finetune, model: m/m, lr_scheduler_type: cosine}}\n")
    given = load_recipe(path).steps["a"].given
    assert given["lr_scheduler_type"] == "cosine"
    assert json.dumps(given["lr_scheduler_type"]) == '"cosine"'  # in fingerprints and in recipe.yaml, as before
