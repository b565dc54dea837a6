"""Wrong inputs of every sort: each ends with exit status 2 and one message, and leaves nothing behind."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distill.cli import main
from distill.compression.quantization.quantize import quantize_model
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
    "a folder for a recipe": (["run", "right"], {}, "right: is a folder; name a recipe, a YAML file"),
    "a recipe that can't be read": (["check", "/proc/self/mem"], {}, "/proc/self/mem: cannot be read ("),
    "steps that are a list": (RUN, {"steps": ["a"]}, "steps: missing; a recipe names at least one step"),
    "a step that is a word": (RUN, {"steps.int8": "quantize"}, "steps.int8.run: missing; one of finetune"),
    "a verb that is a list": (RUN, {"steps.int8.run": ["quantize"]}, "no verb ['quantize']"),
    "a step named as a path": (RUN, {"steps.int8": None, "steps.a/b": {"run": "quantize", "model": "student",
                               "format": "int8"}}, "steps.a/b: a step's name is at most 100 letters"),
    "a step with a line break": (RUN, {"steps.a\n": {"run": "quantize", "model": "student", "format": "int8"}},
                                 "a step's name is at most 100 letters"),
    "a step named too long": (RUN, {f"steps.{'a' * 101}": {"run": "quantize", "model": "student", "format": "int8"}},
                              "a step's name is at most 100 letters"),
    "no folder": (RUN, {"output_dir": ""}, "output_dir: missing; say where the run folders go"),
    "a folder with too long a name": (RUN, {"output_dir": "x" * 5000}, "is no path; say where the run folders go"),
    "a model with too long a name": (["eval", "x" * 5000], {}, "no file or folder can be looked for there"),
    "a home of nobody": (["eval", "~nobody-of-that-name/x"], {}, "no file or folder can be looked for there"),
    "a seed below zero": (RUN, {"data.seed": -1}, "data.seed: should be greater than or equal to 0"),
    "a seed that torch refuses": (RUN, {"steps.teacher.seed": 10**30}, "steps.teacher.seed: should be less than"),
    "a flag that is no YAML": ([*RUN, "--teacher.max_steps", "["], {}, "--teacher.max_steps: '[' is no YAML value"),
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
    # eval and bench
    "eval of rows that are not named": (["eval", "right"], {}, "right: say which rows to score it on, with --task"),
    "eval with a flag that is no YAML": (["eval", "right", "--data.max_length", "["], {}, "'[' is no YAML value"),
    "eval with a label map that is none": (["eval", "right", "--label_map", "{"], {}, "--label_map: '{' is no YAML"),
    "bench of no folder": (["bench", "./none"], {}, "./none: no such file or folder"),
    "bench of a broken config": (["bench", "broken"], {}, "broken: its config.json cannot be read"),
    "bench with a flag that is no YAML": (["bench", "right", "--rounds", "["], {}, "--rounds: '[' is no YAML value"),
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


TEXTS = {
    "nothing": ("", "a recipe is a mapping with task (or data), output_dir and steps"),
    "bytes": (b"\0\1\2", "not readable as YAML: unacceptable character #x0000"),
    "UTF-16": ("steps: {}".encode("utf-16"), "not readable as YAML: no text in UTF-8 from byte 0 on"),
    "a tab": ("steps:\n\ta: 1", "not readable as YAML: line 2, column 1: while scanning for the next token"),
    "a key twice": ("task: sst2\nsteps: {}\ntask: cola", "line 3, column 1: key 'task' stands there twice"),
    "code": ("a: !!python/object/apply:os.system [exit]", "line 1, column 4: the tag "),
    "two documents": ("task: sst2\n---\ntask: cola", "line 2, column 1: expected a single document"),
    "a bomb": ("a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 20)),
               "aliases stand for more than 100,000 values"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["check", "run", "report"])
@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_recipe_is_told_in_one_message(name, command, tmp_path, capsys):
    text, message = TEXTS[name]
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([command, str(tmp_path if command == "report" else tmp_path / "recipe.yaml")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_keys_that_yaml_1_1_takes_for_other_things_are_words(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("task: sst2\noutput_dir: x\non: 1\n2020-01-01: 2\nsteps: {yes: {run: no}}\n")
    assert main(["check", str(tmp_path / "recipe.yaml")]) == 2
    said = capsys.readouterr().err
    for problem in ("on: unknown key", "2020-01-01: unknown key", "steps.yes.run: no verb 'no'"):
        assert problem in said


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run with its report, beside which nothing is wrong."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = changed(inputs.recipe, {"steps.student": None, "steps.int8.model": "teacher"})
    recipe = changed(recipe, {"benchmark.rounds": 1, "benchmark.throughput_batch_size": 2})
    recipe = changed(recipe, {"data.path": str(inputs.folder / "rows.jsonl"), "output_dir": "run"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "recipe.yaml"]) == 0
    return folder


PUSH = ["push", "run/int8", "--repo-id", "me/it", "--dry-run", "dry"]
BREAKS = {
    "push of no folder": (["push", "run/none", *PUSH[2:]], {}, "run/none: no such run folder"),
    "push of a file": (["push", "recipe.yaml", *PUSH[2:]], {}, "recipe.yaml: no such run folder"),
    "push of a run": (["push", "run", *PUSH[2:]], {}, "name a step of it: run/int8, run/teacher"),
    "push without a token": (PUSH[:-2], {}, "no token for the Hub"),
    "push into a file": ([*PUSH[:-1], "recipe.yaml"], {}, "--dry-run: recipe.yaml is not empty"),
    "push below a file": ([*PUSH[:-1], "recipe.yaml/x"], {}, "--dry-run: recipe.yaml/x cannot be written"),
    "push of half a record": (PUSH, {"int8/step.json": '{"name": "in'}, "run/int8: no run folder (no step.json)"),
    "push of a list": (PUSH, {"int8/step.json": "[]"}, "run/int8: no run folder (no step.json)"),
    "push of a step that runs": (PUSH, {"int8/step.json": '{"status": "running"}'}, "the step is not finished"),
    "push of an older record": (PUSH, {"int8/step.json": '{"status": "finished", "name": "int8"}'},
                                "its step.json lacks run, kind, "),
    "push of half a report": (PUSH, {"report.json": "{"}, "report.json: cannot be read"),
    "push of another report": (PUSH, {"report.json": "[1]"}, "report.json: no report of this version of distill"),
    "push of a later record": (PUSH, {"int8/step.json": '{"schema": 2}'}, "int8/step.json: has schema 2, and this"),
    "push of a later report": (PUSH, {"report.json": '{"schema": 2}'}, "report.json: has schema 2, and this"),
    "push without report.md": (PUSH, {"report.md": None}, "report.md: cannot be read"),
    "push without a recipe": (PUSH, {"recipe.yaml": None}, "recipe.yaml: no such recipe"),
    "push of another recipe": (PUSH, {"recipe.yaml": "steps: [a]"}, "is not the recipe that `distill run` wrote there"),
    "push without weights": (PUSH, {"int8/model.safetensors": None}, "lacks its config.json or its weights"),
    "push of half the weights": (PUSH, {"int8/model.safetensors": "1"}, "int8/model.safetensors: cannot be read"),
    "push of half a config": (PUSH, {"int8/config.json": "{"}, "int8/config.json: cannot be read"),
    "push of a token": (PUSH, {"int8/chat_template.jinja": f"x\nhf_{'aB' * 17}"},
                        "chat_template.jinja: line 2 holds what looks like a token of the Hub"),
    "report of no run": (["report", "run/int8"], {}, "run/int8: no run lies there (no recipe.yaml"),
    "report over a folder": (["report", "run"], {"report.md": None, "report.md/a": ""}, "is a folder, and the report"),
    "report of older steps": (["report", "run"], {"teacher/step.json": "{", "int8/step.json": '{"status": "finished"}'},
                              "run: no step of the recipe is finished there"),
    "eval of half a record": (["eval", "run/teacher"], {"teacher/step.json": "{"}, "say which rows to score it on"),
    "eval of an older record": (["eval", "run/teacher"], {"teacher/step.json": '{"data": {}}'}, "say which rows"),
    "eval of half the weights": (["eval", "run/teacher"], {"teacher/model.safetensors": "1"}, "weights cannot be"),
    "eval of half a tokenizer": (["eval", "run/teacher"], {"teacher/tokenizer.json": "{"}, "tokenizer cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_run_folder_ends_with_one_message_and_stays_as_it_is(finished, name, tmp_path, monkeypatch, capsys):
    arguments, files, message = BREAKS[name]
    shutil.copytree(finished, tmp_path / "at")
    monkeypatch.chdir(tmp_path / "at")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for file, content in files.items():
        path = Path("run", file)
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
    before = listing(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("error:") == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    assert {path: time for path, time in listing(tmp_path).items() if Path(path).is_file()} == {
        path: time for path, time in before.items() if Path(path).is_file()
    }


def test_the_run_that_they_break_is_right(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished)
    assert main([*PUSH[:-1], str(tmp_path / "dry")]) == 0
    assert main(["report", "run"]) == 0


def test_the_recipe_that_they_spoil_is_right(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs.folder)
    assert main(["check", "recipe.yaml"]) == 0


def changed(recipe, changes):
    """The recipe with the values at some paths replaced; None takes one out."""
    recipe = json.loads(json.dumps(recipe))
    for path, value in changes.items():
        *parents, last = path.split(".", 2) if path.startswith("steps.") else path.split(".")
        place = recipe
        for key in parents:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    return recipe


def listing(folder: Path):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
