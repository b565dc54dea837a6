"""Tokenized rows are made once, whoever needs them and whatever ends the process that makes them."""

import os
import resource
import signal
import threading
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest

from distill.data import stored
from distill.data.load import DataOptions, load_data
from distill.data.stored import rows_fingerprint, stored_rows
from distill.errors import DiskFull
from distill.tasks.classification import CLASSIFICATION
from distill.tasks.kinds import KINDS
from tests.conftest import make_tokenizer, sentences, write_rows


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "distill"


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def numbers(count=5, waits=0.0, made=None):
    def write(writer):
        time.sleep(waits)
        (made if made is not None else []).append(1)
        writer.write_batch({"a": list(range(count))})

    return write


def test_what_one_run_has_tokenized_the_next_one_maps(tmp_path, folder, monkeypatch):
    write_rows(tmp_path / "rows" / "train.jsonl", sentences(50))
    write_rows(tmp_path / "rows" / "validation.jsonl", sentences(20, seed=1))
    options = DataOptions(path=str(tmp_path / "rows"), max_length=16)
    first = load_data("sst2", options).tokenized("train", make_tokenizer())
    assert first.features["labels"].names == ["negative", "positive"]
    monkeypatch.setattr("distill.data.tokenized._as_arrow", lambda *_: pytest.fail("tokenized again"))
    second = load_data("sst2", options).tokenized("train", make_tokenizer())
    assert (second[:], second.features) == (first[:], first.features)
    assert second.cache_files == [{"filename": str(folder / files(folder)[0])}]
    monkeypatch.undo()


@pytest.mark.parametrize("change", ["rows", "tokenizer", "max_length", "label"])
def test_what_is_made_otherwise_is_another_file(tmp_path, change):
    rows = sentences(5)

    def name(texts, **options):
        write_rows(tmp_path / "train.jsonl", texts)
        data = load_data("sst2", DataOptions(path=str(tmp_path / "train.jsonl"), **options), to_score=True)
        words = ["film", "good"] if options.get("seed") == 1 else ["good", "film"]
        return data.tokenized("validation", make_tokenizer(words)).cache_files[0]["filename"]

    one = name(rows)
    assert name(rows) == one
    others = {
        "rows": lambda: name([*rows[:4], {**rows[4], "sentence": "film"}]),
        "label": lambda: name([*rows[:4], {**rows[4], "label": 1 - rows[4]["label"]}]),
        "tokenizer": lambda: name(rows, seed=1),
        "max_length": lambda: name(rows, max_length=7),
    }
    assert others[change]() != one


def test_rows_are_made_anew_where_another_module_encodes_them(tmp_path, monkeypatch):
    def encode_here(*arguments):
        return CLASSIFICATION.encode(*arguments)

    write_rows(tmp_path / "train.jsonl", sentences(5))
    data = load_data("sst2", DataOptions(path=str(tmp_path / "train.jsonl")), to_score=True)
    first = data.tokenized("validation", make_tokenizer())
    monkeypatch.setitem(KINDS, "classification", replace(CLASSIFICATION, encode=encode_here))
    second = load_data("sst2", DataOptions(path=str(tmp_path / "train.jsonl")), to_score=True)
    assert second.tokenized("validation", make_tokenizer()).cache_files != first.cache_files


def test_fingerprints_are_of_values_not_of_how_they_lie_in_memory():
    rows = datasets.Dataset.from_dict({"text": [f"{number} films" for number in range(10)], "label": [0, 1] * 5})
    parts = datasets.concatenate_datasets([rows.select(range(3)), rows.select(range(3, 10))])
    picked = rows.select([0, *range(1, 10)]).select([9, 8, 7, 6, 5, 4, 3, 2, 1, 0]).select(list(range(9, -1, -1)))
    assert rows_fingerprint(rows, 1) == rows_fingerprint(parts, 1) == rows_fingerprint(picked, 1)
    assert rows_fingerprint(rows, 1) != rows_fingerprint(rows, 2)
    assert rows_fingerprint(rows) != rows_fingerprint(rows.rename_column("label", "other"))


def test_one_writes_while_the_others_wait(folder):
    made, found = [], []
    write = numbers(waits=0.3, made=made)
    threads = [threading.Thread(target=lambda: found.append(stored_rows("ab" * 32, write)["a"][:])) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (len(made), found) == (1, [list(range(5))] * 4)


def test_a_killed_writer_leaves_nothing_that_counts(folder):
    def killed(writer):
        writer.write_batch({"a": [1]})
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        stored_rows("ab" * 32, killed)
    os.waitpid(child, 0)
    assert files(folder) == [f"{'ab' * 32}.partial"]
    stored_rows("cd" * 32, numbers())
    assert files(folder) == [f"{'cd' * 32}.arrow"]
    assert stored_rows("ab" * 32, numbers())["a"] == list(range(5))


def test_what_fails_leaves_nothing(folder):
    with pytest.raises(ZeroDivisionError):
        stored_rows("ab" * 32, lambda writer: 1 / 0)
    assert files(folder) == []


def test_the_files_unused_the_longest_go_and_who_has_mapped_them_keeps_them(folder, monkeypatch):
    names = [f"{letter}{'0' * 63}" for letter in "abc"]
    oldest = stored_rows(names[0], numbers(1000))
    stored_rows(names[1], numbers(1000))
    for age, name in enumerate(reversed(names[:2])):
        os.utime(folder / f"{name}.arrow", (1e9, 1e9 - age))
    stored_rows(names[0], numbers())  # used again
    monkeypatch.setattr(stored, "_LIMIT", 2.5 * (folder / f"{names[0]}.arrow").stat().st_size)
    stored_rows(names[2], numbers(1000))
    assert files(folder) == [f"{names[0]}.arrow", f"{names[2]}.arrow"]
    monkeypatch.setattr(stored, "_LIMIT", 1)
    stored_rows(names[2], numbers())
    assert files(folder) == [f"{names[2]}.arrow"]
    assert oldest["a"] == list(range(1000))


def test_where_nothing_can_be_written_rows_stay_in_memory(folder, monkeypatch):
    monkeypatch.setattr(stored, "is_writable", lambda _: False)
    assert stored_rows("ab" * 32, numbers())["a"] == list(range(5))
    assert not folder.exists()


def test_a_full_disk_is_told_and_leaves_nothing(folder):
    def write(writer):
        writer.write_batch({"a": np.random.default_rng(0).random(100_000)})

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DiskFull, match=rf"{folder}: no room to write there \(File too large\)"):
            stored_rows("ab" * 32, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == []
