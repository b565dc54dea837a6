"""What the dict of verbs holds, and that an unfinished verb is none."""

from dataclasses import fields

import pytest

from distill.recipes.fingerprint import modules_behind
from distill.training.config import DistillationConfig, TrainingConfig
from distill.verbs.all import VERBS
from distill.verbs.base import Verb


def test_every_verb_is_found_by_its_name():
    assert list(VERBS) == [
        "finetune",
        "distill",
        "trim_vocabulary",
        "prune",
        "factorize",
        "share",
        "quantize",
        "export",
    ]
    assert all(verb.name == name for name, verb in VERBS.items())


@pytest.mark.parametrize("left_out", [field.name for field in fields(Verb)])
def test_what_a_verb_leaves_out_is_an_error(left_out):
    given = {field.name: getattr(VERBS["finetune"], field.name) for field in fields(Verb)}
    assert Verb(**given) == VERBS["finetune"]
    del given[left_out]
    with pytest.raises(TypeError, match=left_out):
        Verb(**given)


@pytest.mark.parametrize(("name", "trained"), [("finetune", TrainingConfig), ("distill", DistillationConfig)])
def test_a_training_has_the_defaults_of_its_config(name, trained):
    given = {field.name: field for field in fields(VERBS[name].options)}
    for field in fields(trained):
        own = given[field.name]
        assert (own.default, own.default_factory) == (field.default, field.default_factory), field.name
    assert (TrainingConfig.num_train_epochs, DistillationConfig.num_train_epochs) == (3.0, 8.0)


def test_a_verbs_code_is_that_of_its_own_module():
    behind = {name: modules_behind(verb.module) for name, verb in VERBS.items()}
    assert all(f"verbs.{name}" in modules for name, modules in behind.items())
    assert "training.trainer" in behind["finetune"] & behind["distill"]
    assert "training.trainer" not in behind["quantize"]
    assert "verbs.quantize" not in behind["finetune"] | behind["distill"]
