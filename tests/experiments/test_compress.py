"""Compressions of tiny models: what is refused, dropped, chosen, resumed and written."""

import json
import os
import re

import numpy as np
import pytest
from safetensors.torch import load_file

from distill.cli import main
from distill.errors import InputError
from distill.evaluation.fidelity import halves
from distill.evaluation.intervals import paired_retention
from distill.experiments.asked import Asked, read_budget
from distill.experiments.candidates import (
    Candidate,
    Shape,
    candidates_of,
    final_step,
    fitting,
    nearest_miss,
    promising,
    shapes_of,
    spread,
    steps_of_shape,
)
from distill.experiments.choice import Choice, Scored, choose, least_retention
from distill.experiments.compress import compress
from distill.experiments.footprint import Footprint
from distill.experiments.reason import Compared, reason_of
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from distill.tasks.base import GLUE
from tests.conftest import sentences, tiny_bert, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", sentences(96))
    write_rows(folder / "validation.jsonl", sentences(80, seed=1))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer, rows):
    """A model with a head, whose head was not trained."""
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    model = tiny_bert(initializer_range=0.05, num_hidden_layers=2)
    model.config.id2label, model.config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


BENCHMARK = {"sequence_length": 16, "throughput_batch_size": 2, "rounds": 1}


def asked(teacher, rows, folder, **changes):
    given = {
        "model": str(teacher),
        "output_dir": folder,
        "task": "sst2",
        "data": {"path": str(rows), "max_length": 24},
        "benchmark": BENCHMARK,
        "engine": "torch",
        "budget": 900.0,  # of which rows as few as these take seconds
    }
    return Asked(**{**given, **changes})


# --- pure functions -------------------------------------------------------------------------------------------------


def predictions(right, count=400):
    """Of rows that are all of class 1, so many are right."""
    return [1] * right + [0] * (count - right)


LABELS = [1] * 400


@pytest.mark.parametrize(("right", "told"), [(360, False), (80, True)])
def test_a_pick_that_lost_much_is_said_with_what_would_help(teacher, rows, tmp_path, right, told):
    whole, picked = (
        Compared(name, predictions(each), Footprint(9.0, 5.0)) for name, each in (("t", 380), ("s", right))
    )
    choice = Choice(pick="s", best="s", runner_up=None, behind=0.0)
    said = reason_of(
        GLUE["sst2"], choice, picked, whole, labels=LABELS, stating=range(400), among=1,
        asked=asked(teacher, rows, tmp_path),
    )  # fmt: skip
    assert f"its accuracy is {right / 400:.4f}" in said
    assert ("more --budget trains more models for longer" in said) == told


def scored(name, right, mb, ms):
    return Scored(name, predictions(right), Footprint(mb, ms))


def test_the_cheapest_is_picked_that_the_rows_show_to_be_about_as_good():
    task = GLUE["sst2"]
    best, same, worse = scored("best", 380, 30, 10), scored("same", 380, 10, 5), scored("worse", 340, 1, 1)
    found = choose(task, [worse, best, same], LABELS, tolerance=0.01)
    assert (found.pick, found.best, found.runner_up) == ("same", "same", "best")
    # 10 % fewer right: far below 1 %, and within 20 %
    assert choose(task, [best, worse], LABELS, tolerance=0.01).pick == "best"
    found = choose(task, [best, worse], LABELS, tolerance=0.2)
    assert (found.pick, found.best, found.runner_up) == ("worse", "best", "best")
    assert 0.1 < found.behind < 0.2


def test_where_few_rows_show_nothing_the_best_is_picked():
    """One row of 40 fewer: 2.6 % below, and the interval's end is farther."""
    task = GLUE["sst2"]
    best = Scored("best", predictions(38, 40), Footprint(30, 10))
    cheap = Scored("cheap", predictions(37, 40), Footprint(3, 1))
    assert choose(task, [best, cheap], [1] * 40, tolerance=0.03).pick == "best"
    assert choose(task, [best, cheap], [1] * 40, tolerance=0.1).pick == "cheap"


def test_milliseconds_come_first_as_far_as_a_clock_tells_them_apart():
    task = GLUE["sst2"]
    found = choose(task, [scored("a", 380, 9, 5.01), scored("b", 380, 8, 5.04)], LABELS, tolerance=0.01)
    assert found.pick == "b"
    assert choose(task, [scored("a", 380, 9, 4.0), scored("b", 380, 8, 5)], LABELS, tolerance=0.01).pick == "a"


def test_the_retention_is_its_intervals_lower_end():
    task, teacher = GLUE["sst2"], predictions(400)
    value, (low, high) = paired_retention(task, predictions(360), teacher, LABELS)
    assert value == pytest.approx(0.9)
    # of a teacher that is always right it is the share of right rows: 0.9 ± 1.96 √(0.9 · 0.1 / 400)
    assert (low, high) == pytest.approx((0.8706, 0.9294), abs=0.004)
    assert least_retention(task, scored("a", 360, 1, 1), teacher, LABELS) == low


def test_the_rows_that_choose_are_not_those_that_state_the_metric():
    choosing, stating = halves(81)
    assert sorted([*choosing, *stating]) == list(range(81))
    assert len(choosing) == 40
    assert np.array_equal(choosing, halves(81)[0])


def test_the_grid():
    found = shapes_of(6, intermediate_size=768, vocab_size=12000)
    assert len(found) == len(set(found)) == 16
    assert found[0] == Shape()
    assert {shape.num_layers for shape in found} == {None, 4, 3, 2}
    assert shapes_of(1, intermediate_size=None, vocab_size=None) == [Shape()]
    names = [each.name for each in candidates_of([Shape(), Shape(3)], ["torch", "openvino"])]
    assert "whole-fp32" not in names  # which is there already
    assert {"layers-3-fp32", "layers-3-nf4", "whole-int8", "layers-3-openvino-int8"} <= set(names)
    assert not [name for name in names if "onnx" in name]


def test_the_steps_of_a_shape():
    shape = Shape(3, 768, 12000)
    assert steps_of_shape(shape, "t", [100, 400]) == {
        "trimmed-12000": {"run": "trim_vocabulary", "model": "t", "vocab_size": 12000},
        "trimmed-12000-pruned-768": {"run": "prune", "model": "trimmed-12000", "intermediate_size": 768},
        shape.name: {
            "run": "distill",
            "teacher": "t",
            "max_steps": 100,
            "model": "trimmed-12000-pruned-768",
            "num_layers": 3,
        },
        f"{shape.name}-2": {"run": "distill", "teacher": "t", "max_steps": 400, "model": shape.name},
    }
    assert steps_of_shape(Shape(), "t", []) == {}
    assert final_step(Candidate(shape, "fp32"), "t", 2) == (f"{shape.name}-2", {})
    name, last = final_step(Candidate(shape, "int8"), "t", 2)
    assert last == {name: {"run": "quantize", "format": "int8", "model": f"{shape.name}-2"}}


def test_what_exceeds_a_limit_drops_out_and_the_nearest_miss_is_found():
    footprints = {"a": Footprint(10, 4), "b": Footprint(5, 9.7), "c": Footprint(30, 2)}
    assert fitting(footprints, {}, 0.05) == ["a", "b", "c"]
    assert fitting(footprints, {"max_mb": 10, "max_ms": 10}, 0.05) == ["a"]  # 9.7 is within the clock's margin
    assert fitting(footprints, {"max_mb": 10, "max_ms": 10, "min_retention": 0.9}, 0.0) == ["a", "b"]
    assert nearest_miss(footprints, {"max_mb": 4}, 0.05) == "b"


def test_no_shape_is_trained_that_another_has_more_of_at_less_cost():
    large, slow, small = Shape(None, 64), Shape(3, 64), Shape(2, 64)
    costs = {large: Footprint(10, 5), slow: Footprint(11, 6), small: Footprint(8, 3)}
    assert promising(list(costs), costs, 8) == [large, small]
    assert promising(list(costs), costs, 1) == [large]
    assert spread(list(range(16)), 4) == [0, 5, 10, 15]


@pytest.mark.parametrize(("text", "seconds"), [("30min", 1800), ("90s", 90), ("2h", 7200), ("1.5 min", 90)])
def test_budgets_are_read(text, seconds):
    assert read_budget(text) == seconds


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--max_mb", "0"], "--max_mb: should be a number above 0"),
        (["--max_ms", "-1"], "--max_ms: should be a number above 0"),
        (["--min_retention", "much"], "--min_retention: should be a number above 0, got 'much'"),
        (["--budget", "soon"], "--budget: should be a time like 30min, 90s or 2h, got 'soon'"),
        (["--budget", "0s"], "--budget: should be a time"),
        (["--engine", "openvin"], "--engine: no engine 'openvin'; did you mean 'openvino'"),
        (["--tolerance", "2"], "--tolerance: should be a share from 0 to below 1"),
        (["--student.max_steps", "3"], "--student.max_steps: no such option; compress takes"),
        (["--data.max_lenght", "3"], "--data.max_lenght: unknown option"),
    ],
)
def test_what_is_wrong_is_told_before_anything(tmp_path, teacher, rows, words, problem, capsys):
    command = ["compress", str(teacher), "--task", "sst2", "--data.path", str(rows)]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_missing_words_are_told(teacher, capsys):
    assert main(["compress", str(teacher)]) == 2
    said = capsys.readouterr().err
    assert "--output_dir: missing" in said
    assert "--task: missing" in said


def test_an_engine_that_is_not_installed_is_told(teacher, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.experiments.asked.missing_packages", lambda engine: [f"{engine} is not installed"])
    with pytest.raises(InputError, match="--engine: onnxruntime is not installed"):
        asked(teacher, rows, tmp_path, engine="onnxruntime")
    monkeypatch.setattr(
        "distill.experiments.asked.missing_packages", lambda engine: ["none"] if engine == "openvino" else []
    )
    assert asked(teacher, rows, tmp_path, engine="auto").engines == ("torch", "onnxruntime")


def test_limits_that_nothing_keeps_end_before_anything_is_trained(tmp_path, teacher, rows, monkeypatch, capsys):
    monkeypatch.setattr("distill.experiments.workplace.run_plan", lambda *_, **__: pytest.fail("something was run"))
    command = ["compress", str(teacher), "--task", "sst2", "--data.path", str(rows), "--data.max_length", "24"]
    command += [f"--benchmark.{key}={value}" for key, value in BENCHMARK.items()]
    command += ["--engine", "torch", "--max_mb", "0.001", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"Nothing keeps the limits \(max_mb 0.001\): of \d+ candidates layers-1-neurons-64\S* comes", said)
    assert "Loosen --max_mb to 0.0" in said
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, rows):
    folder = tmp_path_factory.mktemp("compressed") / "out"
    ask = asked(teacher, rows, folder, limits={"max_mb": 0.4})
    with pytest.MonkeyPatch.context() as patch:  # as for each test
        patch.setattr("distill.training.config.has_bf16", lambda device: False)
        return ask, compress(ask)


def test_a_compression_leaves_a_pick_a_recipe_and_a_report(finished, rows, tmp_path):
    ask, found = finished
    folder = ask.output_dir
    assert found.picked
    report = json.loads((folder / "report.json").read_text())
    pick = report["pick"]
    assert pick["limits"] == {"max_mb": 0.4}
    assert pick["reason"] == found.said
    entry = next(model for model in report["models"] if model["name"] == pick["model"])
    assert entry["size_on_disk_bytes"] <= 0.4e6
    assert "validation rows that had no part in the choice" in found.said
    served, made = folder / "pick" / "model.safetensors", folder / pick["model"] / "model.safetensors"
    assert os.path.samefile(served, made)
    assert run_plan(make_plan(load_recipe(folder / "recipe.yaml"))) == []

    again = make_plan(load_recipe(folder / "recipe.yaml", {"output_dir": str(tmp_path / "anew")}))
    run_plan(again)
    one, two = load_file(made), load_file(again.steps[pick["model"]].folder / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def test_a_rebuilt_report_keeps_the_pick(finished):
    folder = finished[0].output_dir
    before = json.loads((folder / "report.json").read_text())["pick"]
    assert main(["report", str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text())["pick"] == before


def test_what_is_finished_is_not_run_again(finished, monkeypatch):
    ask, found = finished
    monkeypatch.setattr("distill.experiments.workplace.run_plan", lambda *_, **__: pytest.fail("something was run"))
    monkeypatch.setattr("distill.experiments.workplace.evaluate_model", lambda *_, **__: pytest.fail("scored again"))
    assert compress(ask).said == found.said


def test_another_compression_into_the_folder_is_refused(finished, teacher, rows):
    with pytest.raises(InputError, match="holds what was compressed with limits"):
        compress(asked(teacher, rows, finished[0].output_dir, limits={"max_mb": 0.3}))


def test_one_that_was_cut_off_runs_nothing_twice(tmp_path, teacher, rows, monkeypatch):
    from distill.experiments import workplace

    ran = []

    def run(plan, *, only):
        if len(ran) == 2:
            ran.append(None)
            raise KeyboardInterrupt
        ran.append(tuple(only))
        return run_plan(plan, only=only)

    monkeypatch.setattr(workplace, "run_plan", run)
    ask = asked(teacher, rows, tmp_path / "out", limits={"max_mb": 0.4})
    with pytest.raises(KeyboardInterrupt):
        compress(ask)
    assert compress(ask).picked
    steps = [name for only in ran if only for name in only]
    assert len(steps) == len(set(steps))


def test_a_budget_of_a_second_ends_with_a_pick(tmp_path, teacher, rows):
    found = compress(asked(teacher, rows, tmp_path / "out", budget=1.0, limits={"max_mb": 0.4}))
    assert found.picked
    assert (tmp_path / "out" / "pick" / "config.json").is_file()


def test_a_retention_that_none_reaches(tmp_path, teacher, rows):
    found = compress(asked(teacher, rows, tmp_path / "out", budget=1.0, limits={"min_retention": 3.0}))
    assert not found.picked
    assert "No model keeps min_retention 3" in found.said
    assert "Loosen --min_retention to" in found.said


def test_a_model_without_a_head_is_fine_tuned_first(tmp_path, pretrained, rows):
    found = compress(asked(pretrained, rows, tmp_path / "out", budget=10.0, limits={"max_mb": 0.4}))
    assert found.picked
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.steps["teacher"].run == "finetune"
    assert (tmp_path / "out" / "pick" / "config.json").is_file()


@pytest.mark.slow
def test_an_engine_serves_the_pick(tmp_path, teacher, rows):
    found = compress(asked(teacher, rows, tmp_path / "out", budget=5.0, engine="onnxruntime"))
    assert found.picked
    assert list((tmp_path / "out" / "pick" / "onnx").glob("*.onnx"))
