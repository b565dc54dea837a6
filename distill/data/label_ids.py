"""Label ids: whether a data set holds label names, ids, or zeros and ones, and the ids of its rows."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, TypeAlias

from distill.tasks.base import Task
from distill.tasks.kinds import KINDS

Element: TypeAlias = str | int
"""A label as it was found: a name, or a whole number."""

WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.0*)?")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")

_DEFAULT_NAME = re.compile(r"LABEL_\d+")
_BOOLEANS = {"false": 0, "true": 1}


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split, as they were read."""

    split: str
    rows: list[list[Element]]
    """The labels of each row: one, or those of its list."""
    types: frozenset[type]
    """Of the values as they were stored."""
    classes: tuple[str, ...] | None = None
    """The names of a `ClassLabel`, in the order of its ids; `rows` then holds names."""

    @cached_property
    def elements(self) -> Counter[Element]:
        """Count how often each label occurs."""
        return Counter(chain.from_iterable(self.rows))


@dataclass(frozen=True)
class _Names:
    """The label names of a data set, and where they are from."""

    names: tuple[str, ...]
    source: Literal["user", "column", "model", "rows"]
    """Who says so; a GLUE task is the user's word."""

    @property
    def of_numbers(self) -> bool:
        """Whether numbers in the rows are names, and no ids."""
        return self.source == "rows" or any(map(WHOLE_NUMBER.fullmatch, self.names))


def encode_labels(
    columns: list[LabelColumn],
    task: Task,
    label_names: Sequence[str],
    model_labels: Sequence[str],
    notes: list[str],
    problems: list[str],
) -> tuple[Task, dict[str, list]]:
    """Find the label names of a task, and encode the labels of each split by them.

    Args:
        columns: the labels of each split, of the training rows first.
        task: without label names, unless they are GLUE's.
        label_names: the user's.
        model_labels: the names of a model that is scored.
        notes: what was read in a way that the user did not ask for in so many words is appended here.
        problems: what is wrong with labels is appended here.

    Returns:
        The task with its label names, and for each split the class ids of its rows, lists of them, or zeros and ones.
    """
    declared = _declared(columns, task, label_names, model_labels)
    own, sets = task.name == "own", KINDS[task.kind].labels.sets
    if sets and _are_zeros_and_ones(columns, declared.names if declared else (), task, problems):
        places = tuple(map(str, range(len(columns[0].rows[0]))))
        task = task.with_label_names(declared.names if declared else places)
        encoded = {column.split: [[float(element) for element in row] for row in column.rows] for column in columns}
        if not declared:
            notes.append(
                f"column {task.label!r} holds zeros and ones, one place a label: the labels are called "
                f"{', '.join(places)} by their places; data.label_names names them"
            )
    elif problems:
        return task, {}
    else:
        known = declared or _names_of_rows(columns, task, notes, problems)
        task = task.with_label_names(known.names)
        ids = [_ids(column, task, known, notes, problems) for column in columns]
        if problems:
            return task, {}
        encoded = {
            column.split: _rows_of_ids(column, of_column, task) for column, of_column in zip(columns, ids, strict=True)
        }
        if len(known.names) < 2:
            problems.append(
                f"data.label: column {task.label!r} holds {len(known.names)} class; {task.kind} needs two or more"
            )
    if own:
        notes += [*_labels_alike(task), *_no_outside_tag(task), *_absent(task, encoded)]
    notes[:] = dict.fromkeys(notes)  # what is said alike of several splits
    return task, encoded


def _declared(
    columns: list[LabelColumn], task: Task, label_names: Sequence[str], model_labels: Sequence[str]
) -> _Names | None:
    """Take the label names that a task, a user or a model gives; None where only the rows tell them."""
    of_user = tuple(task.label_names or label_names)
    of_column = next((column.classes for column in columns if column.classes), ())
    if of_user or of_column:
        return _Names(of_user or of_column, "user" if of_user else "column")
    says_nothing = all(map(_DEFAULT_NAME.fullmatch, model_labels))
    in_words = any(isinstance(element, str) for column in columns for element in column.elements)
    return None if (says_nothing and in_words) or not model_labels else _Names(tuple(model_labels), "model")


def _names_of_rows(columns: list[LabelColumn], task: Task, notes: list[str], problems: list[str]) -> _Names:
    """Collect the values of the training rows (of all rows, where there are none to train on) as names, in order."""
    of_train = [column for column in columns if column.split == "train"]
    elements = {element for column in of_train or columns for element in column.elements}
    everywhere = {element for column in columns for element in column.elements}
    all_numbers = bool(everywhere) and all(isinstance(each, int) or _is_number(each) for each in everywhere)
    scores = sorted(each for each in everywhere if isinstance(each, str) and not each.isdigit())  # "007" is a name
    where = f"data.label: column {task.label!r}"
    rule = KINDS[task.kind].labels
    if rule.tags and (all_numbers or everywhere <= {"False", "True"}):
        problems.append(
            f"{where} holds numbers, which do not say what is an entity; name them in the order of their ids, like "
            "data.label_names: [O, B-person, I-person]"
        )
    elif all_numbers and scores and rule.sets:
        problems.append(f"{where} holds numbers like {scores[0]}; names, ids, or zeros and ones are right")
    elif all_numbers and scores:
        problems.append(
            f"{where} holds scores like {scores[0]}; say kind: regression (or give data.label_names, if they are names)"
        )
    names = tuple(dict.fromkeys(map(str, sorted(elements, key=lambda each: (isinstance(each, str), each)))))
    if any(float in column.types for column in columns):
        notes.append(f"column {task.label!r} holds whole numbers written as floats, read as classes {_shown(names)}")
    return _Names(names, "rows")


def _is_number(text: str) -> bool:
    return bool(NUMBER.fullmatch(text) or DECIMAL_COMMA.fullmatch(text))


def _ids(
    column: LabelColumn, task: Task, known: _Names, notes: list[str], problems: list[str]
) -> dict[Element, int | None]:
    """Find the id of each label that a split holds."""
    elements, where = column.elements, f"column {task.label!r}"
    if known.source == "user" and column.classes and not any(_id(name, known) is not None for name in column.classes):
        return _renamed(column, task, notes, problems)
    ids = {each: _id(each, known) for each in elements}
    unknown = Counter({each: count for each, count in elements.items() if ids[each] is None})
    if unknown and _are_booleans(elements, known):
        if known.source != "rows":
            notes.append(f"{where} holds booleans: false is {known.names[0]}, true is {known.names[1]}")
        return {each: _BOOLEANS[str(each).lower()] for each in elements}
    if unknown:
        problems.append(f"{where_of(task, column.split)} {_unknown(unknown, column, task, known)}")
    elif task.name == "own" and not known.of_numbers and any(isinstance(each, int) for each in elements):
        pairs = [f"{number} is {name}" for number, name in enumerate(known.names)]
        notes.append(f"{where} holds numbers, read as ids: {_shown(pairs)}")
    read = {each: known.names[number] for each, number in ids.items() if number is not None and isinstance(each, str)}
    loose = [f"{each!r} as {name!r}" for each, name in sorted(read.items()) if each != name]
    if loose:
        notes.append(f"{where}: {_shown(loose)}")
    return ids


def _id(element: Element, known: _Names) -> int | None:
    """Find the id of a label: a name's place; a number is its own id where the names are no numbers."""
    names = known.names
    if isinstance(element, int) and not known.of_numbers:
        return element if element in range(len(names)) else None
    name = str(element)
    if name in names:
        return names.index(name)
    if WHOLE_NUMBER.fullmatch(name):
        whole = [place for place, each in enumerate(names) if WHOLE_NUMBER.fullmatch(each)]
        alike = [place for place in whole if whole_number(names[place]) == whole_number(name)]
    else:
        alike = [place for place, each in enumerate(names) if _form(each) == _form(name) and known.source != "rows"]
    return alike[0] if len(alike) == 1 else None


def _are_booleans(elements: Mapping[Element, int], known: _Names) -> bool:
    """Tell whether labels are booleans that stand for two names, the first of which is false."""
    are_named = known.source != "rows" or [name.lower() for name in known.names] == [*_BOOLEANS]
    return are_named and len(known.names) == 2 and all(str(each).lower() in _BOOLEANS for each in elements)


def _renamed(column: LabelColumn, task: Task, notes: list[str], problems: list[str]) -> dict[Element, int | None]:
    """Find the ids of a `ClassLabel` none of whose names is one of the user's, who names its ids anew."""
    classes, names = column.classes or (), task.label_names or ()
    ids: dict[Element, int | None] = {name: number for number, name in enumerate(classes)}
    outside = Counter(
        {ids[each]: count for each, count in column.elements.items() if ids[each] not in range(len(names))}
    )
    if outside:
        problems.append(f"{where_of(task, column.split)} {outside_ids(outside, names)}")
    pairs = [f"{old} is {new}" for old, new in zip(classes, names, strict=False)]
    notes.append(f"the classes of column {task.label!r} have other names, read by their ids: {_shown(pairs)}")
    return ids


def whole_number(element: Element) -> int:
    """Read a text like "1" or "1.0" as a whole number."""
    return int(str(element).partition(".")[0])


def _form(name: str) -> str:
    """Write a name without case, and with spaces and hyphens as underscores."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _rows_of_ids(column: LabelColumn, ids: Mapping[Element, int | None], task: Task) -> list:
    rows = [[ids[element] for element in row] for row in column.rows]
    if KINDS[task.kind].labels.tags:
        return rows
    if KINDS[task.kind].labels.sets:  # a float each, as binary cross-entropy takes them
        return [[float(index in row) for index in range(task.num_labels)] for row in rows]
    return [row[0] for row in rows]


def _are_zeros_and_ones(columns: list[LabelColumn], names: Sequence[str], task: Task, problems: list[str]) -> bool:
    """Tell whether lists of labels hold zeros and ones, one place a label, or ids; what may be either is a problem."""
    rows = [row for column in columns for row in column.rows]
    elements = {element for row in rows for element in row}
    if any(column.classes for column in columns) or not elements or not elements <= {0, 1}:
        return False
    types = frozenset().union(*(column.types for column in columns))
    no_ids = bool in types or any(len(set(row)) < len(row) for row in rows)
    lengths = Counter(map(len, rows))
    usual = lengths.most_common(1)[0][0]
    if len(lengths) > 1 or len(names) not in (0, usual):
        if not no_ids:
            return False
        split, row, length = next(
            (
                (column.split, row, len(labels))
                for column in columns
                for row, labels in enumerate(column.rows)
                if len(labels) != (len(names) or usual)
            )
        )
        right = f"{len(names)} labels ({_shown(names)})" if names else f"{usual} in most of the rows"
        problems.append(
            f"{where_of(task, split)} has {length} zeros and ones in row {row}, but there are {right}; each row needs "
            "as many as there are labels"
        )
        return False
    if no_ids or float in types:
        return True
    if usual > 1:
        problems.append(
            f"data.label: column {task.label!r} holds lists like {rows[0]}, which may be ids or zeros and ones; write "
            "names in place of ids, or true and false in place of ones and zeros"
        )
    return bool(names) and usual == 1


# --- words ----------------------------------------------------------------------------------------------------------


def where_of(task: Task, split: str) -> str:
    """Begin a message about the labels of a split.

    Args:
        task: which column holds the labels.
        split: its name.
    """
    return f"data.label: column {task.label!r} of {split}"


def _shown(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def outside_ids(outside: Counter, names: Sequence[str]) -> str:
    """Say which numbers are no ids of label names, and what may be meant.

    Args:
        outside: how often each such number occurs; one at least.
        names: of the labels, whose ids go from 0 to their number less one.
    """
    value, count = outside.most_common(1)[0]
    hint = "; count them from 0, or write names" if value == len(names) else ""
    hint = "; remove rows without a label" if value == -1 else hint
    return f"holds {value!r} ({count} rows); its ids go from 0 to {len(names) - 1} ({_shown(names)}){hint}"


def _unknown(unknown: Counter, column: LabelColumn, task: Task, known: _Names) -> str:
    """Say which labels are none of the task's, and what may be meant."""
    numbers = Counter({each: count for each, count in unknown.items() if isinstance(each, int)})
    if numbers and not known.of_numbers:
        return outside_ids(numbers, known.names)
    value = min(unknown, key=str)
    row = next(row for row, labels in enumerate(column.rows) if value in labels)
    what = "classes" if KINDS[task.kind].labels.one_class else "labels"
    problem = f"holds {str(value)!r}, which is none of the {what} ({_shown(known.names)}); the first is row {row}"
    if known.source == "rows":
        return f"{problem}. No training row has it: add some, remove these, or name all in data.label_names"
    if numbers:
        return f"{problem}. As names are numbers, numbers in the rows are names too, not ids"
    of_model = ". These are the model's names; label_map says what the rows call each"
    return problem + of_model if known.source == "model" else problem


def _labels_alike(task: Task) -> list[str]:
    """Note names of classes that differ by case and spaces alone."""
    by_form: dict[str, list[str]] = defaultdict(list)
    for name in task.label_names or ():
        by_form[name.strip().lower()].append(name)
    alike = [", ".join(map(repr, names)) for names in by_form.values() if len(names) > 1]
    return [f"classes that differ by case or spaces alone: {'; '.join(alike)}"] if alike else []


def _no_outside_tag(task: Task) -> list[str]:
    """Note that every word of token classification would count as one of an entity, as no label is O."""
    if not KINDS[task.kind].labels.tags or "O" in (task.label_names or ()):
        return []
    return ["none of the labels is O, so entity F1 takes every word for a part of an entity; accuracy counts words"]


def _absent(task: Task, encoded: Mapping[str, list]) -> list[str]:
    """Note the labels that no training row has, and the evaluation rows that have them."""
    if "train" not in encoded:
        return []
    names = task.label_names or ()
    counts = {split: _counts(rows, task) for split, rows in encoded.items()}
    absent = [index for index in range(len(names)) if not counts["train"][index]]
    notes = [f"no training row is labelled {_shown([names[index] for index in absent])}"] if absent else []
    for split, of_split in counts.items():
        there = [f"{names[index]} ({of_split[index]})" for index in absent if of_split[index]]
        notes += [f"{split} has labels that no training row has: {_shown(there)}"] if there else []
    return notes


def _counts(rows: list, task: Task) -> Counter[int]:
    """Count the labels of each id."""
    rule = KINDS[task.kind].labels
    if rule.sets:
        return Counter(index for row in rows for index, value in enumerate(row) if value)
    return Counter(chain.from_iterable(rows) if rule.tags else rows)
