import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from distill.common.console import PlainConsole
from distill.common.records import read_record
from distill.common.serialized import finite, json_text
from distill.reports import presentation
from distill.reports.presentation import as_markdown, draw, print_report
from distill.tasks.base import GLUE
from tests import records

ODD = "models/[v2] $a_b$|<i>*x*"


def entry(name, score=0.9, interval=(0.8, 1.0), **changes):
    """A model of report.json."""
    return {
        "name": name, "run": "distill", "path": name, "parents": [], "metrics": {"accuracy": score},
        "interval": list(interval), "retention": 1.0, "agreement": 1.0, "divergence": None, "num_parameters": 10,
        "size_on_disk_bytes": 40, "memory_bytes": 40, "flops_per_sample": None, "latency_ms": {"p50": 1.0, "p95": 1.0},
        "throughput_samples_per_second": 9.0, "device": "cpu", "train_seconds": None, "samples_per_second": None,
        **changes,
    }  # fmt: skip


@pytest.fixture
def report():
    """Of an odd baseline, a model that is slower than it, and one whose metric is no number."""
    latency = {"p50": 2.0, "p95": 2.0}
    models = [
        entry(ODD),
        entry("student", parents=[ODD], latency_ms=latency, num_parameters=9),
        entry("flat", math.nan, [math.nan] * 2),
    ]
    options = {"sequence_length": 8, "latency_batch_size": 1, "throughput_batch_size": 2}
    content = finite(
        {
            "task": "sst2", "metric": "accuracy", "baseline": ODD, "models": models, "variants": [], "recoveries": [],
            "environment": {"torch": "2", "benchmark": options},
            "comparisons": [
                {"model": "student", "over": ODD, "difference": 0.1, "interval": [0.0, 0.2]},
                {"model": "student", "over": "flat", "difference": math.nan, "interval": [math.nan, math.nan]},
            ],
        }
    )  # fmt: skip
    return records.report_of(content)


def test_a_report_with_odd_names_and_no_numbers_is_shown(report, monkeypatch, tmp_path):
    console = PlainConsole(width=200, record=True)
    monkeypatch.setattr(presentation, "results", console)
    print_report(report)
    said = console.export_text()
    assert said.count(ODD) == 4  # the table, a comparison, two remarks
    assert "student − flat: no number, as the metric of one of them is none" in said
    data = SimpleNamespace(task=GLUE["sst2"], splits={"validation": [0]}, notes=["read [a|b]"])
    markdown = as_markdown(SimpleNamespace(recipe=SimpleNamespace(output_dir=tmp_path / "a_*b*"), data=data), report)
    assert markdown.startswith("# a\\_\\*b\\*\n")
    assert "| flat | – | – | 1.000 |" in markdown
    assert "| models/\\[v2\\] $a_b$\\|\\<i\\>\\*x\\* | 0.9000 | 0.800–1.000 |" in markdown
    assert "Data: read \\[a\\|b\\]." in markdown
    draw(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_names_are_drawn_as_they_are_and_not_as_mathematics(report, tmp_path):
    models = [replace(model, name=model.name + "$\\nocommand$ $^$") for model in report.models]  # no mathtext
    draw(replace(report, models=models), tmp_path / "report.png")
    assert (tmp_path / "report.png").is_file()


def test_json_holds_null_for_what_is_no_number():
    content = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.nan, 2)}, "e": "half \ud83d", "f": "é"}
    text = json_text(content)
    assert text.encode("utf-8")

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    assert found == {**content, "a": None, "b": [None, None, 1.5], "c": {"d": [None, 2]}}
    assert "é" in text


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '"step"', b"\xff\xfe{"])
def test_what_is_no_record_is_none(tmp_path, content):
    (tmp_path / "step.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_record(tmp_path) == {}
    assert read_record(tmp_path / "step.json") == {}


def report_of(metric, difference, interval):
    model = {"name": "student", "metrics": {metric: 10.0}, "interval": [9.0, 11.0]}
    around = {"sequence_length": 8, "latency_batch_size": 1, "throughput_batch_size": 2}
    content = {
        "metric": metric, "task": "own", "environment": {"benchmark": around}, "models": [model],
        "comparisons": [{"model": "student", "over": "alone", "difference": difference, "interval": interval}],
        "truncated": {"train": {"rows": 1200, "cut": 1100}},
    }  # fmt: skip
    return records.report_of(content)


@pytest.mark.parametrize(
    ("metric", "difference", "interval", "verdict"),
    [
        ("perplexity", -78.0, [-85.0, -71.0], "better"),
        ("perplexity", 78.0, [71.0, 85.0], "worse"),
        ("accuracy", 0.1, [0.05, 0.15], "better"),
        ("accuracy", -0.1, [-0.15, -0.05], "worse"),
        ("perplexity", 1.0, [-1.0, 3.0], "a tie"),
    ],
)
def test_a_comparison_says_who_is_better(capsys, metric, difference, interval, verdict):
    print_report(report_of(metric, difference, interval))
    said = " ".join(capsys.readouterr().out.split())
    assert f"({verdict})" in said
    assert ("perplexity (lower is better)" in said) is (metric == "perplexity")
    assert "rows cut at max_length: 1,100 of 1,200 train rows" in said
