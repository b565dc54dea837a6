"""The rows that are cut off are those of a plain implementation that keeps every text."""

from collections import defaultdict

import datasets
import numpy as np
import pytest

from distill.data import spill
from distill.data.split import _counts_to_cut, cut_validation, random_part
from distill.tasks.base import GLUE
from distill.tasks.kinds import own_task

TASKS = {
    "classes": GLUE["sst2"],
    "pairs": GLUE["stsb"],
    "language": own_task("masked-lm", ("text",), ""),
    "words": own_task("token-classification", ("tokens",), "label"),
    "questions": own_task("question-answering", ("question", "context"), "answers"),
}


def make_rows(name, count, seed):
    generator = np.random.default_rng(seed)
    texts = [f"text {number}" for number in generator.integers(count, size=count)]  # a third of them twice or more
    labels = generator.choice([0, 0, 0, 1, 2], count).tolist()
    columns = {
        "classes": {"sentence": texts},
        "pairs": {"sentence1": texts, "sentence2": [text[:6] for text in texts]},
        "language": {"text": texts},
        "words": {"tokens": [text.split() for text in texts]},
        "questions": {"question": [f"{number}?" for number in range(count)], "context": texts},
    }
    return datasets.Dataset.from_dict({**columns[name], "label": labels})


def plainly_cut(rows, task, fraction, seed):
    columns = task.text[1:] if task.kind == "question-answering" else task.text
    groups, by_class = defaultdict(list), defaultdict(list)
    for number, row in enumerate(rows):
        groups[str([row[column] for column in columns])].append(number)
    for numbers in groups.values():
        by_class[rows[numbers[0]]["label"] if task.kind == "classification" else 0].append(numbers)
    generator = np.random.default_rng(seed)
    orders = {label: generator.permutation(len(by_class[label])) for label in sorted(by_class)}
    counts = _counts_to_cut([len(by_class[label]) for label in sorted(by_class)], fraction, generator)
    chosen = {
        number
        for label, count in zip(sorted(by_class), counts, strict=True)
        for place in orders[label][:count]
        for number in by_class[label][place]
    }
    return [sorted(set(range(len(rows))) - chosen), sorted(chosen)]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_a_split_is_cut_as_by_a_plain_implementation(tmp_path, monkeypatch, name, in_memory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    if not in_memory:
        monkeypatch.setattr(spill, "_LARGEST_IN_MEMORY", 0)
    for seed, count, fraction in [(0, 300, 0.1), (1, 37, 0.3), (2, 5, 0.4)]:
        rows = make_rows(name, count, seed)
        parts = cut_validation(rows, TASKS[name], fraction=fraction, seed=seed)
        for part, numbers in zip(parts, plainly_cut(rows, TASKS[name], fraction, seed), strict=True):
            assert (part[:], part.features) == (rows[numbers], rows.features)


def test_a_class_that_no_text_shows_first_is_no_class_to_cut_from():
    rows = datasets.Dataset.from_dict({"sentence": ["a", "a", "b", "c", "d", "e"], "label": [0, 1, 0, 0, 0, 0]})
    parts = cut_validation(rows, TASKS["classes"], fraction=0.4, seed=0)
    assert [part[:] for part in parts] == [rows[numbers] for numbers in plainly_cut(rows, TASKS["classes"], 0.4, 0)]


def test_a_random_part_keeps_the_order():
    rows = make_rows("language", 100, 0)
    numbers = sorted(np.random.default_rng(7).permutation(100)[:12].tolist())
    assert random_part(rows, 12, 7)[:] == rows[numbers]
    picked = rows.select(range(99, -1, -1))
    assert random_part(picked, 12, 7)[:] == picked[numbers]
