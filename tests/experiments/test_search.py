"""Searches over tiny recipes: what is tried, refused, shared, given up, resumed and written."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from safetensors.torch import load_file

from distill.cli import main
from distill.errors import InputError
from distill.experiments.footprint import Footprint, footprint_of, problem_of
from distill.experiments.found import Found, Tried, on_front, rows_of
from distill.experiments.search import search
from distill.experiments.trials import Outcome
from distill.models.load import size_on_disk
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.recipes.search_options import Choice, Range, SearchOptions
from distill.runs.run import run_plan, save_recipe

TEXT = """
task: sst2
output_dir: {folder}/run
data: {{path: {data}, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
search:
  trials: {trials}
  space: {space}
  limits: {limits}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 4, per_device_train_batch_size: 8, bf16: false}}
  warm: {{run: distill, teacher: teacher, num_layers: 3, max_steps: 2, bf16: false}}
  student: {{run: distill, model: warm, teacher: teacher, num_layers: 2, max_steps: 8, bf16: false}}
  small: {{run: quantize, model: student, format: nf4}}
"""


def write(folder, pretrained, data, *, space, limits="{}", trials=3):
    path = folder / "r.yaml"
    path.write_text(
        TEXT.format(folder=folder, pretrained=pretrained, data=data, space=space, limits=limits, trials=trials)
    )
    return path


SPACE = "{student.num_layers: [1, 2], student.seed: [0, 1, 2]}"


def study_in(folder):
    file = str(folder / "run" / "search" / "study.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))
    return optuna.load_study(study_name="search", storage=storage)


def test_a_search_ends_with_a_recipe_whose_steps_are_there(tmp_path, pretrained, sst2_folder, capsys):
    space = "student.num_layers: [1, 2], student.learning_rate: {low: 1e-4, high: 1e-2, log: true}"
    space = f"{{{space}, warm: [present, absent]}}"
    path = write(tmp_path, pretrained, sst2_folder, space=space, trials=4)
    assert main(["check", str(path)]) == 0
    assert not (tmp_path / "run" / "search").exists()
    assert main(["search", str(path)]) == 0
    assert "best.yaml" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "search" / "search.json").read_text())
    assert [each["outcome"]["state"] for each in found["tried"]] == ["finished"] * 4
    assert all(each["params"]["student.num_layers"] in (1, 2) for each in found["tried"])
    assert all(1e-4 <= each["params"]["student.learning_rate"] <= 1e-2 for each in found["tried"])
    best = max(found["tried"], key=lambda each: each["outcome"]["value"])
    assert found["best"]["outcome"]["value"] == best["outcome"]["value"]
    teachers = {
        (tmp_path / "run" / "search" / "trials" / f"{number:04d}" / "run" / "teacher" / "model.safetensors")
        .stat()
        .st_ino
        for number in range(4)
    }
    assert len(teachers) == 1  # trained once, and its bytes lie on the disk once

    recipe = load_recipe(tmp_path / "run" / "best.yaml")
    assert recipe.search is None
    assert ("warm" in recipe.steps) == (found["best"]["params"]["warm"] == "present")
    assert recipe.steps["student"].options.num_layers == found["best"]["params"]["student.num_layers"]
    plan = make_plan(recipe)
    assert run_plan(plan) == ["small"]  # which the search had no need of
    again = make_plan(load_recipe(tmp_path / "run" / "best.yaml", {"output_dir": str(tmp_path / "anew")}))
    run_plan(again, only=["teacher", *(["warm"] if "warm" in recipe.steps else []), "student"])
    one, two = (load_file(each.steps["student"].folder / "model.safetensors") for each in (plan, again))
    assert all(one[name].equal(two[name]) for name in one)


def test_what_exceeds_a_limit_is_refused_before_anything_is_trained(tmp_path, pretrained, sst2_folder, monkeypatch):
    path = write(tmp_path, pretrained, sst2_folder, space="{student.num_layers: [1, 2]}", limits="{max_mb: 0.01}")
    monkeypatch.setattr("distill.experiments.trials.run_plan", lambda *_, **__: pytest.fail("something was run"))
    found = search(path)
    assert [each.outcome.state for each in found.tried] == ["refused"] * 3
    assert all("MB of 0.01" in each.outcome.reason for each in found.tried)
    assert found.best is None
    assert main(["search", str(path)]) == 1  # nothing is left to try


LAST = """
  gptq: {run: quantize, model: student, format: nf4, embeddings: nf4, gptq: true, rest_dtype: fp32, calibrate: true}
  int8: {run: export, model: student, format: int8, calibrate: true}
  int4: {run: export, model: student, format: int4, embeddings: int4, float_layers: []}
"""


@pytest.mark.parametrize("step", ["student", "small", "gptq", "int8", "int4"])
def test_bytes_are_known_before_the_training(tmp_path, pretrained, sst2_folder, step, monkeypatch):
    """Nothing that only weights need is done for it: no temperature, no GPTQ, no choice of layers."""
    path = write(tmp_path, pretrained, sst2_folder, space="{student.num_layers: [1, 2]}")
    path.write_text(path.read_text().rstrip() + LAST)
    plan = make_plan(load_recipe(path))
    with monkeypatch.context() as patch:
        for name in ("quantize.calibrate", "export.calibrate", "quantize.compensate"):
            patch.setattr(f"distill.verbs.{name}", lambda *_, **__: pytest.fail("it was done"))
        patch.setattr("distill.export.export.choose_layers", lambda *_: pytest.fail("layers were chosen"))
        ahead = footprint_of(plan, step, tmp_path / "cache", timed=True)
    monkeypatch.setattr("distill.verbs.temperature.FEWEST", 1)
    run_plan(plan, only=["teacher", "warm", "student", *([step] if step != "student" else [])])
    assert ahead.mb * 1e6 == pytest.approx(size_on_disk(plan.steps[step].folder), rel=0.002)
    assert ahead.ms > 0
    assert footprint_of(plan, step, tmp_path / "cache", timed=True) == ahead  # from the cache


def test_limits_are_compared():
    assert problem_of(Footprint(11.9, 5.0), {"max_mb": 12, "max_ms": 5}) is None
    assert problem_of(Footprint(12.1, 5.0), {"max_mb": 12, "max_ms": 5}) == "12.10 MB of 12"
    assert problem_of(Footprint(12.1, 5.5), {"max_mb": 12, "max_ms": 5}) == "12.10 MB of 12, 5.50 ms of 5"
    assert problem_of(Footprint(12.1, None), {"max_ms": 5}) is None


def test_a_training_that_scores_badly_on_the_way_is_given_up(tmp_path, pretrained, sst2_folder, monkeypatch):
    path = write(tmp_path, pretrained, sst2_folder, space="{student.learning_rate: {low: 1e-4, high: 1e-3}}", trials=6)
    scores = iter([0.9, 0.9, 0.9] * 5 + [0.1])
    seen = []

    def scored(model, *_, **given):
        seen.append((given["name"], model.training))
        value = next(scores, 0.5) if given["name"].startswith("step") else 0.9
        return type("Evaluation", (), {"metrics": {"accuracy": value}, "interval": (0, 1)})

    monkeypatch.setattr("distill.experiments.trials.evaluate_model", scored)
    found = search(path)
    assert [each.outcome.state for each in found.tried] == ["finished"] * 5 + ["given up"]
    assert [name for name, _ in seen[:4]] == ["step 2", "step 4", "step 6", "student"]
    assert not (tmp_path / "run" / "search" / "trials" / "0005").exists()


def test_looking_on_the_way_changes_no_bit(tmp_path, pretrained, sst2_folder):
    path = write(tmp_path, pretrained, sst2_folder, space="{student.hard_weight: [0.5, 0.6]}", trials=1)
    found = search(path)
    plain = make_plan(load_recipe(path, {"student.hard_weight": str(found.best.params["student.hard_weight"])}))
    run_plan(plain, only=["teacher", "warm", "student"])
    folder = tmp_path / "run" / "search" / "trials" / "0000" / "run" / "student"
    one, two = (load_file(each / "model.safetensors") for each in (folder, plain.steps["student"].folder))
    assert all(one[name].equal(two[name]) for name in one)


_KILLED = """
import os, signal, sys
from distill.cli import main
import distill.experiments.trials as trials
made, count = trials._make, [0]
def make(*arguments):
    count[0] += 1
    if count[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    made(*arguments)
trials._make = make
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_again_and_again_every_trial_counts_once(tmp_path, pretrained, sst2_folder):
    """Ten times, each within another step of a trial; then three processes end it together."""
    path = write(
        tmp_path, pretrained, sst2_folder, space="{student.num_layers: [1, 2], student.seed: [0, 1, 2]}", trials=6
    )
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for moment in "1234123412":
        done = subprocess.run(
            [sys.executable, str(script), moment, "search", str(path)],
            env=environment,
            capture_output=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    command = [sys.executable, "-m", "distill.cli", "search", str(path)]
    others = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for other in others:
        _, said = other.communicate(timeout=500)
        assert other.returncode == 0, said
    trials = study_in(tmp_path).get_trials()
    ended = [each for each in trials if each.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == 6
    assert len({each.user_attrs["folder"] for each in ended}) == 6
    assert not [each for each in trials if each.state.name in ("RUNNING", "WAITING")]
    found = json.loads((tmp_path / "run" / "search" / "search.json").read_text())
    assert len(found["tried"]) == 6


def test_the_trial_of_a_process_that_died_is_given_back(tmp_path, pretrained, sst2_folder, monkeypatch):
    """It runs again in its folder with its values; one that another process holds is waited for."""
    path = write(tmp_path, pretrained, sst2_folder, space=SPACE, trials=2)
    outcomes = iter([KeyboardInterrupt(), Outcome("finished", 0.5), Outcome("finished", 0.6)])
    ran = []

    def run_trial(plan, *_):
        ran.append((plan.recipe.output_dir.parent.name, plan.steps["student"].fingerprint))
        outcome = next(outcomes)
        if isinstance(outcome, KeyboardInterrupt):
            raise outcome
        return outcome

    monkeypatch.setattr("distill.experiments.search.run_trial", run_trial)
    with pytest.raises(KeyboardInterrupt):
        search(path)
    found = search(path)
    assert ran[0] == ran[1]
    assert [each.number for each in found.tried] == [0, 1]
    assert [each.state.name for each in study_in(tmp_path).get_trials()] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_search_goes_on_as_it_would_have(tmp_path, pretrained, sst2_folder):
    space = "{student.learning_rate: {low: 1e-4, high: 1e-2, log: true}}"
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    whole = search(write(tmp_path / "once", pretrained, sst2_folder, space=space, trials=3))
    path = write(tmp_path / "twice", pretrained, sst2_folder, space=space, trials=3)
    search(path, {"search.trials": "2"})
    found = search(path)
    assert [each.params for each in found.tried] == [each.params for each in whole.tried]
    assert [each.outcome.value for each in found.tried] == [each.outcome.value for each in whole.tried]
    with pytest.raises(InputError, match=r"search.space: the trials in the folder are of .*say another output_dir"):
        search(path, {"search.space": "{student.learning_rate: [1e-3, 2e-3]}"})


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("{space: {}}", "search.space: names no path; say what to try"),
        (
            "{space: {student.num_layer: [1, 2]}}",
            "search.space.student.num_layer: 1: unknown option; did you mean",
        ),
        ("{space: {student.num_layers: [1, two]}}", r'search.space.student.num_layers: "two": .*valid integer'),
        (
            "{space: {studnt.num_layers: [1, 2]}}",
            "search.space.studnt.num_layers: no such step; did you mean",
        ),
        ("{space: {student.num_layers: [2]}}", "search.space.student.num_layers: a list needs two choices or more"),
        ("{space: {student.num_layers: {low: 3, high: 2}}}", "low must be below high; got 3 and 2"),
        ("{space: {student.temperature: {low: 0, high: 8, log: true}}}", "log: low must be above 0"),
        (
            "{space: {warm: [present, gone]}}",
            r"space.warm: is a step, so what can be tried is \[present, absent\]",
        ),
        ("{space: {warm: [present, absent]}, step: warm}", "search.space.warm: its metric is optimised"),
        ("{space: {warm: [present, absent]}, step: warmer}", "search.step: no step 'warmer'; did you mean 'warm'"),
        ("{space: {warm: [present, absent]}, limits: {max_gb: 1}}", "search.limits: should be 'max_mb' or 'max_ms'"),
        ("{space: {warm: [present, absent]}, trials: 0}", "search.trials: should be greater than or equal to 1"),
    ],
)
@pytest.mark.parametrize("command", ["check", "search"])
def test_what_is_wrong_is_told_before_anything_runs(tmp_path, pretrained, sst2_folder, block, problem, command, capsys):
    path = write(tmp_path, pretrained, sst2_folder, space="{student.num_layers: [1, 2]}")
    text = path.read_text()
    start, end = text.index("search:"), text.index("steps:")
    path.write_text(f"{text[:start]}search: {block}\n{text[end:]}")
    assert main([command, str(path)]) == 2
    assert re.search(problem, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_block_and_makes_the_recipe_as_it_stands(tmp_path, pretrained, sst2_folder):
    space, limits = "{student.num_layers: [1, 3], warm: [present, absent]}", "{max_mb: 12, max_ms: 5}"
    path = write(tmp_path, pretrained, sst2_folder, space=space, limits=limits)
    recipe = load_recipe(path)
    save_recipe(recipe)
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.search == recipe.search
    assert again.search.limits == {"max_mb": 12, "max_ms": 5}
    assert again.steps["student"].options.num_layers == 2


def test_a_recipe_without_a_block_is_told(tmp_path, pretrained, sst2_folder):
    path = write(tmp_path, pretrained, sst2_folder, space="{student.num_layers: [1, 2]}")
    text = path.read_text()
    path.write_text(text[: text.index("search:")] + text[text.index("steps:") :])
    with pytest.raises(InputError, match="search: missing; say what to try"):
        search(path)


def test_the_space_is_read():
    options = SearchOptions(
        space={"a.b": [1, [2]], "c": {"low": 1, "high": 8}, "d": {"low": 1e-5, "high": 1, "log": True}}
    )
    assert options.parsed() == {"a.b": Choice((1, [2])), "c": Range(1, 8), "d": Range(1e-5, 1, True)}
    assert options.parsed()["c"].is_whole
    assert not options.parsed()["d"].is_whole


def test_the_front_is_of_metric_bytes_and_milliseconds():
    def tried(number, value, mb, ms, state="finished"):
        return Tried(number, {"a": number}, Outcome(state, value=value, mb=mb, ms=ms))

    found = Found(
        "accuracy",
        "student",
        [
            tried(0, 0.8, 10, 5),
            tried(1, 0.8, 11, 5),
            tried(2, 0.9, 20, 5),
            tried(3, 0.7, 10, 4),
            tried(4, 0.99, 1, 1, "given up"),
        ],
        None,
        {},
    )
    assert on_front(found) == [0, 3, 2]
    assert [row[0] for row in rows_of(found)] == ["trial", "0*", "1", "2*", "3*", "4"]
