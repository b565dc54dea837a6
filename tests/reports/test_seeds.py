"""A run with `seeds`: mean, spread and paired comparisons by hand, in report.json, report.md and the card."""

import itertools
import json

import numpy as np
import pytest

from distill.cli import main
from distill.evaluation.intervals import difference_over_seeds, paired_difference
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from distill.tasks.base import GLUE, Task

SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory, pretrained, sst2_folder):
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "r.yaml").write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {sst2_folder}, max_length: 24}}\nseeds: {SEEDS}\n"
        "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
        "steps:\n"
        f"  teacher: {{run: finetune, model: {pretrained}, max_steps: 6, learning_rate: 1e-3}}\n"
        "  student: {run: distill, teacher: teacher, num_layers: 1, max_steps: 4, learning_rate: 1e-3}\n"
        "  small: {run: quantize, model: student, format: int8}\n"
    )
    assert main(["run", str(folder / "r.yaml")]) == 0
    return folder, json.loads((folder / "run" / "report.json").read_text())


def test_every_seed_has_its_folder_and_learns_from_its_teacher(run):
    folder, report = run
    names = [f"{step}{suffix}" for step in ("teacher", "student", "small") for suffix in ("", ".seed1", ".seed2")]
    assert [model["name"] for model in report["models"]] == names
    for number, suffix in enumerate(("", ".seed1", ".seed2")):
        record = json.loads((folder / "run" / f"student{suffix}" / "step.json").read_text())
        assert (record["options"]["seed"], record["parents"]) == (SEEDS[number], [f"teacher{suffix}"])
        assert json.loads((folder / "run" / f"small{suffix}" / "step.json").read_text())["parents"] == [
            f"student{suffix}"
        ]


def test_mean_and_spread_are_those_of_the_models(run):
    _, report = run
    models = {model["name"]: model for model in report["models"]}
    assert list(report["seeds"]) == ["teacher", "student", "small"]
    for name, found in report["seeds"].items():
        assert found["models"] == [name, f"{name}.seed1", f"{name}.seed2"]
        first, second, third = (models[each]["metrics"]["accuracy"] for each in found["models"])
        mean = (first + second + third) / 3
        variance = ((first - mean) ** 2 + (second - mean) ** 2 + (third - mean) ** 2) / 2
        assert found["mean"]["accuracy"] == pytest.approx(mean)
        assert found["std"]["accuracy"] == pytest.approx(variance**0.5)
        assert (found["min"]["accuracy"], found["max"]["accuracy"]) == (
            min(first, second, third),
            max(first, second, third),
        )
        low, high = found["interval"]["accuracy"]
        assert low <= mean <= high


def test_models_are_compared_over_rows_and_seeds_and_never_with_their_own_seeds(run):
    folder, report = run
    (comparison,) = report["comparisons"]
    assert (comparison["model"], comparison["over"]) == ("student", "teacher")
    means = {name: found["mean"]["accuracy"] for name, found in report["seeds"].items()}
    assert comparison["difference"] == pytest.approx(means["student"] - means["teacher"])
    markdown, card = ((folder / "run" / name).read_text() for name in ("report.md", "student.seed1/README.md"))
    for text in (markdown, card):
        assert "Over the seeds" in text
        assert f"{means['student']:.4f}" in text


def test_a_second_run_trains_nothing_and_check_counts_the_trainings(run, capsys):
    folder, report = run
    made = make_plan(load_recipe(folder / "r.yaml"))
    assert run_plan(made) == []
    assert main(["report", str(folder / "run")]) == 0
    assert json.loads((folder / "run" / "report.json").read_text())["seeds"] == report["seeds"]
    capsys.readouterr()
    assert main(["check", str(folder / "r.yaml"), "--output_dir", str(folder / "other")]) == 0
    said = capsys.readouterr().out
    assert "(6 trainings, seeds 0, 1, 2)" in said
    assert "student.seed2: as student, with seed 2, about " in said


def accuracies(hits):
    return [np.asarray(each).astype(int) for each in hits]


def test_the_interval_is_that_of_every_draw_of_rows_and_seeds():
    """Four rows and two seeds: all 4⁴ draws of rows with all 2² draws of seeds, counted one by one."""
    task: Task = GLUE["sst2"]
    labels = [1, 1, 1, 1]
    first = accuracies([[1, 1, 0, 1], [1, 0, 0, 1]])
    second = accuracies([[1, 0, 0, 0], [0, 0, 1, 1]])
    value, (low, high) = difference_over_seeds(task, first, second, labels)
    assert value == pytest.approx(((3 - 1) + (2 - 2)) / 8)
    differences = np.array(first) - np.array(second)
    draws = [
        differences[list(seeds)][:, list(rows)].mean()
        for rows in itertools.product(range(4), repeat=4)
        for seeds in itertools.product(range(2), repeat=2)
    ]
    exact = np.percentile(draws, [2.5, 97.5])
    assert [low, high] == pytest.approx(exact.tolist(), abs=0.126)  # a step of the draws is an eighth


def test_one_pair_of_models_alike_in_all_seeds_has_the_interval_of_its_rows():
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=400)
    first, second = (np.where(generator.random(400) < share, labels, 1 - labels) for share in (0.9, 0.8))
    over_rows = paired_difference(GLUE["sst2"], first, second, labels)
    over_both = difference_over_seeds(GLUE["sst2"], [first] * 3, [second] * 3, labels)
    assert over_both[0] == pytest.approx(over_rows[0])
    assert over_both[1] == pytest.approx(over_rows[1], abs=4e-3)


def test_seeds_that_differ_widen_the_interval():
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=400)
    first = [np.where(generator.random(400) < share, labels, 1 - labels) for share in (0.95, 0.8, 0.65)]
    second = [np.where(generator.random(400) < 0.8, labels, 1 - labels)] * 3
    _, (low, high) = difference_over_seeds(GLUE["sst2"], first, second, labels)
    _, (one_low, one_high) = paired_difference(GLUE["sst2"], first[1], second[0], labels)
    assert high - low > 2 * (one_high - one_low)
    assert low < 0 < high
