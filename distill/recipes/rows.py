"""The rows that `distill eval` scores a model on, and those that `distill predict` predicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from transformers import PretrainedConfig

from distill.common.records import StepRecord, read_step
from distill.data.columns import STORED_COLUMNS
from distill.data.fingerprints import tokenizer_fingerprint
from distill.data.load import Data, DataOptions, load_data, task_of
from distill.data.new_rows import NewRows, read_new_rows
from distill.data.tokenized import Processor, tokenize
from distill.errors import InputError
from distill.models.load import ModelSource, longest_input
from distill.recipes.recipe import parse_options
from distill.tasks.base import GLUE, Task
from distill.tasks.kinds import KINDS, kind_of

_OF_ITS_RUN = "the validation rows of the model's run, as its step.json says; for others give --task or --data.path"
_OF_TRAINING = ("unlabelled", "sampled_pairs", "max_train_rows", *STORED_COLUMNS)


def rows_to_score(
    source: ModelSource, task_name: str | None, given: Mapping[str, Any], label_map: Mapping[str, str] | None
) -> Data:
    """Load the rows to score a model on: a GLUE task's, a user's own, or else those of the run that made the model.

    Args:
        source: the model's.
        task_name: a GLUE task; None where none was named.
        given: options of `data` by name.
        label_map: the model's label names → the task's.

    Raises:
        InputError: wrong options or rows, or none are named and the model comes from no run.
    """
    record = read_step(Path(source.location)) or StepRecord()
    unnamed = task_name is None and not given.keys() & {"kind", "path"}
    of_its_run = unnamed and bool(record.data) and record.task is not None
    if of_its_run:
        task_name = record.task if record.task in GLUE else None
        of_the_run = record.data.items()
        given = {key: each for key, each in of_the_run if key not in _OF_TRAINING and each is not None} | dict(given)
    elif task_name is None and record.kind:
        given = {"kind": record.kind, **given}
    problems: list[str] = []
    options = parse_options(DataOptions, given, "--data", problems)
    if problems:
        raise InputError(*problems)
    if unnamed and not of_its_run:
        raise InputError(
            f"{source.reference}: say which rows to score it on, with --task, or with --data.kind and --data.path "
            "(its folder has no step.json that tells its run's)"
        )
    names = [str(name) for _, name in sorted(source.config.id2label.items())]
    model_labels = [(label_map or {}).get(name, name) for name in names]
    try:
        data = load_data(task_name, options, to_score=not of_its_run, model_labels=model_labels)
    except InputError as error:
        *others, last = error.problems
        raise InputError(*others, f"{last} (these are {_OF_ITS_RUN})" if of_its_run else last) from None
    if of_its_run:
        note = _OF_ITS_RUN
    elif _trained_on(record, data, options):
        note = "the model was trained on some of these rows; without --task and --data its validation rows are scored"
    else:
        return data
    return replace(data, notes=(*data.notes, note))


def _trained_on(record: StepRecord, data: Data, options: DataOptions) -> bool:
    """Whether more rows are scored than the model's run held out of the same file or folder."""
    path = record.data.get("path")
    if not record.scored or path is None or options.path is None or _resolved(path) != _resolved(options.path):
        return False
    held_out = sum(record.rows.get(split, 0) for split, _, _ in record.scored)
    return sum(len(data.splits[split]) for split, _, _ in data.scored_splits()) > held_out


def _resolved(path: str) -> Path:
    return Path(path).expanduser().resolve()


# --- rows to predict ---

_OPTIONS = ("path", "kind", "text", "name", "max_length", "stride")

PREDICT_OPTIONS = f"predict takes --task and {', '.join(f'--data.{name}' for name in _OPTIONS)}"


@dataclass(frozen=True)
class RowsToPredict:
    """Rows to predict, and how they become inputs."""

    new: NewRows
    max_length: int | None
    """Tokens; None where the user named none."""
    stride: int | None

    def encoded(self, tokenizer: Processor, config: PretrainedConfig) -> datasets.Dataset:
        """Encode the rows, cut where `pipeline(…, truncation=True)` cuts them unless the user said where.

        Args:
            tokenizer: the model's, or its image processor.
            config: the model's.

        Raises:
            InputError: a longer `max_length` than the model can read, or rows that the kind can't encode.
        """
        longest = longest_input(config)
        if self.max_length is not None and longest is not None and self.max_length > longest:
            raise InputError(f"--data.max_length: the model takes at most {longest} tokens, not {self.max_length}")
        limits = [getattr(tokenizer, "model_max_length", None), longest]
        known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
        return tokenize(
            self.new.rows,
            self.new.task,
            tokenizer,
            self.max_length or min([*known], default=DataOptions().max_length),
            stride=self.stride,
            scored=True,
            to_predict=True,
            fingerprint=tokenizer_fingerprint(tokenizer) if getattr(tokenizer, "is_fast", False) else None,
        )


_NO_LIMIT = 1_000_000
"""Tokens; tokenizers without a limit name a larger one."""


def rows_to_predict(
    source: ModelSource, task_name: str | None, given: Mapping[str, Any], *, keep: Sequence[str] = ()
) -> RowsToPredict:
    """Read the rows to predict, in the columns of the run that made the model unless others are named.

    Args:
        source: the model's; its config names the labels.
        task_name: a GLUE task, for its columns; None where none was named.
        given: options of `data` by name.
        keep: columns that go along.

    Raises:
        InputError: wrong options or rows, or a kind of task that is not the model's.
    """
    problems = [
        f"--data.{key}: rows to predict have no use for it; {PREDICT_OPTIONS}" for key in given if key not in _OPTIONS
    ]
    path = given.get("path")
    if path is None:
        problems.append("--data.path: missing; say where the rows to predict are")
    if problems:
        raise InputError(*problems)
    record = read_step(Path(source.location)) or StepRecord()
    if task_name is None and not given.keys() & {"kind", "text"} and record.task in GLUE:
        task_name = record.task
    wanted = dict(given)
    if task_name is None:
        kind = kind_of(source.config, source.reference, given.get("kind") or record.kind or None)
        of_its_run = {"text": record.data.get("text")} if kind == record.kind and record.data.get("text") else {}
        wanted = {"kind": kind, **of_its_run, **given}
    options = parse_options(DataOptions, wanted, "--data", problems)
    if problems:
        raise InputError(*problems)
    task = task_of(task_name, options)
    kind_of(source.config, source.reference, task.kind)
    if options.stride is not None and not KINDS[task.kind].strides:
        raise InputError(f"--data.stride: for question answering, not for {task.kind}; leave it out")
    new = read_new_rows(_with_names(task, source), str(options.path), options.name, keep=keep)
    return RowsToPredict(new, options.max_length if "max_length" in given else None, options.stride)


def _with_names(task: Task, source: ModelSource) -> Task:
    """The task with the labels that the model's config names, in its order."""
    its = KINDS[task.kind]
    if not its.names_labels or its.targets.one_output:
        return replace(task, label_names=None)
    names = tuple(str(name) for _, name in sorted(source.config.id2label.items()))
    if len(set(names)) < len(names):
        raise InputError(f"{source.reference}: id2label in its config.json gives two labels one name; rename one")
    return replace(task, label_names=names)
