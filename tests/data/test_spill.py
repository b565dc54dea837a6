"""Tables outside of memory are what they were, and leave no file."""

import datasets
import pyarrow as pa
import pytest

from distill.data import spill
from distill.data.spill import Spill, folder_of_rows


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("largest", [0, 100, 2**20])
def test_tables_come_back_in_their_order(monkeypatch, largest):
    monkeypatch.setattr(spill, "_LARGEST_IN_MEMORY", largest)
    tables = [
        pa.table({"text": ["a", None, "ä" * 50]}),
        pa.table({}),
        pa.table({"text": [["a", "b"], []], "more": pa.nulls(2)}).slice(1),
        pa.table({"text": pa.chunked_array([[1.5], [2.5]])}),
        pa.table({"text": pa.array([], pa.string())}),
    ]
    kept = Spill()
    for table in tables:
        kept.add(table)
    for _ in range(2):
        assert [table.schema for table in kept.tables()] == [table.schema for table in tables]
        assert kept.tables() == tables


def test_large_tables_lie_outside_of_memory_and_leave_no_file(monkeypatch):
    monkeypatch.setattr(spill, "_LARGEST_IN_MEMORY", 2**20)
    kept, before = Spill(), pa.total_allocated_bytes()
    for number in range(30):
        kept.add(pa.table({"a": pa.array([number] * 40_000)}))  # 320 kB each
    table = pa.concat_tables(kept.tables())
    assert table["a"].to_numpy().reshape(30, -1)[:, -1].tolist() == list(range(30))
    assert pa.total_allocated_bytes() - before < 2 * 2**20
    assert list(folder_of_rows().iterdir()) == []


def test_without_a_folder_to_write_into_the_system_s_own_is_used(monkeypatch):
    monkeypatch.setattr(spill, "_LARGEST_IN_MEMORY", 0)
    monkeypatch.setattr(spill, "is_writable", lambda _: False)
    kept = Spill()
    kept.add(pa.table({"a": [1, 2]}))
    assert kept.tables()[0]["a"].to_pylist() == [1, 2]
    assert not folder_of_rows().exists()
