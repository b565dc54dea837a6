"""Trainer's options in a recipe: which ones a step may give, and what their values may be."""

import json
import types
import typing
from dataclasses import fields
from enum import Enum
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, Union

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available

from distill.errors import InputError

_SET_BY_THE_RUN = (
    *("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "remove_unused_columns"),
    *("label_names", "length_column_name", "local_rank"),
)
_WHOLE = "scores are of all rows together, which it would not leave them; leave it out"
_OF_PROCESSES = "rows are dealt to the processes by distill itself; leave it out"
_NOT_IN_A_RECIPE = {
    "enable_jit_checkpoint": "a training that it ends early would count as finished; leave it out, a run that is cut "
    "off goes on from its last checkpoint anyway",
    "save_only_model": "a run that is cut off could not go on from such checkpoints; leave it out, none are kept in "
    "the end",
    "accelerator_config": _OF_PROCESSES,
    "parallelism_config": _OF_PROCESSES,
    "ddp_backend": "is the launcher's to choose; leave it out",
    "dataloader_multiprocessing_context": "rows are read by processes that are forked; leave it out",
    "eval_do_concat_batches": _WHOLE,
    "batch_eval_metrics": _WHOLE,
    "eval_use_gather_object": _WHOLE,
}


def refusal(options_class: type, option: str) -> str | None:
    """Say why a recipe may not give an option, whether or not the class has it; None for one that it may give.

    Args:
        options_class: the verb's.
        option: its name.
    """
    if option == "push_to_hub" or option.startswith(("push_to_hub_", "hub_")):
        return (
            "Trainer would upload checkpoints and its pickled arguments as it trains; leave it out, and name the "
            "repository under `push:` at the top of the recipe (push: {STEP: ORG/NAME}), which pushes after the report"
        )
    if option.startswith("trackio_"):
        return (
            "publishes on the Hub, which only `push:` at the top of the recipe does; leave it out, or set "
            "TRACKIO_SPACE_ID around the run"
        )
    if not issubclass(options_class, TrainingArguments):
        return None
    return "is set by the run itself; leave it out" if option in _SET_BY_THE_RUN else _NOT_IN_A_RECIPE.get(option)


@cache
def annotations_of(options_class: type) -> dict[str, Any]:
    """List the annotation of each option, as narrow as transformers checks the value later.

    There an enumeration's names are any `str`, and the words of a choice too.
    """
    narrowed = {}
    found = typing.get_type_hints(options_class, include_extras=True)
    choices = {field.name: field.metadata["choices"] for field in fields(options_class) if "choices" in field.metadata}
    for name, annotation in found.items():
        members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
        if name in choices:
            narrowed[name] = reduce(or_, [Literal[tuple(choices[name])], *({types.NoneType} & set(members))])
        elif any(isinstance(each, type) and issubclass(each, Enum) for each in members):
            narrowed[name] = reduce(or_, [each for each in members if each is not str])
        else:
            narrowed[name] = annotation
    return narrowed


def read_mapping(option: str, value: Any, annotation: Any) -> Any:
    """Read the value of an option that takes a mapping: JSON, or a JSON file; any other option's stays as it is.

    Args:
        option: its name.
        value: as YAML gave it.
        annotation: the option's, which says whether it takes a mapping.

    Raises:
        InputError: no such file, no JSON, no mapping, or DeepSpeed is not installed.
    """
    if option == "deepspeed" and value is not None and not is_deepspeed_available():
        raise InputError("the package deepspeed is not installed; install it, or leave the option out")
    members = typing.get_args(annotation)
    takes_mapping = str in members and any(each is dict or typing.get_origin(each) is dict for each in members)
    if not takes_mapping or not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    text = value
    if not value.lstrip().startswith("{"):
        if not path.is_file():
            raise InputError(f"no such file, and no mapping; got {value!r}")
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON ({error}); got {value!r}") from None
    if not isinstance(content, dict):
        raise InputError(f"should be a mapping, as {value!r} is not")
    return content


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)
