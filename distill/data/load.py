"""Load → check → split → tokenize: rows of text and label ids, from a Hub data set, files, or folders of texts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, TypeAlias

import datasets
from pydantic import Field

from distill.data.columns import MERGED_LABELS, all_hidden, checked_rows, merge_labels, named_apart, with_columns
from distill.data.files.readers import hub_revision, read_splits
from distill.data.fingerprints import fingerprint_of, tokenizer_fingerprint
from distill.data.labels import read_labels
from distill.data.split import classes_without_rows, cut_validation, random_part
from distill.data.tokenized import Processor, cut_rows, tokenize
from distill.data.unlabelled import read_unlabelled, sample_pairs, with_stored
from distill.errors import InputError
from distill.tasks.base import STORED_COLUMNS, Task, TaskKind, glue_task
from distill.tasks.kinds import KINDS, own_task

Truncated: TypeAlias = dict[str, dict[str, int]]
"""Of each split its `rows`, and those that were `cut` at `max_length`."""


@dataclass
class DataOptions:
    """The `data:` block of a recipe: where the rows are, which columns are read, and how many rows are used."""

    kind: TaskKind | None = field(default=None, metadata={"help": "What the label is, for own data."})
    path: str | None = field(
        default=None,
        metadata={"help": "A file, a folder of train.* and validation.* files or of class folders, or a Hub data set."},
    )
    name: str | None = field(default=None, metadata={"help": "The Hub data set's configuration."})
    text: str | list[str] | None = field(
        default=None,
        metadata={"help": "One text column, or a list of two; for question answering [question, context]."},
    )
    label: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "The label column; for multi-label one of lists (of names, of ids, or of zeros and ones, one a "
            "label), or a list of columns of zeros and ones; for question answering one of text and answer_start."
        },
    )
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes in the order of their ids; read from the rows if unset."}
    )
    unlabelled: str | None = field(
        default=None,
        metadata={"help": "More texts for distill steps, which only the teacher labels: a file, folder or data set."},
    )
    sampled_pairs: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={
            "help": "For two text columns: this many new pairs of training texts that are alike, as unlabelled rows."
        },
    )
    teacher_logits: str | list[str] | None = field(
        default=None,
        metadata={"help": "For teacher: data. A column of lists, or a column a class, in the order of the labels."},
    )
    teacher_probabilities: str | list[str] | None = field(
        default=None, metadata={"help": "The same for probabilities."}
    )
    max_length: Annotated[int, Field(ge=2)] = field(
        default=128, metadata={"help": "Longest row in tokens; what is longer is cut at its end."}
    )
    stride: Annotated[int, Field(ge=0)] | None = field(
        default=None,
        metadata={
            "help": "For question answering: tokens that neighbouring windows of a long context share; by default a "
            "third of max_length."
        },
    )
    max_train_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Train on a random part of this many rows."}
    )
    max_eval_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Score a random part of this many rows a split."}
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = field(
        default=42, metadata={"help": "Seed of every random part and split."}
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = field(
        default=0.1, metadata={"help": "Share of the training rows cut off where there is no validation split."}
    )


@dataclass(frozen=True)
class Data:
    """The checked rows of a task, by split: its text columns and `label` (class id, float score, or zeros and ones)."""

    task: Task
    splits: dict[str, datasets.Dataset]
    """`train`, the task's validation splits, `test` where there is a labelled one, `unlabelled` where there are such
    rows (class −100, score NaN)."""
    fingerprint: str
    """Changes with the rows, and with every option that chooses them."""
    train_fingerprint: str
    """The same, but for how many rows are scored."""
    notes: tuple[str, ...]
    """What was done that the user did not ask for in so many words, to be shown."""
    max_length: int
    stride: int | None = None
    revision: str | None = None
    """The commit of a data set on the Hub."""
    slices: dict[str, list] = field(default_factory=dict, repr=False)
    """Further columns of the first scored split, by their names."""
    _tokenized: dict[tuple[str, str], datasets.Dataset] = field(default_factory=dict, repr=False)

    def tokenized(self, split: str, tokenizer: Processor) -> datasets.Dataset:
        """Tokenize the rows of a split, once for each vocabulary, and keep them on disk.

        Args:
            split: a name in `splits`.
            tokenizer: of the model that will read the rows; its image processor for images.

        Returns:
            Rows as `distill.data.tokenized.tokenize` makes them.
        """
        key = (split, tokenizer_fingerprint(tokenizer))
        if key not in self._tokenized:
            self._tokenized[key] = tokenize(
                self.splits[split],
                self.task,
                tokenizer,
                self.max_length,
                stride=self.stride,
                scored=split not in ("train", "unlabelled"),
                fingerprint=key[1] if getattr(tokenizer, "is_fast", False) else None,
            )
        return self._tokenized[key]

    def training_rows(self, tokenizer: Processor, *, unlabelled: bool) -> datasets.Dataset:
        """Tokenize the training rows, with or without the `unlabelled` split behind them.

        Args:
            tokenizer: of the model that is trained.
            unlabelled: whether to add the rows that only a teacher labels; a task may have none.
        """
        rows = self.tokenized("train", tokenizer)
        if not unlabelled or "unlabelled" not in self.splits:
            return rows
        return datasets.concatenate_datasets([rows, self.tokenized("unlabelled", tokenizer)])

    def truncated(self, tokenizer: Processor, *, unlabelled: bool = False, train: bool = True) -> Truncated | None:
        """Count the rows of each split, and those that `max_length` took something from; None for images.

        Args:
            tokenizer: of the model that reads the rows; another one cuts other rows.
            unlabelled: whether to count the `unlabelled` split too.
            train: whether to count the training split too.
        """
        names = [*(["train"] if train else []), *(split for split, _, _ in self.scored_splits())]
        names += ["unlabelled"] if unlabelled else []
        counts = {name: cut_rows(self.tokenized(name, tokenizer)) for name in names if name in self.splits}
        known = {name: cut for name, cut in counts.items() if cut is not None}
        return {name: {"rows": len(self.splits[name]), "cut": cut} for name, cut in known.items()} or None

    def labels(self, split: str) -> list:
        """The labels of a split's rows; none for language models, whose labels are their tokens."""
        return self.splits[split]["label"] if self.task.label else []

    def scored_splits(self) -> list[tuple[str, str, str]]:
        """(split, prefix, suffix) of each split that is scored; prefix and suffix go around its metric keys."""
        scored = [(split, "", suffix) for split, suffix in self.task.validation_splits if split in self.splits]
        return scored + [("test", "test_", "")] * ("test" in self.splits)


def load_data(
    task_name: str | None,
    options: DataOptions,
    *,
    to_score: bool = False,
    model_labels: Sequence[str] | None = None,
    slices: Sequence[str] = (),
) -> Data:
    """Load, check and split the rows of a GLUE task, or of a user's own data.

    Args:
        task_name: a GLUE task; with `options.path` its columns and labels apply to the rows found there.
        options: the `data:` block.
        to_score: the rows are only scored: a train split is not needed, and a single file is scored whole.
        model_labels: names of the labels of a model to score, for rows that may have ids alone or not every class.
        slices: further columns of the scored rows that are kept, to compare models by.

    Raises:
        InputError: with every problem of the options, columns, texts and labels.
    """
    task = task_of(task_name, options)
    read = read_splits(task, options.path, options.name)
    found, source_fingerprint = dict(read.splits), read.fingerprint
    revision = hub_revision(found)
    notes: list[str] = []
    problems: list[str] = []
    whole_source = set(found)
    _leave_out_unlabelled_test(found, task, options, notes)
    if isinstance(options.label, list):
        found = {split: merge_labels(rows, options.label, split, problems) for split, rows in found.items()}
        if problems:
            raise InputError(*problems)
    if to_score and whole_source == {"train"}:
        found = {task.validation_splits[0][0]: found["train"]}
    elif to_score and set(found) == {"test"}:
        found = {task.validation_splits[0][0]: found["test"]}
        notes.append("the rows of the test split are scored, as there are no others")
    if "train" not in found and not to_score:
        raise InputError(
            f"data.path: no train split in {options.path or task_name}; found {', '.join(found) or 'nothing'}"
        )
    if not found:
        raise InputError(f"data.path: {options.path or task_name} holds no labelled rows to score ({'; '.join(notes)})")

    splits: dict[str, datasets.Dataset] = {}
    its = KINDS[task.kind]
    stored = {name: getattr(options, name) for name in STORED_COLUMNS if its.stored_predictions}
    wanted = ["train", *(split for split, _ in task.validation_splits), "test"]
    used = {split: found[split] for split in wanted if split in found}
    task, labels = read_labels(
        task, used, label_names=options.label_names, model_labels=model_labels, notes=notes, problems=problems
    )
    for split, rows in used.items():
        splits[split] = checked_rows(rows, split, task, labels.get(split), problems)
        splits[split] = with_stored(splits[split], rows, split, task, stored, problems)
    scored = next((split for split, _ in task.validation_splits if split in used), "train")  # or cut from there
    with_slices = with_columns(splits[scored], used[scored], scored, slices, problems)
    if options.unlabelled is not None and not to_score and not problems:
        unlabelled, more = read_unlabelled(options.unlabelled, task, stored, problems, notes)
        splits |= {} if unlabelled is None else {"unlabelled": unlabelled}
        source_fingerprint += f" unlabelled {more}"
    task = named_apart(task)
    refused = [] if its.unlabelled else ["unlabelled", "sampled_pairs"]
    refused += [] if its.stored_predictions else STORED_COLUMNS
    given = [name for name in refused if getattr(options, name) is not None]
    problems += [f"data.{name}: not for {task.kind}; leave it out" for name in given]
    if options.stride is not None and not its.strides:
        problems.append(f"data.stride: for question answering, not for {task.kind}; leave it out")
    widest = max(options.max_length // 2 - 3, 0)  # three tokens are special, and a question has some too
    if options.stride is not None and options.stride > widest:
        problems.append(f"data.stride: {options.stride} leaves no room for questions; say at most {widest}")
    if options.sampled_pairs is not None and any(stored.values()):
        problems.append("data.sampled_pairs: new pairs have no stored predictions; leave one of them out")
    if options.sampled_pairs is not None and len(task.text) != 2:
        problems.append("data.sampled_pairs: pairs need two text columns, and the task has one; leave it out")
    if problems:
        raise InputError(*problems)

    if not any(split in splits for split, _ in task.validation_splits):
        whole = splits["train"]
        splits["train"], validation = cut_validation(
            whole, task, fraction=options.validation_fraction, seed=options.seed
        )
        splits[task.validation_splits[0][0]] = validation
        if slices:
            with_slices = cut_validation(with_slices, task, fraction=options.validation_fraction, seed=options.seed)[1]
        missing = classes_without_rows(validation, task)
        notes.append(
            f"no validation split: {len(validation)} rows ({len(validation) / len(whole):.0%}) cut from train, "
            f"seed {options.seed}, stratified, equal texts kept on one side"
            + (f"; {missing} of {task.num_labels} classes have none of them" if missing else "")
        )
    for split in [name for name in splits if name != "unlabelled"]:
        limit = options.max_train_rows if split == "train" else options.max_eval_rows
        if limit and limit < len(splits[split]):
            splits[split] = random_part(splits[split], limit, options.seed)
    if slices and options.max_eval_rows and options.max_eval_rows < len(with_slices):
        with_slices = random_part(with_slices, options.max_eval_rows, options.seed)
    if options.sampled_pairs is not None and not to_score:
        pairs = sample_pairs(splits["train"], task, options.sampled_pairs, options.seed)
        notes.append(f"{len(pairs)} unlabelled pairs sampled from the {len(splits['train'])} training rows")
        known = [splits["unlabelled"]] if "unlabelled" in splits else []
        splits["unlabelled"] = datasets.concatenate_datasets([*known, pairs])
    learned = [task_name, source_fingerprint, task.kind, task.text, task.label, task.label_names]
    return Data(
        task=task,
        splits=splits,
        fingerprint=fingerprint_of([*learned, asdict(task), _changed(options)]),
        train_fingerprint=fingerprint_of([*learned, _changed(replace(options, max_eval_rows=None))]),
        notes=(*notes, *read.notes),
        max_length=options.max_length,
        stride=options.stride,
        revision=revision,
        slices={name: list(with_slices[f"slice {number}"]) for number, name in enumerate(slices)},
    )


def describe_cut(truncated: Truncated | None) -> str | None:
    """Say in words how many rows of which splits are cut; None where no row is, or none can be."""
    counts = {split: each for split, each in (truncated or {}).items() if each["cut"]}
    cut = [f"{each['cut']:,} of {each['rows']:,} {split} rows" for split, each in counts.items()]
    return f"cut at max_length: {', '.join(cut)}" if cut else None


def _changed(options: DataOptions) -> dict[str, Any]:
    """The options that are not their defaults: an option that is new in a version changes no fingerprint."""
    defaults = asdict(DataOptions())
    return {name: value for name, value in asdict(options).items() if value != defaults[name]}


def task_of(task_name: str | None, options: DataOptions) -> Task:
    """Give the GLUE task of a name, or the task of a user's own columns.

    Args:
        task_name: a GLUE task; None for own data.
        options: the `data:` block.

    Raises:
        InputError: with every problem of the kind and the columns' names.
    """
    if task_name is not None:
        given = [key for key in ("kind", "text", "label", "label_names") if getattr(options, key) is not None]
        if given:
            raise InputError(
                f"data.{given[0]}: task {task_name!r} brings its own columns and labels; leave out `task:` for own data"
            )
        return glue_task(task_name)
    problems = []
    if options.path is None:
        given = [name for name, value in asdict(options).items() if value != getattr(DataOptions(), name)]
        problems.append(
            "data.path: missing; say where the rows are"
            if given
            else "task: missing; name a GLUE task, or say `data:` with kind, path, text and label"
        )
    if options.kind is None:
        problems.append(f"data.kind: missing; say {', '.join(KINDS)} (or name a GLUE task under `task:`)")
        raise InputError(*problems)
    if options.kind not in KINDS:
        *names, last = map(repr, KINDS)
        raise InputError(f"data.kind: should be {', '.join(names)} or {last}; got {options.kind!r}", *problems)
    its = KINDS[options.kind]
    columns, label = list(its.columns), its.label
    text = [options.text] if isinstance(options.text, str) else options.text or columns
    allowed = [1, 2] if its.pairs else [len(columns)]
    if len(text) not in allowed:
        problems.append(f"data.text: {' or '.join(map(str, allowed))} for {options.kind}, not {len(text)} columns")
    if len(set(text)) < len(text):
        problems.append(f"data.text: {text[0]!r} stands there twice; name two columns, or one")
    if options.label is None and label and text == [label]:
        problems.append(f"data.label: missing, as {label!r} is the text; say which column is the label")
    else:
        labels = [options.label or label] if not isinstance(options.label, list) else options.label
        problems += [f"data.text: {column!r} is the label; leave it out" for column in text if column in labels]
    if not label and options.label is not None:
        problems.append(f"data.label: {options.kind} predicts the text itself; leave it out")
    if problems:
        raise InputError(*problems)
    if isinstance(options.label, list):
        if not its.labels.sets:
            raise InputError(f"data.label: several columns are for kind: multi-label, not {options.kind}")
        return own_task(options.kind, tuple(text), MERGED_LABELS).with_label_names(tuple(options.label))
    return own_task(options.kind, tuple(text), options.label or label)


# --- choosing rows --------------------------------------------------------------------------------------------------


def _leave_out_unlabelled_test(
    found: dict[str, datasets.Dataset], task: Task, options: DataOptions, notes: list[str]
) -> None:
    """Remove a test split whose labels are hidden, as in a competition (no such column, or −1 or nothing in it)."""
    if "test" not in found or not task.label:
        return
    test = found["test"]
    columns = options.label if isinstance(options.label, list) else [task.label]
    if not any(column in test.column_names for column in columns):
        why = f"it has no column {columns[0]!r}"
    elif task.label in test.column_names and all_hidden(test, task):
        why = "its labels are hidden"
    else:
        return
    del found["test"]
    notes.append(f"the test split ({len(test)} rows) is left out: {why}")
