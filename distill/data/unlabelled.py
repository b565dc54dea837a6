"""Rows that a teacher labels: texts without labels, new pairs of texts, and predictions that were stored before."""

import re
from collections.abc import Iterable, Mapping, Sequence

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from sklearn.feature_extraction.text import TfidfVectorizer

from distill.data.columns import (
    column_problem,
    named_apart,
)
from distill.data.files.readers import read_splits
from distill.data.files.tables import plain_types
from distill.errors import InputError, nearest_name
from distill.tasks.base import STORED_COLUMNS, STORED_PROBABILITIES, Task
from distill.tasks.kinds import KINDS

_NEIGHBOURS = 8

_UNSEPARATED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese, which write no spaces between words."""

_words = TfidfVectorizer(ngram_range=(1, 2)).build_analyzer()


def with_stored(
    rows: datasets.Dataset,
    found: datasets.Dataset,
    split: str,
    task: Task,
    stored: Mapping[str, str | list[str] | None],
    problems: list[str],
) -> datasets.Dataset:
    """Add a teacher's stored predictions to checked rows as columns of lists; only training rows must have them.

    Args:
        rows: the checked rows of one split.
        found: the same rows as they were read, with all their columns.
        split: its name.
        task: its labels say how many values a row needs, in their order.
        stored: for each of `STORED_COLUMNS` the column of lists that holds it, or one column a class; None for none.
        problems: missing columns and values that are no predictions are appended here.
    """
    for name in STORED_COLUMNS:
        wanted = stored.get(name)
        if wanted is None:
            continue
        columns = [wanted] if isinstance(wanted, str) else wanted
        missing = [column for column in columns if column not in found.column_names]
        if missing:
            if split in ("train", "unlabelled"):
                near = nearest_name(missing[0], found.column_names)
                problems.append(f"data.{name}: {split} has no column {missing[0]!r}; {near}")
            continue
        values = found[wanted] if isinstance(wanted, str) else list(zip(*(found[each] for each in wanted), strict=True))
        lists = [list(value) if isinstance(value, list | tuple) else [value] for value in values]
        problem = _stored_problem(lists, task, probabilities=name == STORED_PROBABILITIES)
        if problem:
            problems.append(f"data.{name}: {split} {problem}")
        elif "label" in rows.column_names:
            rows = rows.add_column(name, lists)  # type: ignore[call-arg]
    return rows


def _stored_problem(rows: list[list], task: Task, *, probabilities: bool) -> str | None:
    wrong = next((index for index, row in enumerate(rows) if len(row) != task.num_labels), None)
    if wrong is not None:
        return f"has {len(rows[wrong])} values in row {wrong}, but there are {task.num_labels} outputs"
    try:
        values = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        return "holds something that is no number"
    if not np.isfinite(values).all():
        return "holds values that are not finite"
    rule = KINDS[task.kind].labels
    if probabilities and rule.scores:
        return "holds probabilities, but a regression has none; give teacher_logits (the scores)"
    sums_are_wrong = rule.one_class and np.abs(values.sum(1) - 1).max() > 1e-2
    if probabilities and (values.min() < 0 or values.max() > 1 + 1e-6 or sums_are_wrong):
        return "holds rows that are no probabilities: below 0, above 1, or a sum that is not 1"
    return None


def read_unlabelled(
    path: str,
    task: Task,
    stored: Mapping[str, str | list[str] | None],
    problems: list[str],
    notes: list[str],
) -> tuple[datasets.Dataset | None, str]:
    """Read the rows of `data.unlabelled`, from all of its splits together: texts without labels.

    Args:
        path: a file, a folder, `package:…`, or a Hub data set.
        task: which columns are read.
        stored: as in `with_stored`; all of these rows must have such predictions.
        problems: missing or wrong columns are appended here.
        notes: what readers have to say is appended here.

    Returns:
        The rows (None where each split has problems), and a fingerprint of their source.

    Raises:
        InputError: nothing there, or not readable.
    """
    read = read_splits(task, path, None, key="data.unlabelled")
    notes += [f"unlabelled: {note}" for note in read.notes]
    parts = []
    for split, rows in read.splits.items():
        before = len(problems)
        for column in [column for column in task.text if column not in rows.column_names]:
            near = nearest_name(column, rows.column_names)
            problems.append(f"data.unlabelled: {split} has no text column {column!r}; {near}")
        if len(problems) > before:
            continue
        problems += [
            f"data.unlabelled: column {column!r} of {split} {problem}"
            for column in task.text
            if (problem := column_problem(rows, column, task.kind))
        ]
        part = rows.select_columns([])
        if len(problems) == before:
            texts = rows.select_columns(list(task.text)).with_format("arrow")[:]
            part = unlabelled_rows(named_apart(task), plain_types(texts))
        parts.append(with_stored(part, rows, "unlabelled", task, stored, problems))
    return (datasets.concatenate_datasets(parts) if parts else None), read.fingerprint


def unlabelled_rows(task: Task, texts: pa.Table) -> datasets.Dataset:
    """Make rows without a label of a table of texts.

    Args:
        task: whose label for rows without one they get.
        texts: a column for each of the task's text columns, in their order.
    """
    unknown = KINDS[task.kind].labels.unknown
    labels = pa.array(unknown(task, text.as_py()) for text in texts.column(0))
    table = InMemoryTable(texts.rename_columns(list(task.text)).append_column("label", labels))
    return datasets.Dataset(table, fingerprint=generate_random_fingerprint())  # else all bytes would be pickled


def sample_pairs(rows: datasets.Dataset, task: Task, count: int, seed: int) -> datasets.Dataset:
    """Sample new unlabelled pairs of the rows' own texts: a random text with one of the eight most like it by TF-IDF.

    Most of all pairs are plainly unlike, and teach little; near ones are where a teacher knows more (Augmented SBERT,
    Thakur et al. 2021, section 3.2, which takes BM25). Texts are alike by their words and pairs of words, and in
    scripts that don't separate words by runs of one to three characters.

    Args:
        rows: the training rows, with two text columns.
        task: which columns these are.
        count: pairs at most; fewer where so many different ones are not found.
        seed: of the choice.

    Raises:
        InputError: too few different texts to pair.
    """
    columns = [rows[column] for column in task.text]
    known = set(zip(*columns, strict=True))
    texts = sorted({text for column in columns for text in column})
    if len(texts) <= _NEIGHBOURS:
        raise InputError(f"data.sampled_pairs: {len(texts)} different texts are too few to pair; leave it out")
    vectors = TfidfVectorizer(analyzer=_terms, sublinear_tf=True).fit_transform(texts)
    generator = np.random.default_rng(seed)
    pairs: dict[tuple[str, str], None] = {}  # a set that keeps its order
    for _ in range(_NEIGHBOURS):
        order = generator.permutation(len(texts))
        for start in range(0, len(order), 1000):
            chosen = order[start : start + 1000]
            likeness = (vectors[chosen] @ vectors.T).toarray()
            likeness[np.arange(len(chosen)), chosen] = -1.0
            nearest = np.argpartition(-likeness, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
            for first, neighbours in zip(chosen, nearest, strict=True):
                pair = (texts[first], texts[generator.choice(neighbours)])
                if pair not in known:
                    pairs[pair] = None
                if len(pairs) == count:
                    return unlabelled_rows(task, _as_table(pairs))
    return unlabelled_rows(task, _as_table(pairs))


def _as_table(pairs: Iterable[tuple[str, str]]) -> pa.Table:
    return pa.table([pa.array(texts, pa.string()) for texts in zip(*pairs, strict=True)], ["first", "second"])


def _terms(text: str) -> list[str]:
    """List the terms of a text for TF-IDF; its characters where there are no words (single letters, signs)."""
    words = _words(_UNSEPARATED.sub(" ", text))
    return words + _pieces(_UNSEPARATED.findall(text)) or _pieces([text])


def _pieces(runs: Sequence[str]) -> list[str]:
    """List the pieces of one to three characters of runs of characters."""
    return [run[start : start + size] for run in runs for size in (1, 2, 3) for start in range(len(run) - size + 1)]
