"""A model's labels: their names in order, written into a config, and matched with those of the task."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from distill.errors import InputError
from distill.tasks.base import Task
from distill.tasks.kinds import KINDS

_DEFAULT_LABEL = re.compile(r"LABEL_\d+")


def set_labels(config: PretrainedConfig, task: Task) -> None:
    """Write the task's label names and problem type into the model's config, where the task has labels.

    Args:
        config: is changed.
        task: whose labels the model predicts.
    """
    if not KINDS[task.kind].names_labels:
        return
    names = task.label_names or ("score",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = KINDS[task.kind].targets.problem_type


def label_order(
    config: PretrainedConfig, task: Task, label_map: Mapping[str, str] | None = None, *, where: str
) -> list[int] | None:
    """Find for each label of the task the model's id of it; None where both have the same order.

    Names that are the same are taken first; the others are compared without case, and with spaces and hyphens as
    underscores.

    Args:
        config: the model's, with its label names.
        task: whose labels are wanted.
        label_map: the model's label names → the task's, where they differ.
        where: the model, for messages.

    Raises:
        InputError: the label sets differ, differ by case alone in a way that leaves several readings, or the model only
            has `LABEL_0`-like names.
    """
    if not KINDS[task.kind].names_labels:
        return None
    targets = KINDS[task.kind].targets
    if targets.one_output:
        if config.num_labels != 1:
            raise InputError(f"{where}: has {config.num_labels} outputs, but {task.name} is a {targets.name} with one")
        return None
    wanted = list(task.label_names or ())
    names = [config.id2label[index] for index in range(config.num_labels)]
    mapped = [(label_map or {}).get(name, name) for name in names]
    if sorted(map(_normalise, mapped)) == sorted(map(_normalise, wanted)):
        order = _matched(wanted, mapped, where)
        return None if order == sorted(order) else order
    shown = ", ".join(task.label_names or ())
    if all(_DEFAULT_LABEL.fullmatch(name) for name in names) and len(names) == len(wanted):
        pairs = ", ".join(f"{name}: {label}" for name, label in zip(names, task.label_names or (), strict=True))
        raise InputError(
            f"{where}: its labels have no names (LABEL_0, …), so their order is unknown; if it is the task's, "
            f"say teacher_label_map (label_map for eval and quantize): {{{pairs}}}"
        )
    if len(names) != len(wanted):
        raise InputError(f"{where}: its labels ({', '.join(names)}) are not those of the task ({shown})")
    if all(name.isdigit() for name in wanted):
        hint = f"if the rows hold its ids, say data.label_names: [{', '.join(names)}]"
    else:
        pairs = ", ".join(f"{name}: …" for name in names)
        hint = f"where they mean the same, say teacher_label_map (label_map for eval and quantize): {{{pairs}}}"
    raise InputError(f"{where}: its labels ({', '.join(names)}) are not those of the task ({shown}); {hint}")


def names_in_order(id2label: Mapping[Any, Any] | Sequence[Any]) -> list[str]:
    """List the names of a config's labels by their ids, which may count from 1.

    Raises:
        InputError: ids with gaps.
    """
    by_id = dict(enumerate(id2label)) if isinstance(id2label, list) else {int(key): id2label[key] for key in id2label}
    ids = sorted(by_id)
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise InputError(f"id2label in its config.json counts {', '.join(map(str, ids))}; write 0 to {len(ids) - 1}")
    return [str(by_id[index]) for index in ids]


def _matched(wanted: list[str], names: list[str], where: str) -> list[int]:
    """For each wanted name the position of the name that it is, of two lists that are alike but for case."""
    found = {name: names.index(name) for name in wanted if names.count(name) == wanted.count(name) == 1}
    rest = [index for index in range(len(names)) if index not in found.values()]
    forms = Counter(_normalise(names[index]) for index in rest)
    alike = [names[index] for index in rest if forms[_normalise(names[index])] > 1]
    if alike:
        raise InputError(
            f"{where}: its labels {', '.join(map(repr, alike))} differ by case or spaces alone, and are not exactly "
            f"the task's ({', '.join(map(repr, wanted))}); say which is which in teacher_label_map (label_map for "
            "eval and quantize)"
        )
    by_form = {_normalise(names[index]): index for index in rest}
    return [found[name] if name in found else by_form[_normalise(name)] for name in wanted]


def _normalise(label: str) -> str:
    return label.strip().lower().replace("-", "_").replace(" ", "_")
