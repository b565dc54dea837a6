"""Whole runs on tiny models: one folder per step, nothing done twice, nothing lost."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import distill  # noqa: F401  (registers the quantized formats)
from distill.common.records import read_record
from distill.errors import InputError
from distill.evaluation.evaluate import Evaluation
from distill.recipes import fingerprint as code_module
from distill.recipes.check import print_plan
from distill.recipes.finished import is_finished, remarks_on
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports import report as report_module
from distill.reports.report import write_report
from distill.runs.run import run_plan
from tests.conftest import sentences, tiny_bert, write_rows

STEPS = """
  teacher: {{run: finetune, model: {pretrained}, max_steps: 48, learning_rate: 2e-3, per_device_train_batch_size: 8}}
  student: {{run: distill, teacher: teacher, num_layers: 2, num_train_epochs: 2, learning_rate: 1e-3}}
  student-alone: {{run: finetune, model: {pretrained}, num_layers: 2, num_train_epochs: 2, learning_rate: 1e-3}}
  student-int8: {{run: quantize, model: student, format: int8}}
  student-nf4: {{run: quantize, model: student, format: nf4}}
"""


def write_recipe(folder, pretrained, data, steps=STEPS):
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {data}, max_length: 24}}\n"
        f"benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 2}}\n"
        f"steps:{steps.format(pretrained=pretrained)}"
    )
    return path


def plan(path, **overrides):
    return make_plan(load_recipe(path, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pretrained, sst2_folder):
    """A finished run and its report."""
    path = write_recipe(tmp_path_factory.mktemp("finished"), pretrained, sst2_folder)
    made = plan(path)
    ran = run_plan(made)
    assert ran == list(made.steps)
    return path, asdict(write_report(made))


def test_each_step_leaves_an_ordinary_model_folder(finished):
    run = finished[0].parent / "run"
    for name in ("teacher", "student", "student-alone", "student-int8", "student-nf4"):
        found = {path.name for path in (run / name).iterdir()}
        assert found == {
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "step.json",
        }  # fmt: skip
        record = read_record(run / name)
        assert record["status"] == "finished"
        assert record["options"]["model"] or record["options"]["teacher"]
        assert AutoTokenizer.from_pretrained(run / name).model_max_length == 24
        model = AutoModelForSequenceClassification.from_pretrained(run / name)
        assert model.config.id2label == {0: "negative", 1: "positive"}
        assert len({path.stat().st_mode for path in (run / name).iterdir()}) == 1  # weights are as readable as the rest
    assert read_record(run / "student")["lineage"] == ["teacher", *read_record(run / "teacher")["parents"]]
    assert read_record(run / "student")["train_seconds"] > 0


def test_the_report_has_every_key_and_true_numbers(finished):
    path, report = finished
    on_disk = json.loads((path.parent / "run" / "report.json").read_text())
    assert on_disk == json.loads(json.dumps(report))
    assert (report["schema"], report["task"], report["metric"], report["baseline"]) == (
        1,
        "sst2",
        "accuracy",
        "teacher",
    )
    assert [model["name"] for model in report["models"]] == [
        "teacher", "student", "student-alone", "student-int8", "student-nf4",
    ]  # fmt: skip
    keys = {
        "name", "run", "path", "parents", "metrics", "retention", "agreement", "divergence", "num_parameters",
        "size_on_disk_bytes", "memory_bytes", "flops_per_sample", "latency_ms", "throughput_samples_per_second",
        "device", "train_seconds", "samples_per_second", "throughput_spread",
    }  # fmt: skip
    for model in report["models"]:
        assert keys <= set(model)
        weights = path.parent / "run" / model["path"] / "model.safetensors"
        assert model["size_on_disk_bytes"] == weights.stat().st_size
        assert model["retention"] == pytest.approx(
            model["metrics"]["accuracy"] / report["models"][0]["metrics"]["accuracy"]
        )
        low, high = model["interval"]
        assert low <= model["metrics"]["accuracy"] <= high
    teacher, student, _, int8, nf4 = report["models"]
    assert teacher["agreement"] == 1
    assert teacher["metrics"]["accuracy"] > 0.8  # it learned
    assert student["num_parameters"] == int8["num_parameters"] < teacher["num_parameters"]
    assert nf4["size_on_disk_bytes"] < student["size_on_disk_bytes"]
    assert (student["run"], student["parents"]) == ("distill", ["teacher"])
    text = (path.parent / "run" / "report.md").read_text()
    assert all(model["name"] in text for model in report["models"])
    assert "accuracy on 40 validation rows, with its 95 % interval (Wilson); " in text
    assert (path.parent / "run" / "report.png").stat().st_size > 10_000


def test_pipeline_gives_the_accuracy_of_the_report(finished, sst2_folder):
    path, report = finished
    rows = [json.loads(line) for line in (sst2_folder / "validation.jsonl").read_text().splitlines()]
    for model in report["models"]:
        classify = pipeline("text-classification", str(path.parent / "run" / model["path"]))
        answers = classify([row["sentence"] for row in rows], truncation=True)
        right = sum(a["label"] == ["negative", "positive"][row["label"]] for a, row in zip(answers, rows, strict=True))
        assert abs(right - model["metrics"]["accuracy"] * len(rows)) <= 1


def test_the_reports_flops_are_those_counted_by_hand(finished):
    teacher = finished[1]["models"][0]
    layers, hidden, feed_forward, tokens = 4, 64, 128, 16
    per_layer = 4 * tokens * hidden * hidden + 2 * tokens * tokens * hidden + 2 * tokens * hidden * feed_forward
    heads = hidden * hidden + hidden * 2  # pooler and classifier, on one token
    assert teacher["flops_per_sample"] == 2 * (layers * per_layer + heads)


def test_a_second_run_trains_and_measures_nothing(finished):
    path, report = finished
    again = plan(path)
    assert run_plan(again) == []
    assert asdict(write_report(again)) == report


def test_the_report_is_rebuilt_from_its_folder(finished, capsys):
    from distill.cli import main

    path, report = finished
    run = path.parent / "run"
    (run / "report.json").unlink()
    assert main(["report", str(run)]) == 0
    assert json.loads((run / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "student-nf4" in capsys.readouterr().out


def test_scores_are_taken_from_the_cache_of_the_same_device_libraries_and_tokenizer(finished, monkeypatch):
    made = plan(finished[0])
    name, folder = "student", made.steps["student"].folder
    cache, scored = folder.parent / ".cache", []

    def score(*arguments, **options):
        scored.append(options["name"])
        return Evaluation(**known)

    known = json.loads(json.dumps(asdict(report_module._evaluation(made, name, str(folder), "f", cache))))
    monkeypatch.setattr(report_module, "evaluate_model", score)
    read = partial(report_module._evaluation, made, name, str(folder), "f", cache)
    assert read() == Evaluation(**known)
    assert not scored
    around = report_module.environment()
    for change in ({"torch": "0"}, {"transformers": "0"}, {"gpu": "another"}):
        monkeypatch.setattr(report_module, "environment", lambda change=change: around | change)
        read()
        read()
    assert len(scored) == 3
    file = folder / "tokenizer_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"truncation_side": "left"}))
    read()
    file.write_text(before)
    assert len(scored) == 4


def test_a_report_names_what_it_leaves_out(finished, capsys):
    from distill.cli import main
    from distill.publishing.push import to_push

    run = finished[0].parent / "run"
    assert main(["report", str(run), "--student-nf4.double_quant", "false"]) == 0
    assert "left out, as they are not what the recipe would make now: student-nf4;" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"report\.json leaves it out, .*; `distill run` it again"):
        to_push(run / "student-nf4", "me/it")
    assert main(["report", str(run)]) == 0
    assert "left out" not in capsys.readouterr().err


def test_an_edited_step_reruns_with_what_depends_on_it(finished):
    path, _ = finished
    fresh = lambda **overrides: {n for n, p in plan(path, **overrides).steps.items() if not is_finished(p)}  # noqa: E731
    assert fresh() == set()
    assert fresh(**{"student.temperature": "4"}) == {"student", "student-int8", "student-nf4"}
    assert fresh(**{"student-nf4.double_quant": "false"}) == {"student-nf4"}
    assert fresh(**{"teacher.seed": "1"}) == {"teacher", "student", "student-int8", "student-nf4"}
    assert fresh(**{"data.max_train_rows": "50"}) == {
        "teacher", "student", "student-alone", "student-int8", "student-nf4",
    }  # fmt: skip
    assert fresh(**{"student.soft_weight": "1.0"}) == set()  # its default, said aloud
    assert fresh(**{"student.logging_steps": "1"}) == set()  # shows more, makes the same
    assert fresh(**{"data.max_eval_rows": "20"}) == set()  # scores fewer rows, trains on the same


@pytest.fixture
def change_code(tmp_path, monkeypatch):
    """Changes the source of a module as the package's code is read for its hash."""
    source = tmp_path / "distill"
    shutil.copytree(Path(code_module.__file__).parents[1], source)
    monkeypatch.setattr(code_module, "_PACKAGE", source)

    def change(module, old, new):
        path = source / f"{module}.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        code_module.code_fingerprint.cache_clear()

    yield change
    code_module.code_fingerprint.cache_clear()


def test_checkpoints_of_a_change_that_was_taken_back_go(finished):
    path, _ = finished
    folder = path.parent / "run" / "student"
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (folder / ".begun").write_text("{}")
    assert run_plan(plan(path)) == []
    assert not (folder / "checkpoints").exists()
    assert not (folder / ".begun").exists()


def test_the_code_of_a_step_is_all_that_it_imports():
    of_steps = code_module.modules_behind("verbs.distill")
    assert {"verbs.distill", "losses", "tasks.rows", "tasks.scorers", "tasks.targets", "data.columns"} <= of_steps
    assert {"compression.quantization.qat", "compression.quantization.gptq"} <= of_steps
    assert not {"cli", "reports.report", "runs.card", "reports.presentation", "runs.run"} & of_steps
    of_scores = code_module.modules_behind("evaluation.evaluate")
    assert {"evaluation.evaluate", "evaluation.intervals", "tasks.entities", "data.files.readers"} <= of_scores


def test_a_change_of_code_is_told_and_nothing_is_trained_again(finished, change_code, capsys):
    path, report = finished
    folders = finished[0].parent / "run"
    before = {file: file.stat().st_mtime_ns for file in folders.rglob("*.safetensors")}
    change_code("losses", '"""Distillation losses', '# a comment\n"""Other words')
    change_code("data/load", "raise InputError(", "raise InputError(1, ")
    assert run_plan(plan(path)) == []
    assert "the code has changed" not in capsys.readouterr().err
    change_code("losses", "temperature**2", "temperature**3")
    made = plan(path)
    assert run_plan(made) == []
    assert {file: file.stat().st_mtime_ns for file in folders.rglob("*.safetensors")} == before
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("finished already") == 5
    for name in made.steps:
        remark = f"kept: the code has changed since it was made; `distill run … --rerun {name}` makes it anew"
        assert remarks_on(made.steps[name]) == [remark]
        assert remark in said
    scored = [model["metrics"] for model in asdict(write_report(made))["models"]]
    assert scored == [model["metrics"] for model in report["models"]]
    capsys.readouterr()
    print_plan(made)
    checked = " ".join(capsys.readouterr().out.split())
    assert [checked.count(f"finished already {remarks_on(made.steps[name])[0]}") for name in made.steps] == [1] * 5


def as_made_before(folder):
    """A run folder whose step.json says what earlier versions, whose fingerprints were of code too, wrote there."""
    record = read_record(folder)
    for key in ("fingerprint_version", "made_from", "code"):
        del record[key]
    started = datetime.fromisoformat(record["started"]).isoformat(timespec="seconds")
    (folder / "step.json").write_text(json.dumps(record | {"fingerprint": "0" * 64, "started": started}))


def test_a_run_of_an_earlier_version_is_kept_where_its_records_are_those_of_the_plan(finished, tmp_path, capsys):
    path, run = finished[0], tmp_path / "run"
    shutil.copytree(path.parent / "run", run)
    for folder in run.glob("*/"):
        if (folder / "step.json").is_file():
            as_made_before(folder)
    changed = lambda **overrides: {  # noqa: E731
        n for n, p in plan(path, output_dir=str(run), **overrides).steps.items() if not is_finished(p)
    }
    assert changed() == set()
    assert changed(**{"student.temperature": "4"}) == {"student", "student-int8", "student-nf4"}
    assert changed(**{"student.hidden_weight": "1"}) == {"student", "student-int8", "student-nf4"}
    assert changed(**{"student-nf4.double_quant": "false"}) == {"student-nf4"}
    assert changed(**{"student.learning_rate": "null"}) == {"student", "student-int8", "student-nf4"}
    assert changed(**{"data.max_train_rows": "50"}) == {
        "teacher", "student", "student-alone", "student-int8", "student-nf4",
    }  # fmt: skip
    assert changed(**{"data.max_eval_rows": "20", "student.logging_steps": "1"}) == set()
    assert run_plan(plan(path, output_dir=str(run))) == []
    assert capsys.readouterr().err.count("made by an earlier version of distill") == 5


def test_a_finished_model_stays_until_its_successor_is_whole(
    tmp_path, pretrained, sst2_folder, monkeypatch, change_code, capsys
):
    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 6, save_steps: 2}}\n"
    path = write_recipe(tmp_path, pretrained, sst2_folder, steps)
    run_plan(plan(path))
    teacher = tmp_path / "run" / "teacher"
    weights = (teacher / "model.safetensors").read_bytes()
    changed = {"teacher.seed": "1"}

    def stop(clock, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("a cable")

    with monkeypatch.context() as patch:
        patch.setattr("distill.training.checkpoints.Clock.on_step_end", stop)
        with pytest.raises(RuntimeError, match="a cable"):
            run_plan(plan(path, **changed))
    assert (teacher / "model.safetensors").read_bytes() == weights
    assert is_finished(plan(path).steps["teacher"])
    assert not is_finished(plan(path, **changed).steps["teacher"])
    assert [each.name for each in (teacher / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert not list((tmp_path / "run").glob(".teacher*"))
    change_code("losses", "temperature**2", "temperature**3")
    made = plan(path, **changed)
    assert run_plan(made) == ["teacher"]
    assert "begun by other code; `distill run … --rerun teacher` begins it anew" in capsys.readouterr().err
    assert len(remarks_on(made.steps["teacher"])) == 1
    log = read_record(teacher)["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]  # some from before
    assert {each.name for each in teacher.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "step.json",
    }  # fmt: skip
    assert (teacher / "model.safetensors").read_bytes() != weights


def test_steps_are_made_anew_by_name_with_what_depends_on_them(tmp_path, pretrained, sst2_folder, monkeypatch, capsys):
    from distill.cli import main

    steps = """
  teacher: {{run: finetune, model: {pretrained}, max_steps: 2}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 2}}
  alone: {{run: finetune, model: {pretrained}, max_steps: 2}}
  int8: {{run: quantize, model: student, format: int8}}
"""
    path = write_recipe(tmp_path, pretrained, sst2_folder, steps)
    run_plan(plan(path))
    with pytest.raises(InputError, match="--rerun studnet: no such step; did you mean 'student'"):
        run_plan(plan(path), rerun=["studnet"])
    with pytest.raises(InputError, match="--rerun student: is not among --only"):
        run_plan(plan(path), only=["teacher"], rerun=["student"])
    assert main(["run", str(path), "--accelerate_config", "multi_cpu", "--rerun", "studnet"]) == 2  # told once, here
    assert run_plan(plan(path), rerun=["student"]) == ["student", "int8"]
    assert run_plan(plan(path)) == []
    assert run_plan(plan(path), only=["teacher"], rerun=["teacher"]) == ["teacher"]
    capsys.readouterr()
    assert run_plan(plan(path)) == []
    assert capsys.readouterr().err.count("kept: made from teacher before that was made anew") == 1

    def stop(clock, args, state, control, **kwargs):
        if "student" in args.output_dir:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distill.training.checkpoints.Clock.on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan(path), rerun=["teacher"])
    capsys.readouterr()
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.count("will be made anew, as --rerun asked") == 2
    assert run_plan(plan(path)) == ["student", "int8"]  # as it was asked for; the teacher is done
    assert capsys.readouterr().err.count("made anew, as --rerun asked; the model that is there stays") == 2
    assert run_plan(plan(path), force=True) == ["teacher", "student", "alone", "int8"]
    assert not (tmp_path / "run" / ".rerun").exists()


def test_a_second_run_into_one_folder_is_refused(tmp_path, pretrained, sst2_folder, capsys):
    from distill.cli import main

    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 1}}\n"
    path = write_recipe(tmp_path, pretrained, sst2_folder, steps)
    run = tmp_path / "run"
    hold = "import pathlib, sys, time; from distill.common.folders import locked\n"
    hold += f"with locked(pathlib.Path({str(run)!r})):\n"
    hold += "    print('here', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "here\n"
    for command in (["run", str(path)], ["run", str(path), "--accelerate_config", "multi_cpu"]):
        assert main(command) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert said.startswith(f"error: {run}: another distill run is at work there (process {other.pid} on ")
        assert said.count("error") == 1
    assert {each.name for each in run.iterdir()} == {".lock"}
    other.kill()
    other.wait()
    assert run_plan(plan(path)) == ["teacher"]


def test_a_run_that_was_stopped_leaves_its_folder_to_the_next(tmp_path, pretrained, sst2_folder, monkeypatch):
    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 2}}\n"
    path = write_recipe(tmp_path, pretrained, sst2_folder, steps)

    def stop(clock, args, state, control, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distill.training.checkpoints.Clock.on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan(path))
    asked = (
        "import pathlib, sys; from distill.common.folders import locked\nwith locked(pathlib.Path(sys.argv[1])): pass"
    )
    subprocess.run([sys.executable, "-c", asked, str(tmp_path / "run")], check=True)
    assert run_plan(plan(path)) == ["teacher"]


def test_a_resume_with_other_batches_is_noticed(tmp_path, pretrained, sst2_folder, monkeypatch, capsys):
    def stop(clock, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 6, save_steps: 2}}\n"
    path = write_recipe(tmp_path, pretrained, sst2_folder, steps)
    with monkeypatch.context() as patch:
        patch.setattr("distill.training.checkpoints.Clock.on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan(path))
    checkpoint = tmp_path / "run" / "teacher" / "checkpoints" / "checkpoint-4"
    file = checkpoint / "batches.json"
    dealt = json.loads(file.read_text())
    assert dealt == {
        "processes": 1, "rows of a batch": 32, "tokens of a batch": None, "batches of a step": 1,
    }  # fmt: skip
    file.write_text(json.dumps(dealt | {"processes": 2}))
    assert run_plan(plan(path)) == ["teacher"]
    said = capsys.readouterr().err
    assert "checkpoint-4 can't be gone on from (processes: 2, now 1): started anew" in " ".join(said.split())
    assert "resuming" not in said
    assert read_record(tmp_path / "run" / "teacher")["log"][0]["step"] == 1


@pytest.mark.parametrize("room", [20_000, 500_000])  # of the checkpoint no file fits; of the last one only weights
def test_a_full_disk_ends_with_one_message_and_the_next_run_goes_on(tmp_path, pretrained, sst2_folder, room, capsys):
    """By a limit on the size of files, in this process."""
    from distill.cli import main

    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 4, save_steps: 2}}\n"
    path = write_recipe(tmp_path, pretrained, sst2_folder, steps)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        assert main(["run", str(path)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("error:") == 1
    assert f"{tmp_path / 'run'}: no room to write there (File too large)" in said
    assert not is_finished(plan(path).steps["teacher"])
    assert run_plan(plan(path)) == ["teacher"]
    assert is_finished(plan(path).steps["teacher"])


def test_steps_of_one_run_have_a_precision_each(tmp_path, sst2_folder, pretrained):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {sst2_folder}, max_length: 16}}
steps:
  first: {{run: finetune, model: {pretrained}, max_steps: 1, bf16: true}}
  second: {{run: finetune, model: first, max_steps: 1, bf16: false}}
""")
    made = make_plan(load_recipe(path))
    run_plan(made)
    assert [read_record(made.steps[name].folder)["options"]["bf16"] for name in made.steps] == [True, False]


def test_only_some_steps(tmp_path, pretrained, sst2_folder):
    path = write_recipe(tmp_path, pretrained, sst2_folder)
    with pytest.raises(InputError, match="starts from teacher, which is not finished"):
        run_plan(plan(path), only=["student"])
    with pytest.raises(InputError, match="did you mean 'teacher'"):
        run_plan(plan(path), only=["techer"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="no step of the recipe is finished"):
        write_report(plan(path))
    assert run_plan(plan(path), only=["teacher"]) == ["teacher"]
    assert run_plan(plan(path), only=["teacher"]) == []
    assert run_plan(plan(path), only=["teacher"], force=True) == ["teacher"]


def test_a_folder_that_no_run_made_is_left_alone(tmp_path, pretrained, sst2_folder):
    path = write_recipe(tmp_path, pretrained, sst2_folder)
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "student" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds files that no run made"):
        run_plan(plan(path))
    assert (tmp_path / "run" / "student" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "run" / "teacher").exists()


def test_an_output_dir_that_is_a_file_is_refused(tmp_path, pretrained, sst2_folder):
    path = write_recipe(tmp_path, pretrained, sst2_folder)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="is a file, and the run folders would go there"):
        run_plan(plan(path))


def test_a_folder_that_lost_its_weights_is_made_again(tmp_path, pretrained, sst2_folder):
    path = write_recipe(tmp_path, pretrained, sst2_folder)
    run_plan(plan(path), only=["teacher"])
    (tmp_path / "run" / "teacher" / "model.safetensors").unlink()
    assert run_plan(plan(path), only=["teacher"]) == ["teacher"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory, tokenizer):
    """A pretrained model of half the teacher's width."""
    folder = tmp_path_factory.mktemp("narrow")
    changes = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.05, "hidden_dropout_prob": 0.1}
    tiny_bert(seed=4, **changes).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("losses", ["predictions", "everything"])
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(tmp_path, pretrained, narrow, sst2_folder, losses):
    """Weights, optimizer, data order, and with every loss projections and schedules."""
    changes = {
        "predictions": "num_layers: 2, save_steps: 2, soft_loss: kl, hard_weight: 0.5",
        "everything": f"model: {narrow}, save_steps: 2, temperature: {{{{from: 4, to: 1}}}}, soft_loss: kl, "
        "hidden_weight: {{from: 1, to: 0.1, shape: cosine}}, relation_weight: 0.1, attention_weight: 0.1, "
        "contrastive_weight: 0.1",
    }[losses]
    steps = STEPS.partition("  student-alone")[0].replace("num_layers: 2", changes)
    whole, killed = (write_recipe(tmp_path / name, pretrained, sst2_folder, steps) for name in ("whole", "killed"))
    run_plan(plan(whole))

    wait_there = (
        "import distill.training.config, distill.training.checkpoints, time, sys; from distill.cli import main\n"
        "from transformers import TrainerCallback\n"
        "distill.training.config.has_bf16 = lambda device: False\n"  # as in this process
        "class Wait(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if 'student' in args.output_dir and state.global_step == 3:\n"
        "            print('here', flush=True); time.sleep(60)\n"
        "distill.training.checkpoints.Clock.__bases__ = (Wait,)\n"
        "main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", wait_there, "run", str(killed)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout.readline() == "here\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    student = tmp_path / "killed" / "run" / "student"
    assert read_record(student)["status"] == "running"
    assert [path.name for path in (student / "checkpoints").iterdir()] == ["checkpoint-2"]

    started = time.time()
    assert run_plan(plan(killed)) == ["student"]
    log = read_record(student)["log"]
    assert next(entry["step"] for entry in log if "loss" in entry) <= 2  # the part before the kill
    assert time.time() - started < 60
    for name in ("teacher", "student"):
        first, second = (load_file(tmp_path / w / "run" / name / "model.safetensors") for w in ("whole", "killed"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (student / "checkpoints").exists()


def test_a_resumed_run_warns_of_nothing(tmp_path, pretrained, sst2_folder, monkeypatch):
    def stop(clock, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 9, save_steps: 0.3, logging_steps: 0.25}}\n"
    made = plan(write_recipe(tmp_path, pretrained, sst2_folder, steps))
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    with monkeypatch.context() as patch:
        patch.setattr("distill.training.checkpoints.Clock.on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(made)
    assert [path.name for path in (tmp_path / "run" / "teacher" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert run_plan(made) == ["teacher"]
    assert not [text for text in said if "do not match" in text or "mtime" in text]
    record = read_record(tmp_path / "run" / "teacher")
    assert (record["options"]["save_steps"], record["options"]["logging_steps"]) == (0.3, 0.25)
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [3, 6, 9]


def test_the_baseline_may_be_a_model_from_outside(tmp_path, finished):
    teacher = finished[0].parent / "run" / "teacher"
    data = load_recipe(finished[0]).data.path
    path = write_recipe(tmp_path, teacher, data, "\n  q: {{run: quantize, model: {pretrained}, format: nf4}}\n")
    made = plan(path)
    assert run_plan(made) == ["q"]
    report = asdict(write_report(made))
    assert report["baseline"] == str(teacher)
    assert [(model["name"], model["run"]) for model in report["models"]] == [(str(teacher), None), ("q", "quantize")]
    assert report["models"][0]["train_seconds"] is None
    assert report["models"][1]["agreement"] > 0.8


def test_a_model_with_other_labels_can_be_finetuned_and_is_no_baseline(tmp_path, tokenizer, sst2_folder):
    other = tmp_path / "other"
    tiny_bert(num_labels=3).save_pretrained(other)
    tokenizer.save_pretrained(other)
    made = plan(write_recipe(tmp_path, other, sst2_folder, "\n  teacher: {{run: finetune, model: {pretrained}}}\n"))
    assert made.baseline == "teacher"
    assert made.steps["teacher"].plan.config.id2label == {0: "negative", 1: "positive"}


def test_quantize_steps_alone_compare_with_their_model_by_its_label_map(tmp_path, tokenizer, sst2_folder):
    tiny_bert().save_pretrained(unnamed := tmp_path / "unnamed")
    tokenizer.save_pretrained(unnamed)
    labels = "{{LABEL_0: negative, LABEL_1: positive}}"
    steps = "\n  q: {{run: quantize, model: {pretrained}, format: int8, label_map: " + labels + "}}\n"
    made = plan(write_recipe(tmp_path, unnamed, sst2_folder, steps))
    assert made.baseline == str(unnamed)
    assert made.baseline_label_map == {"LABEL_0": "negative", "LABEL_1": "positive"}


def test_a_regression_on_own_rows_with_a_narrower_student_from_a_folder(tmp_path, pretrained, tokenizer):
    student = tiny_bert(seed=4, hidden_size=32, num_hidden_layers=2, intermediate_size=64, initializer_range=0.05)
    student.bert.save_pretrained(narrow := tmp_path / "narrow")
    tokenizer.save_pretrained(narrow)
    rows = [{"review": row["sentence"], "stars": 1.0 + 3.0 * row["label"]} for row in sentences(200)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: regression, path: {path}, text: review, label: stars, max_length: 24, validation_fraction: 0.3}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 200, learning_rate: 2e-3, per_device_train_batch_size: 8}}
  student: {{run: distill, teacher: teacher, model: {narrow}, max_steps: 100, learning_rate: 5e-3, save_strategy: no}}
  int8: {{run: quantize, model: student, format: int8}}
""")
    made = plan(recipe)
    run_plan(made)
    report = asdict(write_report(made))
    teacher, student, int8 = report["models"]
    assert (report["task"], report["metric"]) == ("regression", "pearson")
    assert teacher["metrics"]["pearson"] > 0.8
    assert student["parents"] == ["teacher", str(narrow)]
    assert 0 < student["agreement"] < 1
    assert int8["agreement"] == pytest.approx(student["agreement"], abs=0.1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert (model.config.hidden_size, model.config.num_labels, model.config.problem_type) == (32, 1, "regression")
    log = read_record(tmp_path / "run" / "student")["log"][0]
    assert {key for key in log if key.startswith("loss/")} == {"loss/soft"}


def test_label_sets_through_a_whole_run(tmp_path, pretrained):
    rows = [
        {"review": row["sentence"], "tags": ["long"] * (len(row["sentence"]) > 30) + ["good"] * row["label"]}
        for row in sentences(150)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: multi-label, path: {tmp_path / "train.jsonl"}, text: review, label: tags, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 150, learning_rate: 2e-3, per_device_train_batch_size: 8}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 60, learning_rate: 1e-3, soft_loss: kl}}
""")
    made = plan(recipe)
    run_plan(made)
    report = asdict(write_report(made))
    assert report["metric"] == "f1_micro"
    assert [model["metrics"]["f1_micro"] > 0.8 for model in report["models"]] == [True, True]
    assert report["models"][1]["agreement"] > 0.7
    found = pipeline("text-classification", str(tmp_path / "run" / "student"), top_k=None)(["a good film"])[0]
    assert {each["label"] for each in found} == {"good", "long"}
    assert sum(each["score"] for each in found) != pytest.approx(1)  # each label has a probability of its own


def test_a_run_with_several_teachers_stored_predictions_and_unlabelled_rows(tmp_path, pretrained, sst2_folder):
    rows = [{**row, "no": 0.9 - 0.8 * row["label"], "yes": 0.1 + 0.8 * row["label"]} for row in sentences(60)]
    write_rows(tmp_path / "rows" / "train.jsonl", rows)
    write_rows(tmp_path / "rows" / "validation.jsonl", sentences(20, seed=1))
    write_rows(tmp_path / "more.jsonl", [{**row, "label": None} for row in rows[:24]])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data:
  path: {tmp_path / "rows"}
  unlabelled: {tmp_path / "more.jsonl"}
  teacher_probabilities: [no, yes]
  max_length: 24
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  first: {{run: finetune, model: {pretrained}, max_steps: 40, learning_rate: 2e-3, per_device_train_batch_size: 8}}
  second: {{run: finetune, model: {pretrained}, max_steps: 30, learning_rate: 2e-3, seed: 2}}
  of-columns: {{run: distill, teacher: data, model: {pretrained}, num_layers: 2, num_train_epochs: 1}}
  of-one: {{run: distill, teacher: first, num_layers: 2, num_train_epochs: 1}}
  of-three:
    {{run: distill, teacher: [first, data, second], teacher_weights: [2, 1, 1], num_layers: 2, num_train_epochs: 1,
      hidden_weight: 0.5, hard_weight: 0.5}}
""")
    made = plan(recipe)
    run_plan(made)
    report = asdict(write_report(made))
    models = {model["name"]: model for model in report["models"]}
    assert report["baseline"] == "first"
    assert models["of-three"]["parents"] == ["first", "second"]
    record = read_record(tmp_path / "run" / "of-three")
    assert record["layer_pairs"] == {name: {"hidden": [[1, 2], [2, 4]]} for name in ("first", "second")}
    logs = [log for log in record["log"] if "loss" in log]
    assert {"loss/soft", "loss/hard", "loss/hidden"} <= set(logs[-1])
    steps = read_record(tmp_path / "run" / "first"), record  # 60 labelled rows, and 24 more for the distilled one
    assert [round(step["samples_per_second"] * step["train_seconds"]) for step in steps][1] == 84
    compared = {each["over"] for each in report["comparisons"]}
    assert compared == {"first", "second", "of-one", "of-three"}


def test_a_token_in_a_recipe_is_refused_and_not_shown(tmp_path, pretrained, sst2_folder):
    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 1, hub_token: hf_secret}}\n"
    with pytest.raises(InputError, match=r"steps\.teacher\.hub_token: .*`push:`") as error:
        plan(write_recipe(tmp_path, pretrained, sst2_folder, steps))
    assert "hf_secret" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("steps", "messages"),
    [
        (
            """
  a: {{run: finetune, model: /no/such/folder}}
  b: {{run: distill, teacher: c, num_layers: 2}}
  c: {{run: finetune, model: {pretrained}, num_layers: 9}}
  d: {{run: distill, teacher: {pretrained}, num_layers: 2}}
  e: {{run: quantize, model: tacher, format: nf4}}
""",
            [
                "steps.a.model: /no/such/folder: no such file or folder",
                "steps.b.teacher: 'c' is not an earlier step",
                "steps.c.num_layers: 9 is out of range; the model has 4 layers",
                "has no trained head for this task",
                "steps.e.model: tacher: no such folder here, and not to be had from the Hub",
            ],
        ),
        (
            """
  t: {{run: finetune, model: {pretrained}}}
  s: {{run: distill, teacher: t, num_layers: 2, hidden_weight: 1, layer_map: [[3, 4]]}}
  q: {{run: quantize, model: t, format: nf4}}
  again: {{run: quantize, model: q, format: int8}}
  on-top: {{run: finetune, model: q}}
""",
            ["steps.s.layer_map: [[3, 4]] is out of range; pairs are [student 0 to 2, teacher 0 to 4]",
             "steps.again.model: q is quantized; start from the model",
             "steps.on-top.model: q is quantized; start from the model"],
        ),
    ],
)  # fmt: skip
def test_every_problem_of_the_models_is_told_before_anything_runs(tmp_path, pretrained, sst2_folder, steps, messages):
    path = write_recipe(tmp_path, pretrained, sst2_folder, steps)
    with pytest.raises(InputError) as error:
        plan(path)
    text = "\n".join(error.value.problems)
    for message in messages:
        assert message in text, f"{message!r} is not in\n{text}"
    assert len(error.value.problems) == len(messages)
    assert not (tmp_path / "run").exists()
