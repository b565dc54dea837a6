"""The rows that `distill eval` scores a model on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.common.records import StepRecord, read_step
from distill.data.columns import STORED_COLUMNS
from distill.data.load import Data, DataOptions, load_data
from distill.errors import InputError
from distill.models.load import ModelSource
from distill.recipes.recipe import parse_options
from distill.tasks.base import GLUE

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
