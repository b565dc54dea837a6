"""Rows without labels, to be predicted: the columns that a kind reads, and those that go along."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from distill.data.columns import column_problem, named_apart
from distill.data.files.readers import read_splits
from distill.errors import InputError, nearest_name
from distill.tasks.base import Task


@dataclass(frozen=True)
class NewRows:
    """Rows to predict, in the order of their file."""

    task: Task
    """On the columns of `rows`."""
    rows: datasets.Dataset
    """What the kind reads, and no label."""
    kept: datasets.Dataset
    """The columns that go along with each prediction, as they were read."""
    notes: tuple[str, ...]
    """What was done to read them that the user did not ask for in so many words."""


def read_new_rows(task: Task, path: str, name: str | None, *, keep: Sequence[str] = ()) -> NewRows:
    """Read the rows of one file, or of a folder or Hub data set with a single split.

    Args:
        task: which columns are read.
        path: a file, a folder, `package:…`, or a Hub data set.
        name: the Hub data set's configuration.
        keep: columns that go along.

    Raises:
        InputError: nothing there, not readable, several splits, or with every problem of the columns.
    """
    read = read_splits(task, path, name)
    if len(read.splits) > 1:
        raise InputError(f"data.path: {path} holds the splits {', '.join(read.splits)}; give the file of one")
    (rows,) = read.splits.values()
    wanted = {"data.text": task.text, "--keep": keep}
    problems = [
        f"{key}: {path} has no column {column!r}; {nearest_name(column, rows.column_names)}"
        for key, columns in wanted.items()
        for column in columns
        if column not in rows.column_names
    ]
    problems += [
        f"data.text: column {column!r} {problem}"
        for column in task.text
        if column in rows.column_names and (problem := column_problem(rows, column, task.kind))
    ]
    problems += [
        f"--keep: column {column!r} holds images, which no line can hold"
        for column in keep
        if isinstance(rows.features.get(column), datasets.Image)
    ]
    if problems:
        raise InputError(*problems)
    apart = named_apart(task)
    chosen = rows.select_columns(list(task.text))
    renamed = {column: other for column, other in zip(task.text, apart.text, strict=True) if column != other}
    return NewRows(apart, chosen.rename_columns(renamed), rows.select_columns(list(keep)), read.notes)
