"""The table of many GLUE runs, with numbers worked out by hand, and the script that makes it."""

import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from distill.experiments.leaderboard import (
    as_csv,
    as_json,
    as_markdown,
    make_leaderboard,
)
from tests.conftest import sentences, write_rows
from tests.records import report_of

ROOT = Path(__file__).parents[2]


def model(name, latency, rate, parameters, **metrics):
    return {
        "name": name, "metrics": metrics, "num_parameters": parameters, "size_on_disk_bytes": 4 * parameters,
        "latency_ms": {"p50": latency, "p95": 99.0}, "throughput_samples_per_second": rate,
    }  # fmt: skip


def report(teacher, student, latency=10.0):
    models = [
        model("teacher", latency, 50.0, 2_000_000, **teacher),
        model("student", latency / 2, 100.0, 1_000_000, **student),
    ]
    return report_of({"models": models})


def mrpc(f1, accuracy):
    return {"f1": f1, "accuracy": accuracy, "average": (f1 + accuracy) / 2}


REPORTS = {
    ("cola", 0): report({"matthews_correlation": 0.5}, {"matthews_correlation": 0.4}),
    ("cola", 1): report({"matthews_correlation": 0.6}, {"matthews_correlation": 0.5}),
    ("mrpc", 0): report(mrpc(0.9, 0.8), mrpc(0.8, 0.7)),
    ("mrpc", 1): report(mrpc(0.9, 0.8), mrpc(0.84, 0.72), latency=20.0),
    ("wnli", 0): report({"accuracy": 0.5}, {"accuracy": 0.3}),
    ("wnli", 1): report({"accuracy": 0.5}, {"accuracy": 0.3}),
}


def test_averages_are_those_worked_out_by_hand():
    board = make_leaderboard(REPORTS, ["wnli", "mrpc", "cola"], [0, 1])
    teacher, student = board.rows
    assert board.tasks == ["cola", "mrpc", "wnli"]  # GLUE's order
    assert (board.averaged_tasks, board.notes) == (board.tasks, [])
    # the teacher: (50 + 85 + 50) / 3 and (60 + 85 + 50) / 3; the student: (40 + 75 + 30) / 3 and (50 + 78 + 30) / 3
    assert teacher.average.values == pytest.approx([185 / 3, 195 / 3])
    assert student.average.values == pytest.approx([145 / 3, 158 / 3])
    assert student.average_without_wnli.values == pytest.approx([115 / 2, 128 / 2])
    assert student.average.deviation == pytest.approx(13 / 3 / 2**0.5)  # of two numbers: their distance over √2
    assert student.retention == pytest.approx((145 + 158) / (185 + 195))
    assert student.tasks["mrpc"]["f1"].values == pytest.approx([80, 84])
    assert (student.speed_up, student.throughput_ratio, student.num_parameters) == (2.0, 2.0, 1_000_000)


def test_the_table_has_a_row_for_each_model_and_a_column_for_each_task():
    board = make_leaderboard(REPORTS, ["cola", "mrpc", "wnli"], [0, 1])
    header, _, teacher, student = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in as_markdown(board).splitlines()[:4]
    ]
    assert header == [
        "model", "CoLA (Mcc)", "MRPC (F1/acc)", "WNLI (acc)", "average", "average without WNLI", "retention", "params",
        "MB on disk", "speed-up, 1 row", "32 rows",
    ]  # fmt: skip
    assert student == [
        "student", "45.0 ± 7.1", "82.0 ± 2.8 / 71.0 ± 1.4", "30.0 ± 0.0", "50.5 ± 3.1", "60.8 ± 4.6", "0.797", "1.0 M",
        "4.0", "2.00×", "2.00×",
    ]  # fmt: skip
    assert teacher[6] == "1.000"
    rows = list(csv.DictReader(io.StringIO(as_csv(board))))
    assert [row["model"] for row in rows] == ["teacher", "student"]
    assert (rows[1]["mrpc.f1"], rows[1]["mrpc.f1.deviation"], rows[1]["average"]) == ("82.0", "2.828", "50.5")
    assert json.loads(as_json(board))["rows"][1]["tasks"]["mrpc"]["f1"]["values"] == pytest.approx([80, 84])


def test_what_is_missing_is_said_and_not_averaged():
    mnli = {("mnli", 0): report({"accuracy": 0.8}, {"accuracy": 0.7})}
    board = make_leaderboard({("cola", 0): REPORTS["cola", 0], **mnli}, ["cola", "mnli", "rte"], [0])
    assert board.rows[1].average.values == pytest.approx([55])
    assert board.notes == [
        "Failed: RTE, seed 0.",
        "The average is over CoLA, MNLI.",
        "MNLI: there were no mismatched rows, so its score is that of the matched ones.",
    ]
    text = as_markdown(board)
    assert "| CoLA (Mcc) | MNLI (m) | RTE (acc) |" in text
    assert "| student | 40.0 | 70.0 | – | 55.0 | 0.846 |" in text
    both = {("mnli", 0): report({"accuracy": 0.8, "accuracy_mm": 0.9}, {"accuracy": 0.7, "accuracy_mm": 0.6})}
    board = make_leaderboard(both, ["mnli"], [0])
    assert "| student | 70.0 / 60.0 | 65.0 |" in as_markdown(board)
    assert not board.notes


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_runs_each_task_and_goes_on_after_one_that_fails(
    tmp_path, pretrained, sst2_folder, monkeypatch, capfd
):
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "sst2").symlink_to(sst2_folder)
    pairs = [{"sentence1": row["sentence"], "sentence2": "the end", "label": row["label"]} for row in sentences(20)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "glue" / "mrpc" / f"{split}.jsonl", pairs)
    for task in ("sst2", "mrpc", "rte"):
        (tmp_path / f"{task}.yaml").write_text(
            f"output_dir: runs/{task}\ndata: {{max_length: 24}}\n"
            "benchmark: {sequence_length: 16, rounds: 1, throughput_batch_size: 2}\nsteps:\n"
            f"  teacher: {{run: finetune, model: {pretrained}}}\n  student: {{run: distill, teacher: teacher}}\n"
        )
    table, start = script("glue_table"), subprocess.Popen

    def start_or_fail(command, **options):
        failing = "print('[1/2] teacher'); print('error: mrpc is wrong'); print('and more'); raise SystemExit(2)"
        return start([sys.executable, "-c", failing] if "mrpc" in command else command, **options)

    monkeypatch.setattr("subprocess.Popen", start_or_fail)
    arguments = [f"{tmp_path}/{{task}}.yaml", "--tasks", "rte", "sst2", "mrpc", "--data_root", str(tmp_path / "glue")]
    arguments += ["--output_dir", str(tmp_path / "out"), "--epochs", "2", "--most_steps", "4", "sst2=5"]
    assert table.main(arguments) == 1
    said = capfd.readouterr().err
    assert "[1/2] SST-2, seed 42: 5 steps a model" in said
    assert "[2/2] MRPC, seed 42: 2 steps a model, about" in said  # 20 rows are one step of 32, two epochs are two
    assert "failed: MRPC, seed 42: error: mrpc is wrong (exit status 2; " in said
    assert (tmp_path / "out" / "mrpc" / "seed-42.log").read_text().endswith("and more\n")
    assert f"failed: RTE, seed 42: data.path: {tmp_path}/glue/rte: no such file" in said
    record = json.loads((tmp_path / "out" / "sst2" / "seed-42" / "student" / "step.json").read_text())
    assert (record["options"]["max_steps"], record["options"]["seed"]) == (5, 42)
    text = (tmp_path / "out" / "glue.md").read_text()
    assert "Rows: SST-2 96 train + 40 validation; MRPC 20 train + 20 validation." in text
    assert "Failed: MRPC, seed 42; RTE, seed 42." in text
    accuracy = json.loads((tmp_path / "out" / "sst2" / "seed-42" / "report.json").read_text())["models"][1]["metrics"]
    (row,) = [line for line in text.splitlines() if line.startswith("| student")]
    assert row.split(" | ")[1] == f"{100 * accuracy['accuracy']:.1f}"

    arguments[arguments.index("rte") : arguments.index("mrpc") + 1] = ["sst2"]
    monkeypatch.setattr("subprocess.Popen", lambda *_: pytest.fail("a finished task runs again"))
    assert table.main(arguments) == 0
    assert "Failed" not in (tmp_path / "out" / "glue.md").read_text()

    file = tmp_path / "out" / "sst2" / "seed-42" / "report.json"
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 2', 1))
    capfd.readouterr()
    assert table.main(arguments) == 1
    assert f"failed: SST-2, seed 42: {file}: has schema 2, and " in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "sst"], "--tasks: no GLUE task 'sst'; did you mean 'sst2'?"),
        (["--most_steps", "many"], "--most_steps: 'many' should be a number of steps"),
        (["any.yaml", "sst2"], "sst2: not understood"),
    ],
)
def test_wrong_arguments_are_one_message_and_status_2(arguments, message, capsys):
    assert script("glue_table").main(arguments) == 2
    assert message in capsys.readouterr().err
