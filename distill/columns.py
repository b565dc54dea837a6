"""A user's columns of text and labels: what is wrong with them, and labels as class ids or scores."""

from collections import Counter
from typing import Any

import datasets
import numpy as np

from distill.errors import nearest_name
from distill.tasks import OF_CLASSES, OF_LANGUAGE, Task, TaskKind

MERGED_LABELS = "labels of a row"
"""Column of lists that stands for several columns of zeros and ones."""


def name_labels(task: Task, rows: datasets.Dataset, label_names: list[str] | None, problems: list[str]) -> Task:
    """The task with its label names: GLUE's, the user's, the data set's own, or the values found."""
    unnamed = ("regression", "question-answering", *OF_LANGUAGE)
    if task.kind in unnamed or task.label_names or task.label not in rows.column_names:
        return task
    if label_names:
        return task.with_label_names(tuple(label_names))
    feature = rows.features[task.label]
    if task.kind in ("multi-label", "token-classification"):
        if not isinstance(feature, datasets.List):
            return task  # told of each split
        feature = feature.feature
    elif isinstance(feature, datasets.List):
        return task
    if isinstance(feature, datasets.ClassLabel):
        return task.with_label_names(tuple(feature.names))
    given = rows[task.label] if task.kind in OF_CLASSES else [each for row in rows[task.label] for each in row or ()]
    values = {value for value in given if value is not None}
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        example = next(value for value in values if not float(value).is_integer())
        problems.append(f"data.label: column {task.label!r} holds scores like {example}; say kind: regression")
        return task
    elif len(values) < 2:
        problems.append(
            f"data.label: column {task.label!r} holds {len(values)} class; classification needs two or more"
        )
    return task.with_label_names(tuple(str(value) for value in sorted(values, key=lambda v: (isinstance(v, str), v))))


def merge_labels(rows: datasets.Dataset, columns: list[str], split: str, problems: list[str]) -> datasets.Dataset:
    """The rows with a column of lists for several columns of zeros and ones: of each row the columns that hold a 1."""
    missing = [column for column in columns if column not in rows.column_names]
    problems += [
        f"data.label: {split} has no column {name!r}; {nearest_name(name, rows.column_names)}" for name in missing
    ]
    values = {column: rows[column] for column in columns if column not in missing}
    for column, given in values.items():
        wrong = next((value for value in given if value not in (0, 1)), None)
        if wrong is not None:
            problems.append(f"data.label: column {column!r} of {split} holds {wrong!r}; zeros and ones are right")
    if problems:
        return rows
    merged = [[column for column in columns if values[column][row]] for row in range(len(rows))]
    features = datasets.Features({MERGED_LABELS: datasets.List(datasets.Value("string"))})
    lists = datasets.Dataset.from_dict({MERGED_LABELS: merged}, features=features)
    return datasets.concatenate_datasets([rows, lists], axis=1)


def checked_rows(rows: datasets.Dataset, split: str, task: Task, problems: list[str]) -> datasets.Dataset:
    """The task's columns of one split with labels as ids or floats; what is wrong goes into `problems`."""
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
    if not task.label:
        return chosen
    if task.kind == "token-classification":
        labels, problem = _encode_words(rows[task.text[0]], rows[task.label], task)
    elif task.kind == "question-answering":
        labels, problem = _encode_answers(rows[task.text[1]], rows[task.label])
    else:
        labels, problem = _encode_labels(rows[task.label], task)
    if problem:
        problems.append(f"data.label: column {task.label!r} of {split} {problem}")
        return rows
    return chosen.add_column("label", labels)  # type: ignore[call-arg]


def column_problem(rows: datasets.Dataset, column: str, kind: TaskKind) -> str | None:
    """What keeps a column from being what a kind of task reads, or None."""
    if kind == "token-classification":
        return words_problem(rows, column)
    if kind == "image-classification":
        of_images = isinstance(rows.features[column], datasets.Image)
        return None if of_images else "holds no images, nor names of image files beside the data file"
    return text_problem(rows, column)


def text_problem(rows: datasets.Dataset, column: str) -> str | None:
    """What keeps a column from being text, or None."""
    if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        return f"holds no text but {getattr(rows.features[column], 'dtype', 'nested values')}"
    texts = rows[column]
    empty = [index for index, text in enumerate(texts) if text is None]
    if empty:
        return f"has no text in {len(empty)} of {len(rows)} rows (the first is row {empty[0]}); remove or fill them"
    if not any(text.strip() for text in texts):
        return "holds no text: every row is empty"
    return None


def words_problem(rows: datasets.Dataset, column: str) -> str | None:
    """What keeps a column from being lists of words, or None."""
    feature = rows.features[column]
    if not isinstance(feature, datasets.List) or getattr(feature.feature, "dtype", None) not in (
        "string",
        "large_string",
    ):
        return "holds no lists of words, which token classification needs"
    empty = [index for index, words in enumerate(rows[column]) if not words]
    return f"has no words in {len(empty)} rows (the first is row {empty[0]}); remove them" if empty else None


def _encode_words(texts: list[list[str]], values: list[Any], task: Task) -> tuple[list, str | None]:
    """The label ids of each row's words."""
    names = task.label_names or ()
    ids = {name: index for index, name in enumerate(names)}
    encoded = []
    for row, (words, given) in enumerate(zip(texts, values, strict=True)):
        if not isinstance(given, list) or len(given) != len(words or []):
            count = len(given) if isinstance(given, list) else "no list of"
            return [], f"has {count} labels in row {row}, which has {len(words or [])} words"
        unknown = [each for each in given if each not in ids and each not in range(len(names))]
        if unknown:
            return [], f"holds {unknown[0]!r}, which is none of the labels ({', '.join(names)})"
        encoded.append([ids.get(each, each) for each in given])
    return encoded, None


def _encode_answers(contexts: list[str], values: list[Any]) -> tuple[list, str | None]:
    """The accepted answers of each question: `text`, and `answer_start` in characters of the context."""
    encoded = []
    for row, (context, given) in enumerate(zip(contexts, values, strict=True)):
        if not isinstance(given, dict) or not {"text", "answer_start"} <= given.keys():
            return [], f"has no text and answer_start in row {row} (SQuAD's form)"
        texts, starts = list(given["text"]), list(given["answer_start"])
        if len(texts) != len(starts):
            return [], f"has {len(texts)} answers but {len(starts)} places in row {row}"
        wrong = [text for text, start in zip(texts, starts, strict=True) if context[start : start + len(text)] != text]
        if wrong:
            return [], f"says where {wrong[0]!r} stands in the context of row {row}, but it does not stand there"
        encoded.append({"text": texts, "answer_start": starts})
    return encoded, None


def _encode_labels(values: list[Any], task: Task) -> tuple[list, str | None]:
    """Class ids or float scores, and what is wrong with the values."""
    missing = [index for index, value in enumerate(values) if value is None]
    if missing:
        return [], f"has no label in {len(missing)} of {len(values)} rows (the first is row {missing[0]})"
    if task.kind == "regression":
        try:
            scores = [float(value) for value in values]
        except (TypeError, ValueError):
            wrong = next(value for value in values if not isinstance(value, int | float))
            return [], f"holds {wrong!r}, which is no number; regression needs scores"
        if not np.isfinite(scores).all():
            return [], "holds scores that are not finite"
        return scores, None
    names = task.label_names or ()
    of_lists = any(isinstance(value, list) for value in values)
    if of_lists != (task.kind == "multi-label"):
        return [], "holds lists; say kind: multi-label" if of_lists else "holds no lists, which multi-label rows need"
    if task.kind == "multi-label":
        return _encode_sets(values, names)
    ids = {name: index for index, name in enumerate(names)}
    own_values = task.name == "own" and all(name in ids for name in map(_class_name, set(values)))
    if own_values or all(isinstance(value, str) for value in values):
        unknown = sorted({str(value) for value in values if _class_name(value) not in ids})
        if unknown:
            return [], f"holds {unknown[0]!r}, which is none of the classes ({', '.join(names)})"
        return [ids[_class_name(value)] for value in values], None
    outside = Counter(value for value in values if value not in range(len(names)))
    if outside:
        value, count = outside.most_common(1)[0]
        return [], f"holds {value!r} ({count} rows); its ids go from 0 to {len(names) - 1} ({', '.join(names)})"
    return [int(value) for value in values], None


def _encode_sets(values: list[list], names: tuple[str, ...]) -> tuple[list, str | None]:
    """Lists of label names or ids as zeros and ones, a float each (what binary cross-entropy takes)."""
    ids = {name: index for index, name in enumerate(names)}
    encoded = []
    for row in values:
        unknown = [each for each in row if _class_name(each) not in ids and each not in range(len(names))]
        if unknown:
            return [], f"holds {unknown[0]!r}, which is none of the labels ({', '.join(names)})"
        of_row = {ids.get(_class_name(each), each) for each in row}
        encoded.append([float(index in of_row) for index in range(len(names))])
    return encoded, None


def _class_name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def all_hidden(rows: datasets.Dataset, task: Task) -> bool:
    """GLUE's test labels are withheld: −1 in every row."""
    return all(value == -1 or value is None for value in rows[task.label])
