"""What a report says beyond scores: planted faults are found, in every kind what fits it, and no text is pushed."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from distill.cli import main
from distill.common.records import read_report, read_step
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.evaluation.contamination import find_matches
from distill.evaluation.evaluate import Evaluation
from distill.publishing.published import without_rows
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.fidelity import measure_contamination, measure_fidelity
from distill.runs.card import model_card
from tests.conftest import make_tokenizer, sentences, write_rows
from tests.records import report_of


def evaluation(predictions, logits=None):
    return Evaluation({}, (0.0, 0.0), predictions, None if logits is None else np.asarray(logits).tolist())


def rows_with_sources(count, seed=0):
    return [{**row, "source": "mail" if number % 3 else "chat"} for number, row in enumerate(sentences(count, seed))]


def logits_of(labels, sure=2.0):
    return np.where(np.eye(2)[labels] == 1, sure, 0.0)


@pytest.fixture
def data(tmp_path):
    write_rows(tmp_path / "train.jsonl", sentences(200))
    write_rows(tmp_path / "validation.jsonl", rows_with_sources(600, seed=1))
    return load_data("sst2", DataOptions(path=str(tmp_path)), slices=["source"])


def test_planted_faults_are_found(data):
    generator = np.random.default_rng(0)
    labels, chats = np.array(data.labels("validation")), np.array(data.slices["source"]) == "chat"
    right = generator.random(600) < 0.88  # as sure as logits of 2 are
    teacher = np.where(right, labels, 1 - labels)
    noise = generator.random(600) < 0.03
    student = np.where(noise, 1 - teacher, teacher)
    worse = np.where(chats & (generator.random(600) < 0.3), 1 - labels, student)
    evaluations = {
        "teacher": evaluation(teacher.tolist(), logits_of(teacher)),
        "student": evaluation(student.tolist(), logits_of(student)),
        "worse": evaluation(worse.tolist(), logits_of(worse)),
        "too sure": evaluation(student.tolist(), logits_of(student, sure=8.0)),
    }
    found = measure_fidelity(data, evaluations, baseline="teacher", processor=make_tokenizer())
    assert {each.by for each in found.slices} >= {"label", "length", "source"}
    below = {(each.by, each.slice, model) for each in found.slices for model, p in each.p.items() if p < 0.05}
    assert below == {("source", "chat", "worse")}
    flips = found.flips["worse"]
    wrong, baseline = worse != labels, teacher != labels
    assert (flips.gained, flips.lost) == ((~wrong & baseline).sum(), (wrong & ~baseline).sum())
    assert flips.p < 0.001
    assert sum(each["lost"] for each in flips.classes.values()) == flips.lost
    assert found.flips["teacher"] is None
    gains = {name: each.held_out["nll_gain_low"] for name, each in found.calibration.items()}
    assert gains["too sure"] > 0.1
    assert gains["teacher"] < 0.01
    assert found.calibration["too sure"].temperature > 2
    first = next(each for each in found.worst_rows if each["model"] == "worse")
    row = first["row"]
    assert first["text"] == [data.splits["validation"][row]["sentence"]]
    assert first["baseline_right"] == bool(teacher[row] == labels[row])
    assert (first["baseline"], first["prediction"]) == tuple(
        ("negative", "positive")[each[row]] for each in (teacher, worse)
    )
    assert first["divergence"] == max(each["divergence"] for each in found.worst_rows if each["model"] == "worse")
    without = measure_fidelity(data, {"worse": evaluations["worse"]}, baseline="teacher", processor=None)
    assert without.flips == {"worse": None}
    assert without.worst_rows is None
    assert all(each.p == {} for each in without.slices)


def test_what_does_not_fit_a_kind_is_none(tmp_path):
    texts = [row["sentence"] for row in sentences(80)]
    rows = [{"text": text, "label": number % 7 / 2} for number, text in enumerate(texts)]
    write_rows(tmp_path / "scores" / "train.jsonl", rows)
    data = load_data(None, DataOptions(kind="regression", path=str(tmp_path / "scores"), validation_fraction=0.5))
    labels = np.array(data.labels("validation"))
    evaluations = {
        name: evaluation((labels + off).tolist(), (labels + off)[:, None])
        for name, off in (("teacher", 0.0), ("student", np.linspace(0, 1, len(labels))))
    }
    found = measure_fidelity(data, evaluations, baseline="teacher", processor=make_tokenizer())
    assert found.calibration == found.flips == {"teacher": None, "student": None}
    assert {each.metric for each in found.slices} <= {"squared_error"}
    assert found.worst_rows[0]["row"] == len(labels) - 1
    assert found.worst_rows[0]["baseline_right"] is None

    write_rows(tmp_path / "texts" / "train.jsonl", [{"text": text} for text in texts])
    data = load_data(None, DataOptions(kind="causal-lm", path=str(tmp_path / "texts")))
    windows = [{"loss": 1.0, "right": 1, "tokens": [1, 2]}] * len(data.splits["validation"])
    evaluations = {"teacher": evaluation(windows), "student": evaluation(windows)}
    found = measure_fidelity(data, evaluations, baseline="teacher", processor=make_tokenizer())
    assert found.calibration == found.flips == {"teacher": None, "student": None}
    assert found.slices is found.worst_rows is None
    contamination = measure_contamination(data, find_matches(data), evaluations)
    assert contamination.metrics_without == {"teacher": None, "student": None}

    words = [{"tokens": text.split(), "label": ["B-a"] + ["O"] * (len(text.split()) - 1)} for text in texts]
    write_rows(tmp_path / "tags" / "train.jsonl", words)
    data = load_data(None, DataOptions(kind="token-classification", path=str(tmp_path / "tags")))
    labels = data.labels("validation")
    evaluations = {"teacher": evaluation(labels), "student": evaluation([[1 - tag for tag in row] for row in labels])}
    found = measure_fidelity(data, evaluations, baseline="teacher", processor=make_tokenizer())
    assert found.calibration == {"teacher": None, "student": None}
    assert (found.flips["student"].gained, found.flips["student"].lost) == (0, len(labels))
    assert found.flips["student"].classes["B-a"]["lost"] == len(labels)
    assert found.worst_rows[0]["text"] == [" ".join(data.splits["validation"][0]["tokens"])]
    assert found.worst_rows[0]["divergence"] is None
    assert found.worst_rows[0]["label"][0] == "B-a" != found.worst_rows[0]["prediction"][0]


@pytest.fixture
def recipe(tmp_path, pretrained):
    train = sentences(96)
    copied = [{**row, "source": "mail"} for row in train[:3]]
    write_rows(tmp_path / "rows" / "train.jsonl", train)
    write_rows(tmp_path / "rows" / "validation.jsonl", rows_with_sources(93, seed=1) + copied)
    path = tmp_path / "r.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {tmp_path / "rows"}, max_length: 16}}
benchmark: {{sequence_length: 8, throughput_batch_size: 2, rounds: 1}}
report: {{slices: [source], price_per_hour: 3.6, fleet: 50}}
steps:
  tuned: {{run: finetune, model: {pretrained}, max_steps: 1, num_layers: 1}}
  small: {{run: quantize, model: tuned, format: bf16}}
""")
    return path


def test_a_run_tells_all_of_it_from_report_to_card_and_pushes_no_text(recipe, tmp_path, capsys):
    assert main(["run", str(recipe)]) == 0
    said = " ".join((lambda found: found.out + found.err)(capsys.readouterr()).split())
    run = tmp_path / "run"
    content = json.loads((run / "report.json").read_text())
    assert {"slices", "worst_rows", "contamination"} <= content.keys()
    assert content["contamination"]["exact"] >= 3
    assert f"{content['contamination']['exact']} the same" in said
    assert {each["by"] for each in content["slices"]} >= {"label", "source"}
    by_source = [each for each in content["slices"] if each["by"] == "source"]
    assert {each["slice"]: each["rows"] for each in by_source} == {"mail": 65, "chat": 31}
    tuned, small = content["models"]
    assert tuned["flips"] is None
    assert small["flips"].keys() == {"gained", "lost", "p", "classes"}
    assert (content["price_per_hour"], content["fleet"]) == (3.6, 50)
    assert tuned["cost_per_million"]["1"] == pytest.approx(tuned["latency_ms"]["p50"], rel=1e-6)
    assert tuned["fleet_bytes"] == 50 * tuned["size_on_disk_bytes"]
    assert tuned["calibration"].keys() >= {"ece", "brier", "nll", "temperature"}
    report = read_report(run)
    assert json.loads(json.dumps(asdict(report))) == content
    texts = [row["sentence"] for row in sentences(96) + sentences(93, seed=1)]
    card = model_card(run / "small", read_step(run / "small"), report, name="small")
    markdown = (run / "report.md").read_text()
    assert "| small |" in markdown
    assert "rows are among the rows trained on" in markdown
    assert "rows are among the rows trained on" in card
    kept = without_rows(content)
    for shown in (markdown, card, json.dumps(kept)):
        assert not any(text in shown for text in texts)
    assert kept["slices"] == content["slices"]

    measured = {file: file.stat().st_mtime_ns for file in (run / ".cache").iterdir()}
    assert main(["report", str(run)]) == 0  # from recipe.yaml, which holds the columns
    assert json.loads((run / "report.json").read_text()) == content
    assert {file: file.stat().st_mtime_ns for file in (run / ".cache").iterdir()} == measured


def test_columns_change_no_step_and_wrong_ones_are_told(recipe):
    plan = make_plan(load_recipe(recipe))
    without = make_plan(load_recipe(recipe, {"report.slices": "[]"}))
    assert plan.data.slices.keys() == {"source"}
    assert [each.fingerprint for each in plan.steps.values()] == [each.fingerprint for each in without.steps.values()]
    with pytest.raises(InputError, match=r"report\.slices: validation has no column 'sauce'; did you mean 'source'"):
        make_plan(load_recipe(recipe, {"report.slices": "[sauce]"}, draft=True))
    with pytest.raises(InputError, match=r"report\.slice: unknown option; did you mean 'slices'"):
        load_recipe(recipe, {"report.slice": "[source]"})


def test_columns_follow_rows_that_are_cut_off_and_drawn(tmp_path):
    rows = [{"text": f"{row['sentence']} {number}", "label": row["label"], "number": number}
            for number, row in enumerate(sentences(60))]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = DataOptions(kind="classification", path=str(path), validation_fraction=0.5, max_eval_rows=20)
    data, plain = load_data(None, options, slices=["number", "text"]), load_data(None, options)
    texts = data.splits["validation"]["text"][:]
    assert len(texts) == 20
    assert texts == plain.splits["validation"]["text"][:] == data.slices["text"]
    assert [int(text.split()[-1]) for text in texts] == [int(number) for number in data.slices["number"]]
    assert data.fingerprint == plain.fingerprint
    assert data.splits["validation"].column_names == plain.splits["validation"].column_names


def test_an_older_report_lacks_what_it_did_not_measure():
    report = report_of({"models": [{"name": "student", "metrics": {"accuracy": 1.0}, "interval": [0.9, 1.0]}]})
    assert report.slices is report.worst_rows is report.contamination is None
    assert report.models[0].flips is report.models[0].calibration is None
