"""The columns of a user's data (text, words, images, labels): what is wrong with them, and the checked rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
import pyarrow.compute as pc

from distill.data.labels import is_missing
from distill.errors import nearest_name
from distill.tasks.base import STORED_COLUMNS, Task, TaskKind
from distill.tasks.kinds import KINDS

LABEL = "label"
"""Column of checked rows that holds class ids, float scores, zeros and ones, ids of words, or answers."""

MERGED_LABELS = "labels of a row"
"""Column of lists that stands for several columns of zeros and ones."""

_YES_OR_NO = {"0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}


def merge_labels(rows: datasets.Dataset, columns: list[str], split: str, problems: list[str]) -> datasets.Dataset:
    """Merge columns of zeros and ones into one column of lists: of each row the names of the columns that hold a 1.

    Args:
        rows: of one split.
        columns: names of the columns, which become the label names.
        split: its name, for messages.
        problems: missing columns, empty cells and other values are appended here.

    Returns:
        The rows with the column `MERGED_LABELS`; as they were where there is any problem.
    """
    missing = [column for column in columns if column not in rows.column_names]
    problems += [
        f"data.label: {split} has no column {name!r}; {nearest_name(name, rows.column_names)}" for name in missing
    ]
    values: dict[str, list[int]] = {}
    for column in [column for column in columns if column not in missing]:
        given = rows[column][:]
        empty = [row for row, value in enumerate(given) if is_missing(value)]
        read = [_YES_OR_NO.get(str(value).strip().lower()) for value in given]
        if empty:
            problems.append(
                f"data.label: column {column!r} of {split} has no label in {len(empty)} of {len(given)} rows (the "
                f"first is row {empty[0]}); remove or fill them"
            )
        elif None in read:
            wrong = given[read.index(None)]
            problems.append(
                f"data.label: column {column!r} of {split} holds {wrong!r}; zeros and ones are right (or true and "
                "false, yes and no)"
            )
        values[column] = [value or 0 for value in read]
    if problems:
        return rows
    merged = [[column for column in columns if values[column][row]] for row in range(len(rows))]
    features = datasets.Features({MERGED_LABELS: datasets.List(datasets.Value("string"))})
    lists = datasets.Dataset.from_dict({MERGED_LABELS: merged}, features=features)
    return datasets.concatenate_datasets([rows, lists], axis=1)


def named_apart(task: Task) -> Task:
    """Rename the text columns of a task that are called like a column of ours (`label`, `teacher_logits`)."""
    ours = (LABEL, *STORED_COLUMNS)
    return replace(task, text=tuple(f"{column} (text)" if column in ours else column for column in task.text))


def checked_rows(
    rows: datasets.Dataset, split: str, task: Task, labels: Sequence[Any] | None, problems: list[str]
) -> datasets.Dataset:
    """Keep the columns of one split that its task needs: the text, named as `named_apart` does, and `label`.

    Args:
        rows: as they were read.
        split: its name, for messages.
        task: which columns are text and label.
        labels: of the rows, as they were read; None where the task has none, where they are answers, and where they
            could not be read.
        problems: what is wrong with a column is appended here.
    """
    missing = [column for column in (*task.text, task.label) if column and column not in rows.column_names]
    for column in missing:
        key = "label" if column == task.label else "text"
        problems.append(f"data.{key}: {split} has no column {column!r}; {nearest_name(column, rows.column_names)}")
    if missing:
        return rows
    for column in task.text:
        problem = column_problem(rows, column, task.kind)
        if problem:
            problems.append(f"data.text: column {column!r} of {split} {problem}")
    chosen = rows.select_columns(list(task.text))
    apart = zip(task.text, named_apart(task).text, strict=True)
    chosen = chosen.rename_columns({column: name for column, name in apart if column != name})
    labels, problem = KINDS[task.kind].labels.complete(rows, task, labels)
    if problem:
        problems.append(f"data.label: column {task.label!r} of {split} {problem}")
    return chosen if labels is None or problem else chosen.add_column(LABEL, list(labels))  # type: ignore[call-arg]


def with_columns(
    rows: datasets.Dataset, found: datasets.Dataset, split: str, columns: Sequence[str], problems: list[str]
) -> datasets.Dataset:
    """The rows with further columns as they were read, each as `slice <number>`.

    Args:
        rows: the checked ones.
        found: the same as they were read.
        columns: their names there; one that is missing goes into `problems`.
    """
    missing = [name for name in columns if name not in found.column_names]
    near = {name: nearest_name(name, found.column_names) for name in missing}
    problems += [f"report.slices: {split} has no column {name!r}; {near[name]}" for name in missing]
    if missing or not columns:
        return rows
    parts = [found.select_columns([name]).rename_column(name, f"slice {number}") for number, name in enumerate(columns)]
    return datasets.concatenate_datasets([rows, *parts], axis=1)


def column_problem(rows: datasets.Dataset, column: str, kind: TaskKind) -> str | None:
    """Say why a column is not what a kind of task reads (text, words or images); None where it is.

    Args:
        rows: of one split.
        column: a name among theirs.
        kind: of the task.
    """
    problem_of = {"text": text_problem, "words": words_problem, "images": images_problem}[KINDS[kind].reads]
    return problem_of(rows, column)


def images_problem(rows: datasets.Dataset, column: str) -> str | None:
    """Say why a column holds no images; None where it does.

    Args:
        rows: of one split.
        column: a name among theirs.
    """
    of_images = isinstance(rows.features[column], datasets.Image)
    return None if of_images else "holds no images, nor names of image files beside the data file"


def text_problem(rows: datasets.Dataset, column: str) -> str | None:
    """Say why a column holds no text, or not in every row; None where it does.

    Args:
        rows: of one split.
        column: a name among theirs.
    """
    if not _is_text(rows.features[column]):
        dtype = getattr(rows.features[column], "dtype", None)
        if dtype is not None:
            return f"holds no text but {dtype}; save it as text"
        row, value = next((row, value) for row, value in enumerate(rows[column]) if not isinstance(value, str))
        return f"holds no text but {value!r:.40} in row {row}; all rows need text (in json, in quotes)"
    texts = rows[column]
    missing = rows.with_format("arrow")[column][:].is_null()
    if count := pc.sum(missing).as_py():
        first = pc.index(missing, True).as_py()
        return f"has no text in {count} of {len(rows)} rows (the first is row {first}); remove or fill them"
    if not any(text.strip() for text in texts):
        return "holds no text: every row is empty"
    return None


def words_problem(rows: datasets.Dataset, column: str) -> str | None:
    """Say why a column holds no lists of words, or empty ones; None where all is well.

    Args:
        rows: of one split.
        column: a name among theirs.
    """
    feature: Any = rows.features[column]
    if not isinstance(feature, datasets.List | datasets.LargeList) or not _is_text(feature.feature):
        return "holds no lists of words, which token classification needs"
    texts = rows[column]
    empty = [index for index, words in enumerate(texts) if not words]
    if empty:
        return f"has no words in {len(empty)} rows (the first is row {empty[0]}); remove them"
    holes = [index for index, words in enumerate(texts) if None in words]
    return f"has an empty word in {len(holes)} rows (the first is row {holes[0]}); fill it" if holes else None


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def all_hidden(rows: datasets.Dataset, task: Task) -> bool:
    """Tell whether no row has a label, as in GLUE's test splits, where each is withheld as −1.

    Args:
        rows: of one split, with the task's label column.
        task: which column holds the labels.
    """
    return all(is_missing(value) or value in (-1, "-1") for value in rows[task.label])
