"""The models that a step's options name."""

from collections.abc import Mapping
from typing import Any

from distill.training.teachers import FROM_DATA


def referenced_models(given: Mapping[str, Any]) -> dict[str, str]:
    """The models that a step's options name: `teacher`, `teacher 2`, …, `model`."""
    models = {
        "teacher" if number == 1 else f"teacher {number}": reference
        for number, reference in enumerate((each for each in teachers_of(given) if each != FROM_DATA), start=1)
    }
    return models | ({"model": given["model"]} if given.get("model") is not None else {})


def is_teacher(option: str) -> bool:
    """Whether a key of `referenced_models` names a teacher."""
    return option.startswith("teacher")


def teachers_of(given: Mapping[str, Any]) -> list[str]:
    """The teachers that a step's options name, predictions in the rows (`data`) among them."""
    teacher = given.get("teacher") or []
    return [teacher] if isinstance(teacher, str) else list(teacher)
