from dataclasses import fields

import pytest
import transformers
from peft import TaskType

from distill.tasks.base import Kind, LabelRule
from distill.tasks.kinds import KINDS


@pytest.mark.parametrize(
    ("whole", "field"),
    [
        (whole, field.name)
        for whole in (KINDS["classification"], KINDS["classification"].labels)
        for field in fields(whole)
    ],
)
def test_a_kind_that_leaves_something_out_cannot_be_made(whole: Kind | LabelRule, field: str):
    given = {each.name: getattr(whole, each.name) for each in fields(whole)}
    assert type(whole)(**given) == whole
    del given[field]
    with pytest.raises(TypeError, match=field):
        type(whole)(**given)


def test_every_kind_names_what_libraries_have():
    for kind in KINDS.values():
        assert hasattr(transformers, kind.auto_class)
        assert kind.auto_class.removeprefix("AutoModel") in kind.architectures
        assert kind.peft_task is None or TaskType(kind.peft_task)
        assert kind.primary_metric in kind.metrics
