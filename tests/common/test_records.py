"""Records of a run folder: what is read of them, and what is refused."""

import json
import re

import pytest

from distill.common.records import SCHEMA, read_record
from distill.errors import InputError


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
