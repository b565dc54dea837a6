"""Load → check → split → tokenize: rows of text and label ids, from a Hub data set, files, or folders of texts."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import datasets
import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from distill.errors import InputError, nearest_name
from distill.readers import read_splits
from distill.tasks import Task, TaskKind, glue_task, own_task


@dataclass
class DataOptions:
    """The `data:` block of a recipe."""

    kind: TaskKind | None = field(default=None, metadata={"help": "What the label is, for own data."})
    path: str | None = field(
        default=None,
        metadata={"help": "A file, a folder of train.* and validation.* files or of class folders, or a Hub data set."},
    )
    name: str | None = field(default=None, metadata={"help": "The Hub data set's configuration."})
    text: str | list[str] | None = field(default=None, metadata={"help": "One text column, or a list of two."})
    label: str | None = field(default=None, metadata={"help": "The label column."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes in the order of their ids; read from the rows if unset."}
    )
    max_length: Annotated[int, Field(ge=2)] = field(
        default=128, metadata={"help": "Longest row in tokens; what is longer is cut at its end."}
    )
    max_train_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Train on a random part of this many rows."}
    )
    max_eval_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Score a random part of this many rows a split."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of every random part and split."})
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = field(
        default=0.1, metadata={"help": "Share of the training rows cut off where there is no validation split."}
    )


@dataclass(frozen=True)
class Data:
    """Checked rows: each split has the task's text columns and `label` (class id, or float score)."""

    task: Task
    splits: dict[str, datasets.Dataset]
    """`train`, the task's validation splits, and `test` where there is a labelled one."""
    fingerprint: str
    """Changes with the rows, and with every option that chooses them."""
    train_fingerprint: str
    """The same, but for how many rows are scored."""
    notes: tuple[str, ...]
    """What was done that the user did not ask for in so many words, to be shown."""
    max_length: int
    _tokenized: dict[tuple[str, str], datasets.Dataset] = field(default_factory=dict, repr=False)

    def tokenized(self, split: str, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """The rows of a split as model inputs, tokenized once for each vocabulary."""
        key = (split, tokenizer_fingerprint(tokenizer))
        if key not in self._tokenized:
            self._tokenized[key] = tokenize(self.splits[split], self.task, tokenizer, self.max_length)
        return self._tokenized[key]

    def scored_splits(self) -> list[tuple[str, str, str]]:
        """(split, prefix, suffix) of each split that is scored; prefix and suffix go around its metric keys."""
        scored = [(split, "", suffix) for split, suffix in self.task.validation_splits if split in self.splits]
        return scored + [("test", "test_", "")] * ("test" in self.splits)


def load_data(task_name: str | None, options: DataOptions, *, to_score: bool = False) -> Data:
    """The rows of a GLUE task, or of a user's own data.

    Args:
        task_name: a GLUE task; with `options.path` its columns and labels apply to the rows found there.
        to_score: the rows are only scored: a train split is not needed, and a single file is scored whole.

    Raises:
        InputError: with every problem of the options, columns, texts and labels.
    """
    task = _task(task_name, options)
    found, source_fingerprint = read_splits(task, options.path, options.name)
    notes: list[str] = []
    problems: list[str] = []
    if to_score and set(found) == {"train"}:
        found = {task.validation_splits[0][0]: found["train"]}
    if "train" not in found and not to_score:
        raise InputError(
            f"data.path: no train split in {options.path or task_name}; found {', '.join(found) or 'nothing'}"
        )

    task = _name_labels(task, found.get("train", next(iter(found.values()))), options, problems)
    splits = {}
    wanted = ["train", *(split for split, _ in task.validation_splits), "test"]
    for split in [name for name in wanted if name in found]:
        labels_hidden = split == "test" and task.label in found[split].column_names and _all_hidden(found[split], task)
        if not labels_hidden:
            splits[split] = _checked(found[split], split, task, problems)
    if problems:
        raise InputError(*problems)

    if not any(split in splits for split, _ in task.validation_splits):
        splits["train"], validation = _cut_validation(splits["train"], task, options)
        splits[task.validation_splits[0][0]] = validation
        notes.append(
            f"no validation split: {len(validation)} rows ({options.validation_fraction:.0%}) cut from train, "
            f"seed {options.seed}, stratified, equal texts kept on one side"
        )
    for split in splits:
        limit = options.max_train_rows if split == "train" else options.max_eval_rows
        if limit and limit < len(splits[split]):
            splits[split] = _random_part(splits[split], limit, options.seed)
    source = [task_name, source_fingerprint, asdict(task)]
    return Data(
        task=task,
        splits=splits,
        fingerprint=_fingerprint([*source, asdict(options)]),
        train_fingerprint=_fingerprint([*source, asdict(replace(options, max_eval_rows=None))]),
        notes=tuple(notes),
        max_length=options.max_length,
    )


def tokenize(
    rows: datasets.Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Rows as model inputs: `input_ids` and the tokenizer's other columns (unpadded), `labels`, `length` in tokens."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(*(batch[column] for column in task.text), truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"], "length": [len(ids) for ids in encoded["input_ids"]]}

    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        keep_in_memory=True,
        desc="Tokenizing",
        load_from_cache_file=False,
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with what the tokenizer does to a text, but not with its use (which sets truncation and padding)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        description: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    else:
        description = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return _fingerprint(description)


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# --- the task -------------------------------------------------------------------------------------------------------


def _task(task_name: str | None, options: DataOptions) -> Task:
    if task_name is not None:
        given = [key for key in ("kind", "text", "label", "label_names") if getattr(options, key) is not None]
        if given:
            raise InputError(
                f"data.{given[0]}: task {task_name!r} brings its own columns and labels; leave out `task:` for own data"
            )
        return glue_task(task_name)
    problems = []
    if options.path is None:
        problems.append("task: missing; name a GLUE task, or say `data:` with kind, path, text and label")
    if options.kind is None:
        problems.append("data.kind: missing; say classification or regression (or name a GLUE task under `task:`)")
    text = [options.text] if isinstance(options.text, str) else options.text or ["text"]
    if len(text) > 2:
        problems.append(f"data.text: one or two columns, not {len(text)}")
    if problems or options.kind is None:
        raise InputError(*problems)
    return own_task(options.kind, tuple(text), options.label or "label")


# --- checking -------------------------------------------------------------------------------------------------------


def _name_labels(task: Task, rows: datasets.Dataset, options: DataOptions, problems: list[str]) -> Task:
    """The task with its label names: GLUE's, the user's, the data set's own, or the values found."""
    if task.kind == "regression" or task.label_names or task.label not in rows.column_names:
        return task
    if options.label_names:
        return task.with_label_names(tuple(options.label_names))
    feature = rows.features[task.label]
    if isinstance(feature, datasets.ClassLabel):
        return task.with_label_names(tuple(feature.names))
    values = {value for value in rows[task.label] if value is not None}
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        example = next(value for value in values if not float(value).is_integer())
        problems.append(f"data.label: column {task.label!r} holds scores like {example}; say kind: regression")
    elif len(values) < 2:
        problems.append(
            f"data.label: column {task.label!r} holds {len(values)} class; classification needs two or more"
        )
    return task.with_label_names(tuple(str(value) for value in sorted(values, key=lambda v: (isinstance(v, str), v))))


def _checked(rows: datasets.Dataset, split: str, task: Task, problems: list[str]) -> datasets.Dataset:
    """The task's columns of one split with labels as ids or floats; what is wrong goes into `problems`."""
    missing = [column for column in (*task.text, task.label) if column not in rows.column_names]
    for column in missing:
        key = "label" if column == task.label else "text"
        problems.append(f"data.{key}: {split} has no column {column!r}; {nearest_name(column, rows.column_names)}")
    if missing:
        return rows
    for column in task.text:
        problem = _text_problem(rows, column)
        if problem:
            problems.append(f"data.text: column {column!r} of {split} {problem}")
    labels, problem = _encode_labels(rows[task.label], task)
    if problem:
        problems.append(f"data.label: column {task.label!r} of {split} {problem}")
        return rows
    return rows.select_columns(list(task.text)).add_column("label", labels)  # type: ignore[call-arg]


def _text_problem(rows: datasets.Dataset, column: str) -> str | None:
    if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        return f"holds no text but {getattr(rows.features[column], 'dtype', 'nested values')}"
    texts = rows[column]
    empty = [index for index, text in enumerate(texts) if text is None]
    if empty:
        return f"has no text in {len(empty)} of {len(rows)} rows (the first is row {empty[0]}); remove or fill them"
    if not any(text.strip() for text in texts):
        return "holds no text: every row is empty"
    return None


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


def _class_name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _all_hidden(rows: datasets.Dataset, task: Task) -> bool:
    """GLUE's test labels are withheld: −1 in every row."""
    return all(value == -1 or value is None for value in rows[task.label])


# --- choosing rows --------------------------------------------------------------------------------------------------


def _cut_validation(
    rows: datasets.Dataset, task: Task, options: DataOptions
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, validation): a seeded share of every class; rows with equal texts stay together, so none leaks."""
    texts = list(zip(*(rows[column] for column in task.text), strict=True))
    labels = rows["label"] if task.kind == "classification" else [0] * len(rows)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        groups[text].append(index)
    by_class: dict[Any, list[list[int]]] = defaultdict(list)
    for indices in groups.values():
        by_class[labels[indices[0]]].append(indices)
    generator = np.random.default_rng(options.seed)
    chosen: set[int] = set()
    for label in sorted(by_class):
        members = by_class[label]
        order = generator.permutation(len(members))
        for position in order[: round(len(members) * options.validation_fraction)]:
            chosen.update(members[position])
    train = [index for index in range(len(rows)) if index not in chosen]
    if not chosen or not train:
        raise InputError(
            f"data.validation_fraction: {options.validation_fraction} of {len(rows)} rows leaves "
            f"{len(train)} to train on and {len(chosen)} to validate; add rows, or give a validation file"
        )
    return rows.select(train), rows.select(sorted(chosen))


def _random_part(rows: datasets.Dataset, limit: int, seed: int) -> datasets.Dataset:
    return rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:limit].tolist()))
