import json
from pathlib import Path

import pytest

from distill.cli import main
from distill.reports.side_by_side import run_names


def write_recipe(folder, rows, model, **changes):
    """The recipe of a run in a folder that has nothing else yet."""
    folder.mkdir()
    lines = {
        "task": "sst2",
        "output_dir": folder,
        "data": f"{{path: {rows}, max_length: 8}}",
        "benchmark": "{sequence_length: 8, throughput_batch_size: 2, rounds: 1}",
        "steps": f"{{tuned: {{run: finetune, model: {model}, max_steps: 1, num_layers: 1}}}}",
        **changes,
    }
    text = "".join(f"{key}: {value}\n" for key, value in lines.items() if value)
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path, sst2_folder, pretrained):
    return [write_recipe(tmp_path / name, sst2_folder, pretrained) for name in ("a", "b")]


def test_runs_are_set_side_by_side(runs, tmp_path, capsys):
    first, second = runs
    for run in runs:
        assert main(["run", str(run / "recipe.yaml"), "--report.price_per_hour", "3.6"]) == 0
    alone = {run: json.loads((run / "report.json").read_text()) for run in runs}
    capsys.readouterr()
    assert main(["report", str(first), str(second)]) == 0
    folder = tmp_path / "side-by-side"
    assert f"→ {folder / 'report.html'}" in capsys.readouterr().out
    found = json.loads((folder / "report.json").read_text())
    assert found.keys() == alone[first].keys()
    whole = {f"{run.name}/{model['name']}": model for run in runs for model in alone[run]["models"]}
    names = list(whole)
    assert [model["name"] for model in found["models"]] == [model["path"] for model in found["models"]] == names
    assert found["baseline"] == f"a/{alone[first]['baseline']}"
    of_baseline = whole[found["baseline"]]["metrics"]["accuracy"]
    for model in found["models"]:
        before = whole[model["name"]]
        assert (model["metrics"], model["interval"]) == (before["metrics"], before["interval"])
        assert model["retention"] == pytest.approx(before["metrics"]["accuracy"] / of_baseline)
        assert model["agreement"] == (before["agreement"] if model["name"].startswith("a/") else None)
        assert model["cost_per_million"]["1"] == pytest.approx(model["latency_ms"]["p50"], rel=1e-6)
    assert found["slices"] is found["worst_rows"] is found["contamination"] is None
    for file in ("report.md", "report.html"):
        assert all(name in (folder / file).read_text() for name in names)
    assert "# b\n" in (folder / "report.html").read_text()  # both recipes
    assert (folder / "report.png").stat().st_size > 1000
    assert {run: json.loads((run / "report.json").read_text()) for run in runs} == alone


def test_what_does_not_compare_is_told(runs, tmp_path, sst2_folder, pretrained, capsys):
    first, second = runs
    own = f"{{kind: classification, path: {sst2_folder}, text: sentence, max_length: 8}}"
    other_task = write_recipe(tmp_path / "c", sst2_folder, pretrained, task=None, data=own)
    fewer = f"{{path: {sst2_folder}, max_length: 8, max_eval_rows: 20}}"
    other_rows = write_recipe(tmp_path / "d", sst2_folder, pretrained, data=fewer)
    for words, said in (
        ([first, other_task], "c: its task is "),
        ([first, other_rows], "d: its models are scored on other rows than those of"),
        ([first, first], "a: is named twice"),
        ([first, tmp_path / "none"], "none: no run lies there (no recipe.yaml"),
        ([first, second, "--output", second], "b: is a run's folder; say another by --output"),
        ([first, "--output", tmp_path / "o"], "--output: is of several runs side by side"),
    ):
        assert main(["report", *map(str, words)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "side-by-side").exists()


def test_names_are_as_short_as_they_can_be():
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert run_names([Path("/x/1/a"), Path("/x/2/a")]) == ["1/a", "2/a"]
    assert run_names([Path("/x/a"), Path("/a")]) == ["x/a", "a"]
