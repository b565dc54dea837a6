"""Labels of a whole data set as ids or scores: what they are is decided once, for all of its splits together."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import chain
from typing import Any

import datasets

from distill.data.label_ids import (
    DECIMAL_COMMA,
    NUMBER,
    WHOLE_NUMBER,
    Element,
    LabelColumn,
    encode_labels,
    outside_ids,
    where_of,
    whole_number,
)
from distill.tasks.base import Task
from distill.tasks.kinds import KINDS


def read_labels(
    task: Task,
    found: Mapping[str, datasets.Dataset],
    *,
    label_names: Sequence[str] | None,
    model_labels: Sequence[str] | None,
    notes: list[str],
    problems: list[str],
) -> tuple[Task, dict[str, list]]:
    """Read the labels of all splits: class ids, zeros and ones, or scores (floats).

    Names are GLUE's, the user's, those of the `ClassLabel` column, the model's, or the values found in the training
    rows. Whether numbers are names or ids is decided by the names, never by the values that one split happens to have.

    Args:
        task: without label names, unless they are GLUE's.
        found: the splits that have labels, the training rows first.
        label_names: the user's names.
        model_labels: the names of a model that is scored, whose rows may not show every class.
        notes: what was read in a way that the user did not ask for in so many words is appended here.
        problems: what is wrong is appended here; a split with a problem may be missing in what is returned.

    Returns:
        The task with its label names, and the labels of each split.
    """
    wrong = _wrong_names(label_names or (), task)
    encoded: dict[str, list] = {}
    if all(task.label in rows.column_names for rows in found.values()):  # which is told of each split
        if KINDS[task.kind].labels.scores:
            scores = {split: _scores(rows, task, split, wrong) for split, rows in found.items()}
            encoded = {split: of_split for split, of_split in scores.items() if of_split is not None}
        elif KINDS[task.kind].labels.named:
            read = [_column(rows, task, split, wrong) for split, rows in found.items()]
            columns = _numbers_in_text([column for column in read if column is not None])
            if columns and not wrong:
                task, encoded = encode_labels(columns, task, label_names or (), model_labels or (), notes, wrong)
    problems += wrong
    return task, encoded


def _wrong_names(names: Sequence[str], task: Task) -> list[str]:
    rule = KINDS[task.kind].labels
    if names and (task.label_names or not rule.named):
        reason = "the columns name the labels" if task.label_names else f"not for {task.kind}"
        return [f"data.label_names: {reason}; leave it out"]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        return [f"data.label_names: {twice[0]!r} stands there twice; each label has a name of its own"]
    if any(not name.strip() for name in names):
        return ["data.label_names: one of them is empty; each label needs a name"]
    if len(names) == 1 and not rule.sets:
        return [f"data.label_names: {names[0]!r} is one class; {task.kind} needs two or more"]
    return []


# --- what stands in a column ----------------------------------------------------------------------------------------


def _column(rows: datasets.Dataset, task: Task, split: str, problems: list[str]) -> LabelColumn | None:
    """Read the labels of a split; None, with what is wrong in `problems`, where they can't be read."""
    values, where, rule = rows[task.label][:], where_of(task, split), KINDS[task.kind].labels
    missing = [row for row, value in enumerate(values) if is_missing(value)]
    if missing:
        problems.append(f"{where} has no label in {_rows(missing, values)}; remove or fill them")
        return None
    wrong = [row for row, value in enumerate(values) if isinstance(value, list) != rule.lists]
    if wrong and rule.lists:
        needed = "multi-label rows need" if rule.sets else "token classification needs, a label a word"
        in_text = " (csv has none: give json lines, or a column a label)" if isinstance(values[wrong[0]], str) else ""
        problems.append(f"{where} holds no lists, which {needed}{in_text}; the first row without one is row {wrong[0]}")
        return None
    if wrong:
        problems.append(f"{where} holds lists; say kind: multi-label")
        return None
    lists = values if rule.lists else [[value] for value in values]
    types = frozenset(map(type, chain.from_iterable(lists)))
    holes = [row for row, labels in enumerate(lists) if any(map(is_missing, labels))] if rule.lists else []
    if holes:
        problems.append(f"{where} holds an empty label in {_rows(holes, values)}; remove or fill them")
        return None
    if types & {list, dict}:
        problems.append(f"{where} holds nested values; names or whole numbers are right")
        return None
    feature: Any = rows.features[task.label]
    feature = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    if not isinstance(feature, datasets.ClassLabel):
        return LabelColumn(split, [[_element(label, task) for label in labels] for labels in lists], types)
    names = tuple(feature.names)
    outside = Counter(label for labels in lists for label in labels if label not in range(len(names)))
    if outside:
        problems.append(f"{where} {outside_ids(outside, names)}")
        return None
    return LabelColumn(split, [[names[label] for label in labels] for labels in lists], types, names)


def is_missing(value: Any) -> bool:
    """Tell whether a cell has no value: None, NaN, or nothing but spaces."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _element(value: Any, task: Task) -> Element:
    """Read a value as a name or a whole number: 1.0 is 1; a boolean is a name, but a number in lists of labels."""
    if isinstance(value, bool):
        return int(value) if KINDS[task.kind].labels.sets else str(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return str(value)


def _numbers_in_text(columns: list[LabelColumn]) -> list[LabelColumn]:
    """Turn texts like "1" and "1.0" into numbers where all texts of the set are such: csv has no others."""
    texts = [each for column in columns if not column.classes for each in column.elements if isinstance(each, str)]
    if not texts or not all(map(WHOLE_NUMBER.fullmatch, texts)):
        return columns
    types = frozenset({float if any("." in each for each in texts) else int})
    return [
        column
        if column.classes
        else replace(column, rows=[[whole_number(each) for each in row] for row in column.rows], types=types)
        for column in columns
    ]


# --- scores ---------------------------------------------------------------------------------------------------------


def _scores(rows: datasets.Dataset, task: Task, split: str, problems: list[str]) -> list[float] | None:
    """Read a regression's scores as floats (texts that are numbers too); None, with a problem, where one is none."""
    values, where, feature = rows[task.label][:], where_of(task, split), rows.features[task.label]
    missing = [row for row, value in enumerate(values) if is_missing(value)]
    if missing:
        problems.append(f"{where} has no label in {_rows(missing, values)}; remove or fill them")
        return None
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.names[value] if value in range(len(feature.names)) else value for value in values]
    scores = []
    for row, value in enumerate(values):
        problem = _score_problem(value)
        if problem:
            problems.append(f"{where} holds {value!r}{problem} (row {row})")
            return None
        scores.append(float(value))
    return scores


def _score_problem(value: Any) -> str | None:
    """Say why a value is no score; None where it is one."""
    if isinstance(value, bool):
        return ", which is no score; say kind: classification"
    if isinstance(value, str):
        if DECIMAL_COMMA.fullmatch(value.strip()):
            return ", which is no number; numbers need a decimal point and nothing between thousands"
        return None if NUMBER.fullmatch(value.strip()) else ", which is no number; regression needs scores"
    if not isinstance(value, int | float | Decimal):
        return ", which is no number; regression needs scores"
    return None if math.isfinite(value) else "; scores that are not finite teach nothing, remove the row"


def _rows(numbers: list[int], values: list) -> str:
    return f"{len(numbers)} of {len(values)} rows (the first is row {numbers[0]})"
