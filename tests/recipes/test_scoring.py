"""`distill eval` of a run's models: on the rows that its run held out, or on others with a word of warning."""

import json
import shutil

import pytest

from distill.cli import main
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from tests.conftest import sentences, tiny_bert, write_rows

NAMES = ("negative", "positive")
HELD_OUT = "note: the validation rows of the model's run"
TRAINED_ON = "note: the model was trained on some of these rows"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Two finished runs, of a GLUE task and of one file with columns of its own."""
    folder = tmp_path_factory.mktemp("scoring")
    model = tiny_bert(id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)})
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"review": row["sentence"], "verdict": NAMES[row["label"]]} for row in sentences(60)]
    write_rows(folder / "reviews.jsonl", rows)
    write_rows(folder / "others.jsonl", rows[:7])
    (folder / "glue").mkdir()
    write_rows(folder / "glue" / "train.jsonl", sentences(30))
    write_rows(folder / "glue" / "validation.jsonl", sentences(20, seed=1))
    own = f"kind: classification, path: {folder / 'reviews.jsonl'}, text: review, label: verdict, max_train_rows: 20"
    for name, rows in (
        ("glue", f"task: sst2\ndata: {{path: {folder / 'glue'}, max_length: 16}}"),
        ("own", f"data: {{{own}, max_length: 16}}"),
    ):
        (folder / f"{name}.yaml").write_text(
            f"{rows}\noutput_dir: {folder / 'runs' / name}\n"
            "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
            f"steps: {{int8: {{run: quantize, model: {folder / 'model'}, format: int8}}}}\n"
        )
        made = make_plan(load_recipe(folder / f"{name}.yaml"))
        run_plan(made)
        write_report(made)
    return folder


def evaluate(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    return " ".join(out.split()), json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize(("run", "task", "rows"), [("glue", "sst2", 20), ("own", "classification", 6)])
def test_a_runs_model_is_scored_on_the_rows_of_its_run(folder, capsys, run, task, rows):
    said, found = evaluate(capsys, folder / "runs" / run / "int8")
    assert HELD_OUT in said
    assert (found["task"], found["rows"]) == (task, {"validation": rows})
    report = json.loads((folder / "runs" / run / "report.json").read_text())
    (entry,) = (model for model in report["models"] if model["name"] == "int8")
    assert {key: found["metrics"][key] for key in entry["metrics"]} == entry["metrics"]
    _, fewer = evaluate(capsys, folder / "runs" / run / "int8", "--data.max_eval_rows", 3)
    assert fewer["rows"] == {"validation": 3}


def test_scores_of_training_rows_are_told_apart(folder, capsys):
    of_own = ("--data.kind", "classification", "--data.text", "review", "--data.label", "verdict")
    model = folder / "runs" / "own" / "int8"
    said, found = evaluate(capsys, model, *of_own, "--data.path", folder / "reviews.jsonl")
    assert found["rows"] == {"validation": 60}
    assert TRAINED_ON in said
    said, found = evaluate(capsys, model, *of_own, "--data.path", folder / "others.jsonl")
    assert found["rows"] == {"validation": 7}
    assert TRAINED_ON not in said
    assert HELD_OUT not in said
    said, _ = evaluate(capsys, folder / "runs" / "glue" / "int8", "--task", "sst2", "--data.path", folder / "glue")
    assert TRAINED_ON not in said
    assert HELD_OUT not in said


def test_rows_of_a_run_that_are_gone_are_told_as_such(folder, tmp_path, capsys):
    shutil.copytree(folder / "runs" / "own" / "int8", tmp_path / "moved")
    record = json.loads((tmp_path / "moved" / "step.json").read_text())
    record["data"]["path"] = str(tmp_path / "nowhere.jsonl")
    (tmp_path / "moved" / "step.json").write_text(json.dumps(record))
    assert main(["eval", str(tmp_path / "moved")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "nowhere.jsonl: no such file" in said
    assert "these are the validation rows of the model's run" in said


def test_the_kind_is_that_of_the_run_where_other_rows_are_named(folder, capsys):
    columns = ("--data.text", "review", "--data.label", "verdict")
    _, found = evaluate(capsys, folder / "runs" / "own" / "int8", "--data.path", folder / "others.jsonl", *columns)
    assert (found["task"], found["rows"]) == ("classification", {"validation": 7})
