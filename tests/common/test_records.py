"""Records of a run folder: what is read of them, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from distill.common.records import (
    SCHEMA,
    Comparison,
    Latency,
    Report,
    Root,
    StepRecord,
    read_record,
    read_report,
    read_step,
)
from distill.common.serialized import as_json, from_json, json_text
from distill.errors import InputError
from tests.records import entry_of

STORED = Path(__file__).parent / "stored"


@pytest.mark.parametrize("content", [{"schema": SCHEMA, "name": "a"}, {"name": "a"}, {}])
def test_a_record_of_this_schema_or_none_is_read(tmp_path, content):
    (tmp_path / "step.json").write_text(json.dumps(content))
    assert read_record(tmp_path) == content


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_what_is_left_of_a_record_is_empty(tmp_path, text):
    (tmp_path / "step.json").write_text(text)
    assert read_record(tmp_path) == {}
    assert read_record(tmp_path / "missing") == {}


@pytest.mark.parametrize("name", ["step.json", "report.json"])
@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None])
def test_another_schema_is_refused_by_name(tmp_path, name, schema):
    (tmp_path / name).write_text(json.dumps({"schema": schema, "name": "a"}))
    said = f"{tmp_path / name}: has schema {schema}, and this version of distill reads schema {SCHEMA}"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        read_record(tmp_path, name)


def test_a_step_reads_as_it_was_written(tmp_path):
    root = Root("org/m", "org/m", "c" * 40, language=["en", "de"])
    record = StepRecord(
        name="a", run="quantize", root=root, layer_pairs={"t": {"hidden": [[1, 2]]}}, log=[{"loss": 0.5}],
        decided={"formats": {"x": "nf4"}}, status="finished",
    )  # fmt: skip
    (tmp_path / "step.json").write_text(as_json(record))
    assert read_step(tmp_path) == record
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["root"]["language"] == ["en", "de"]
    assert list(written)[:4] == ["schema", "name", "run", "fingerprint"]
    assert {"decided", "truncated", "layers"} <= written.keys()


def test_keys_that_a_record_lacks_or_that_are_new_are_no_matter(tmp_path):
    older = {"name": "a", "run": "finetune", "status": "finished", "of_a_later_version": 1}
    (tmp_path / "step.json").write_text(json.dumps(older))
    found = read_step(tmp_path)
    assert (found.name, found.fingerprint_version, found.decided, found.truncated, found.root) == (
        "a", 1, None, None, None,
    )  # fmt: skip
    assert read_step(tmp_path / "missing") is None
    assert read_step(tmp_path, ".begun") is None


def test_a_report_reads_as_it_was_written(tmp_path):
    entry = entry_of({"name": "a", "metrics": {"accuracy": None}, "latency_ms": {"p50": 2.0, "p95": 3.0}})
    report = Report(metric="accuracy", baseline="a", models=[entry], comparisons=[Comparison("a", "b", None, [0, 1])])
    (tmp_path / "report.json").write_text(as_json(report))
    assert read_report(tmp_path) == report
    assert read_report(tmp_path).entry("a").latency_ms == Latency(2.0, 3.0)
    assert read_report(tmp_path).entry("b") is None


def shared(content, stored):
    """The content with those keys alone that are stored too, in the order of the content."""
    if isinstance(stored, dict):
        return {key: shared(value, stored[key]) for key, value in content.items() if key in stored}
    if isinstance(stored, list):
        return [shared(*pair) for pair in zip(content, stored, strict=True)]
    return content


@pytest.mark.parametrize(("name", "read"), [("step.json", read_step), ("report.json", read_report)])
def test_records_hold_the_keys_that_they_always_had_in_their_order(name, read):
    """The stored files have a value for every key, written before `StepResult` and `Measurement` became bases."""
    text = (STORED / name).read_text(encoding="utf-8")
    written = json.loads(as_json(read(STORED)))
    assert json_text(shared(written, json.loads(text))) + "\n" == text


def test_an_empty_record_of_a_step_has_every_key():
    stored = json.loads((STORED / "step.json").read_text(encoding="utf-8"))
    assert [key for key in json.loads(as_json(StepRecord())) if key in stored] == list(stored)


@pytest.mark.parametrize("content", [{}, {"baseline": "a", "metric": "f1"}, {"models": 3}, {"models": [3]}])
def test_what_is_left_of_a_report_is_none(tmp_path, content):
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert read_report(tmp_path) is None


def test_a_mapping_in_the_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match="is no list"):
        from_json(Report, {"metric": "f1", "baseline": "a", "models": {}})
