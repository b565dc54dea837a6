"""Wrong inputs of every sort: each ends with exit status 2 and one message, and leaves nothing behind."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distill.cli import main
from distill.quantize import quantize_model
from tests.conftest import sentences, tiny_bert, write_rows

NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer, pretrained):
    """Models and data, each with one thing wrong, and the recipe that names right ones."""
    folder = tmp_path_factory.mktemp("wrong")
    models = {
        "right": tiny_bert(**NAMES),
        "quantized": quantize_model(tiny_bert(**NAMES), format="int8"),
        "others": tiny_bert(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}),
        "no-tokenizer": tiny_bert(**NAMES),
        "pickled": tiny_bert(**NAMES),
        "broken": tiny_bert(**NAMES),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        if name != "no-tokenizer":
            tokenizer.save_pretrained(folder / name)
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    (folder / "broken" / "config.json").write_text("{")
    rows = [{"text": row["sentence"], "label": row["label"]} for row in sentences(40)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "no-label.jsonl", [{"text": row["text"]} for row in rows])
    write_rows(folder / "one-class.jsonl", [{**row, "label": 1} for row in rows])
    (folder / "empty.csv").touch()
    (folder / "rows.xlsx").write_bytes(b"PK")
    recipe = {
        "output_dir": "out",
        "data": {
            "kind": "classification",
            "path": "rows.jsonl",
            "max_length": 24,
            "label_names": ["negative", "positive"],
        },
        "benchmark": {"sequence_length": 16},
        "steps": {
            "teacher": {"run": "finetune", "model": str(pretrained), "max_steps": 2},
            "student": {"run": "distill", "teacher": "teacher", "num_layers": 2},
            "int8": {"run": "quantize", "model": "student", "format": "int8"},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "broken.yaml").write_text("steps: [a, b\n")
    (folder / "twice.yaml").write_text("steps: {a: {run: finetune}, a: {run: finetune}}\n")
    return SimpleNamespace(folder=folder, recipe=recipe)


RUN = ["run", "recipe.yaml"]
CASES = {
    # the recipe
    "no such recipe": (["run", "recipes.yaml"], {}, "recipes.yaml: no such recipe; did you mean 'recipe.yaml'?"),
    "no YAML": (["run", "broken.yaml"], {}, "broken.yaml: not readable as YAML"),
    "a step twice": (["run", "twice.yaml"], {}, "key 'a' stands there twice"),
    "a mistyped key": (RUN, {"ouput_dir": "x"}, "ouput_dir: unknown key; did you mean 'output_dir'?"),
    "a mistyped verb": (RUN, {"steps.int8.run": "quantise"}, "no verb 'quantise'; did you mean 'quantize'?"),
    "a mistyped option": (RUN, {"steps.student.temprature": 2}, "unknown option; did you mean 'temperature'?"),
    "a word for a number": (RUN, {"steps.student.temperature": "hot"}, "steps.student.temperature: should be a valid"),
    "a later step": (RUN, {"steps.teacher.model": "int8"}, "steps.teacher.model: 'int8' is not an earlier step"),
    "too many layers": (RUN, {"steps.student.num_layers": 9}, "9 is out of range; the model has 4 layers"),
    "a flag of no step": ([*RUN, "--studnt.seed", "1"], {}, "--studnt.seed: no such step or key; did you mean"),
    "an unknown step to run": ([*RUN, "--only", "studnt"], {}, "--only studnt: no such step; did you mean 'student'?"),
    "a file for a folder": (RUN, {"output_dir": "rows.jsonl"}, "output_dir: rows.jsonl is a file"),
    "a folder that can't be made": (RUN, {"output_dir": "/proc/none"}, "output_dir: /proc/none cannot be written"),
    "another tool's name": (RUN, {"steps.student.batch_size": 8}, "did you mean 'per_device_train_batch_size'?"),
    "a teacher to fine-tune": (RUN, {"steps.teacher.teacher": "x"}, "a teacher belongs to run: distill"),
    # data
    "no such task": (RUN, {"task": "sst3", "data": {"max_length": 24}}, "is not a GLUE task; did you mean 'sst2'?"),
    "no such data": (RUN, {"data.path": "./row.jsonl"}, "data.path: ./row.jsonl: no such file or folder"),
    "an empty file": (RUN, {"data.path": "empty.csv"}, "empty.csv: the file is empty"),
    "another kind of file": (RUN, {"data.path": "rows.xlsx"}, "rows.xlsx: not a .csv, .tsv, .json"),
    "no label column": (RUN, {"data.path": "no-label.jsonl"}, "train has no column 'label'"),
    "no text column": (RUN, {"data.text": "body"}, "train has no column 'body'"),
    "a text that is the label": (RUN, {"data.text": ["text", "label"]}, "data.text: 'label' is the label"),
    "one class": (RUN, {"data.path": "one-class.jsonl", "data.label_names": None}, "holds 1 class;"),
    # models
    "no such model": (RUN, {"steps.student.model": "./none"}, "steps.student.model: ./none: no such file or folder"),
    "pickled weights": (RUN, {"steps.student.teacher": "pickled"}, "pytorch_model.bin is pickled and not read"),
    "no tokenizer": (RUN, {"steps.student.teacher": "no-tokenizer"}, "no-tokenizer: holds no tokenizer"),
    "a broken config": (RUN, {"steps.student.teacher": "broken"}, "broken: its config.json cannot be read"),
    "other labels": (RUN, {"steps.student.teacher": "others"}, "its labels (cat, dog) are not those of the task"),
    "too long rows": (RUN, {"data.max_length": 65, "steps.student": None, "steps.int8": None}, "at most 64 tokens"),
    "too long to measure": (RUN, {"benchmark.sequence_length": 65}, "65, but teacher takes at most 64 tokens"),
    "a quantized start": (RUN, {"steps.student.teacher": "right", "steps.student.model": "quantized"}, "is quantized;"),
    # the Hub
    "a push of no step": (RUN, {"push": {"studnt": "me/it"}}, "push.studnt: no step 'studnt'; did you mean 'student'?"),
    "a push to no name": (RUN, {"push": {"student": "me/a b"}}, "push.student: 'me/a b' is no repository name"),
    "a push without a token": (RUN, {"push": {"student": "me/it"}}, "no token for the Hub: log in"),
    "a folder as base model": (RUN, {"base_model": "right"}, "base_model: should name a model on the Hub"),
    "no license of the Hub's": (RUN, {"license": "Apache 2.0"}, "license: should be one of the Hub's identifiers"),
    "no language code": (RUN, {"language": "English"}, "language: should be codes of two or three letters, like en"),
    "nothing to push": (["push", "right", "--repo-id", "me/it"], {}, "right: no run folder (no step.json)"),
    "an unreachable model": (RUN, {"steps.teacher.model": "acme/none"}, "acme/none: no such folder here, and"),
    # launching
    "no processes": ([*RUN, "--accelerate_config", "multi_cpu", "--num_processes", "0"], {}, "0 are too few"),
    "no such launch": ([*RUN, "--accelerate_config", "multi_gpux"], {}, "did you mean 'multi_gpu'"),
    "a launch of no recipe": (["run", "none.yaml", "--accelerate_config", "cpu"], {}, "none.yaml: no such recipe"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_ends_with_one_message_and_leaves_nothing(inputs, name, tmp_path, monkeypatch, capsys):
    arguments, changes, message = CASES[name]
    monkeypatch.chdir(inputs.folder)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if changes:
        recipe = changed(inputs.recipe, changes)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        arguments = [arguments[0], str(tmp_path / "recipe.yaml"), *arguments[2:]]
    before = listing(inputs.folder)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("error:") == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    assert listing(inputs.folder) == before
    assert len(list(tmp_path.iterdir())) == bool(changes)


def test_the_recipe_that_they_spoil_is_right(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs.folder)
    assert main(["check", "recipe.yaml"]) == 0


def changed(recipe, changes):
    """The recipe with the values at some paths replaced; None takes one out."""
    recipe = json.loads(json.dumps(recipe))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = recipe
        for key in parents:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    return recipe


def listing(folder: Path):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
