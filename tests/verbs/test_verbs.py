"""What the dict of verbs holds, and that an unfinished verb is none."""

import pytest

from distill.recipes.fingerprint import modules_behind
from distill.verbs.all import VERBS
from distill.verbs.base import StepResult, Verb


def test_every_verb_is_found_by_its_name():
    assert list(VERBS) == ["finetune", "distill", "quantize"]
    assert all(verb.name == name for name, verb in VERBS.items())


@pytest.mark.parametrize("left_out", ["name", "options", "run"])
def test_what_a_verb_leaves_out_is_an_error(left_out):
    given = {"name": "toy", "options": dict, "run": StepResult}
    del given[left_out]
    with pytest.raises(TypeError, match=left_out):
        Verb(**given)


def test_a_verbs_code_is_that_of_its_own_module():
    behind = {name: modules_behind(verb.module) for name, verb in VERBS.items()}
    assert all(f"verbs.{name}" in modules for name, modules in behind.items())
    assert "training.trainer" in behind["finetune"] & behind["distill"]
    assert "training.trainer" not in behind["quantize"]
    assert "verbs.quantize" not in behind["finetune"] | behind["distill"]
