"""The quantize verb in whole runs: mixed formats, budgets, wrong options, and folders that are whole or absent."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import distill  # noqa: F401  (registers the quantized formats)
from distill.common.folders import settle, written_whole
from distill.common.records import read_record
from distill.compression.replacements import formats_of
from distill.errors import InputError
from distill.models.load import size_on_disk
from distill.recipes.check import estimate_step
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.presentation import print_report
from distill.reports.report import write_report
from distill.runs.run import run_plan
from tests.conftest import tiny_bert

STEPS = """
  int8: {run: quantize, model: MODEL, format: int8, threshold: 6.0, rest_dtype: fp32}
  small: {run: quantize, model: MODEL, format: nf4, embeddings: nf4, block_size: 128}
  fixed: {run: quantize, model: MODEL, format: nf4, overrides: {"encoder.layer.0.*": int8}, skip: ["*.1.output.dense"]}
  plain: {run: quantize, model: MODEL, format: bf16}
  gptq: {run: quantize, model: MODEL, format: nf4, embeddings: nf4, block_size: 128, gptq: true, calibration_rows: 60}
  bits: {run: quantize, model: MODEL, bits_budget: 5.5, calibration_rows: 40}
  bytes: {run: quantize, model: MODEL, bits_budget: 1.6MB, calibration_rows: 40, embeddings: int8}
"""


def write_recipe(folder, model, data, steps):
    path = folder / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {data}, max_length: 24}}\n"
        "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
        f"steps:{steps.replace('MODEL', str(model))}"
    )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A classifier large enough for bytes to compare, its labels named."""
    folder = tmp_path_factory.mktemp("models") / "student"
    student = tiny_bert(num_hidden_layers=2, hidden_size=256, intermediate_size=512, vocab_size=2000)
    student.config.id2label = {0: "negative", 1: "positive"}
    student.config.label2id = {"negative": 0, "positive": 1}
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, sst2_folder):
    made = make_plan(load_recipe(write_recipe(tmp_path_factory.mktemp("runs"), model, sst2_folder, STEPS)))
    run_plan(made)
    return made


def test_each_step_makes_what_check_said_it_would(finished):
    for name, planned in finished.steps.items():
        expected = estimate_step(finished, planned).weight_bytes
        header = int.from_bytes((planned.folder / "model.safetensors").read_bytes()[:8], "little")
        assert size_on_disk(planned.folder) - header == pytest.approx(expected, rel=0.02), name
        loaded = AutoModelForSequenceClassification.from_pretrained(planned.folder)
        if name == "plain":
            assert not hasattr(loaded.config, "quantization_config")
            assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
            continue
        assert formats_of(loaded.config)[0] == read_formats(planned.folder)
    assert str(loaded.dtype) == "torch.bfloat16"
    (entry,) = read_entries(finished.steps["int8"].folder)
    assert entry["threshold"] == 6.0
    fixed = read_formats(finished.steps["fixed"].folder)
    assert "bert.encoder.layer.1.output.dense" not in fixed
    assert fixed["bert.encoder.layer.0.output.dense"] == "int8"
    assert fixed["bert.encoder.layer.1.intermediate.dense"] == "nf4"


def read_entries(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["replacements"]


def read_formats(folder):
    return {name: entry["kind"] for entry in read_entries(folder) for name in entry["names"]}


def test_a_budget_is_kept_and_what_was_measured_is_left_in_the_folder(finished):
    for name, budget in (("bits", None), ("bytes", 1_600_000)):
        folder = finished.steps[name].folder
        table = json.loads((folder / "sensitivity.json").read_text())
        assert budget in (None, table["budget_bytes"])
        assert table["mixes"][0]["size"] <= table["budget_bytes"]
        assert read_formats(folder) == {
            module: format for module, format in table["mixes"][0]["formats"].items() if format != "none"
        }
        assert (folder / "sensitivity.png").is_file()
        assert "sensitivity.json" in (folder / "README.md").read_text()
        assert read_record(folder)["options"]["calibration_rows"] == 40
    assert table["mixes"][0]["formats"]["bert.embeddings.word_embeddings"] == "int8"  # as `embeddings` says


def test_the_report_says_what_a_mix_wins_back(finished, capsys):
    entries = {model["name"]: model for model in asdict(write_report(finished))["models"]}
    shown = write_report(finished)
    report = asdict(shown)
    assert report["baseline"] == finished.baseline
    recoveries = {each["model"]: each for each in report["recoveries"]}
    assert recoveries["gptq"]["over"] == "small"
    assert set(recoveries) <= {"gptq", "bits", "bytes"}
    assert entries["gptq"]["size_on_disk_bytes"] == entries["small"]["size_on_disk_bytes"]
    assert recoveries["gptq"]["share"] > 0.2
    for name, each in recoveries.items():
        sizes = [entries[other]["size_on_disk_bytes"] for other in (name, each["over"])]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
        means = [entries[other]["divergence"]["mean"] for other in (name, each["over"])]
        assert each["share"] == pytest.approx(1 - means[0] / means[1])
        assert each["interval"][0] <= each["share"] <= each["interval"][1]
    print_report(shown)
    assert "of small's divergence from" in " ".join(capsys.readouterr().out.split())
    assert entries["plain"]["divergence"]["mean"] < entries["small"]["divergence"]["mean"]


def test_the_calibration_rows_belong_to_what_a_budget_makes(tmp_path, model, sst2_folder, finished):
    other = load_recipe(finished.recipe.path, {"data.max_train_rows": "50"})
    changed = make_plan(other)
    for name, planned in finished.steps.items():
        assert (changed.steps[name].fingerprint != planned.fingerprint) is (name in ("gptq", "bits", "bytes")), name


def test_gptq_reads_as_many_rows_as_hold_65536_tokens(tmp_path, model, tokenizer, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "distill.verbs.quantize.compensate", lambda model, formats, options, batches: seen.extend(batches)
    )
    words = [f"w{number}" for number in range(40)]
    rows = [{"sentence": " ".join(words[: 10 + 2 * (row % 16)]), "label": row % 2} for row in range(4000)]
    (tmp_path / "data").mkdir()
    for name, some in (("train", rows), ("validation", rows[:20])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    step = "\n  gptq: {run: quantize, model: MODEL, format: nf4, gptq: true}\n"
    path = write_recipe(tmp_path, model, tmp_path / "data", step)
    run_plan(make_plan(load_recipe(path, {"data.max_length": "64"})))
    longest = max(batch["input_ids"].shape[1] for batch in seen)
    assert 0 <= sum(int(batch["attention_mask"].sum()) for batch in seen) - 65536 < longest
    read = sum(len(batch["input_ids"]) for batch in seen)
    assert read < 4000
    assert f"measuring on {read:,} training rows" in capsys.readouterr().err
    seen.clear()
    run_plan(make_plan(load_recipe(path, {"data.max_length": "64", "gptq.calibration_rows": "70"})))
    assert sum(len(batch["input_ids"]) for batch in seen) == 70


def test_wrong_options_are_told_before_anything_runs(tmp_path, model, sst2_folder):
    steps = """
  a: {run: quantize, model: MODEL, format: nf4, skip: ["encoder.layer.7.*"]}
  b: {run: quantize, model: MODEL, bits_budget: 0.1MB}
  c: {run: quantize, model: MODEL}
  d: {run: quantize, model: MODEL, format: bf16, embeddings: nf4}
  e: {run: quantize, model: MODEL, bits_budget: 20}
"""
    with pytest.raises(InputError) as error:
        make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    first, second, third, fourth, fifth = error.value.problems
    assert "steps.a.skip: 'encoder.layer.7.*' matches no quantizable module; the nearest is 'bert.encoder.la" in first
    assert "steps.b.bits_budget: 0.10 MB are too few" in second
    assert "steps.c.format: missing; say int8, nf4, fp4, bf16" in third
    assert "steps.d.embeddings: has no effect with format: bf16" in fourth
    assert "leave room for every weight in bf16" in fifth
    steps = """
  a: {run: quantize, model: MODEL, format: nf4, bits_budget: 12MB}
  b: {run: quantize, model: MODEL, bits_budget: 12 apples}
  c: {run: quantize, model: MODEL, format: nf4, overrides: {"*": nf5}}
  d: {run: quantize, model: MODEL, format: nf4, block_size: 48}
  e: {run: quantize, model: MODEL, format: int8, gptq: true}
  f: {run: quantize, model: MODEL, format: nf4, calibration_rows: 9}
"""
    with pytest.raises(InputError) as error:
        make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    for problem, key in zip(
        error.value.problems,
        ["a.format:", "b.bits_b", "c.overrides", "d.block_size", "e.gptq", "f.calib"],
        strict=True,
    ):
        assert f"steps.{key}" in problem


def write_and_fail(folder):
    with written_whole(folder) as partial:
        (partial / "file").write_text("second")
        (partial / "file" / "below").write_text("third")


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    with written_whole(tmp_path / "a") as folder:
        (folder / "file").write_text("first")
    with pytest.raises(NotADirectoryError):
        write_and_fail(tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "first"
    with written_whole(tmp_path / "a") as folder:
        (folder / "other").write_text("third")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("left", "there"),
    [
        ({".a.before": "old", ".a.partial": "new"}, {"a": "new"}),
        ({".a.before": "old"}, {"a": "old"}),
        ({".a.before": "old", "a": "new"}, {"a": "new"}),
        ({".a.partial": "half", "a": "old"}, {".a.partial": "half", "a": "old"}),
    ],
)
def test_a_folder_whose_successor_was_cut_off_on_its_way_is_there(tmp_path, left, there):
    for name, content in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    settle(tmp_path / "a")
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == there


_KILLS = """
import os, pathlib, random, shutil, signal, sys, time
import torch, transformers
from safetensors.torch import load_file
from distill.runs.run import is_finished, run_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe

torch.set_num_threads(1)  # so that a fork computes
transformers.logging.disable_progress_bar()
made = make_plan(load_recipe(pathlib.Path(sys.argv[1])))
planned = made.steps["q"]

def started():
    child = os.fork()
    if child == 0:
        run_plan(made, force=True)
        os._exit(0)
    return child

begin = time.perf_counter()
os.waitpid(started(), 0)
seconds = time.perf_counter() - begin
tensors = load_file(planned.folder / "model.safetensors").keys()
random.seed(0)
for kill in range(10):
    if kill % 2:
        shutil.rmtree(planned.folder, ignore_errors=True)
    child = started()
    time.sleep(seconds * (kill + random.random()) / 10)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not planned.folder.exists():
        print("absent")
    elif is_finished(planned) and load_file(planned.folder / "model.safetensors").keys() == tensors:
        print("whole")
    else:
        print("broken")
os.waitpid(started(), 0)
print("finished" if is_finished(planned) else "broken", len(list(planned.folder.parent.glob(".q*"))))
"""


def test_killed_at_any_moment_the_folder_is_whole_or_absent(tmp_path, model, sst2_folder):
    path = write_recipe(tmp_path, model, sst2_folder, "\n  q: {run: quantize, model: MODEL, format: nf4}\n")
    done = subprocess.run([sys.executable, "-c", _KILLS, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *states, last = done.stdout.splitlines()
    assert len(states) == 10
    assert set(states) == {"whole", "absent"}
    assert last == "finished 0"
