"""What a report says of rows that were cut, from check to card."""

import json
from dataclasses import asdict

import pytest

from distill.cli import main
from distill.errors import InputError
from distill.recipes.check import print_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from tests.conftest import sentences


@pytest.fixture
def recipe(tmp_path, sst2_folder, pretrained):
    path = tmp_path / "r.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {sst2_folder}, max_length: 8}}
benchmark: {{sequence_length: 8, throughput_batch_size: 2, rounds: 1}}
steps:
  tuned: {{run: finetune, model: {pretrained}, max_steps: 1, num_layers: 1}}
  small: {{run: quantize, model: tuned, format: bf16}}
""")
    return path


def test_cut_rows_are_told_from_check_to_card(recipe, capsys):
    counts = {
        split: {"rows": len(rows), "cut": sum(len(row["sentence"].split()) + 2 > 8 for row in rows)}
        for split, rows in (("train", sentences(96)), ("validation", sentences(40, seed=1)))
    }
    cut = [f"{each['cut']} of {each['rows']} {split} rows" for split, each in counts.items()]
    assert 0 < counts["train"]["cut"] < 96
    plan = make_plan(load_recipe(recipe))
    print_plan(plan)
    assert f"cut at max_length: {', '.join(cut)}" in capsys.readouterr().out
    run_plan(plan)
    assert f"cut at max_length: {', '.join(cut)}" in " ".join(capsys.readouterr().err.split())
    report = asdict(write_report(plan))
    folder = plan.recipe.output_dir
    assert json.loads((folder / "report.json").read_text())["truncated"] == report["truncated"] == counts
    assert report["models"][1]["truncated"] == {"validation": counts["validation"]}  # quantizing read no rows
    assert f"Rows cut at max_length: {', '.join(cut)}." in (folder / "report.md").read_text()
    assert f"these were cut at max_length: {', '.join(cut)}." in (folder / "tuned" / "README.md").read_text()
    assert f"these were cut at max_length: {cut[1]}." in (folder / "small" / "README.md").read_text()
    assert json.loads((folder / "tuned" / "step.json").read_text())["truncated"] == counts
    assert main(["eval", str(folder / "tuned")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["truncated"] == {"validation": counts["validation"]}


@pytest.mark.parametrize("metric", ["f1", "eval_f1", "loss/soft", "perplexity"])
def test_a_metric_that_is_not_computed_is_told_before(recipe, metric):
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": "true"}
    best |= {"metric_for_best_model": metric}
    with pytest.raises(InputError, match=r"tuned\.metric_for_best_model: .* there are accuracy, loss, loss/hard"):
        make_plan(load_recipe(recipe, {f"tuned.{name}": value for name, value in best.items()}, draft=True))
    for known in ("accuracy", "eval_accuracy", "loss", "eval_loss", "loss/hard"):
        given = best | {"metric_for_best_model": known}
        make_plan(load_recipe(recipe, {f"tuned.{name}": value for name, value in given.items()}, draft=True))
