from dataclasses import asdict
from typing import get_args

import pytest
import transformers
from peft import TaskType

from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS, Kind


@pytest.mark.parametrize("field", asdict(KINDS["classification"]))
def test_a_kind_that_leaves_something_out_cannot_be_made(field):
    given = asdict(KINDS["classification"])
    del given[field]
    with pytest.raises(TypeError, match=field):
        Kind(**given)


def test_every_kind_that_recipes_may_name_is_there_and_names_what_libraries_have():
    assert tuple(KINDS) == get_args(TaskKind)
    for kind in KINDS.values():
        assert hasattr(transformers, kind.auto_class)
        assert kind.peft_task is None or TaskType(kind.peft_task)
        assert kind.primary_metric in kind.metrics
