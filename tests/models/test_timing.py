"""Turns and medians of measured calls, by a clock that the test holds."""

import pytest
import torch

from distill.models import timing
from distill.models.timing import interleaved_medians, random_inputs
from tests.compression.pruning.test_structure import model_of
from tests.conftest import tiny_bert

CPU = torch.device("cpu")


def test_calls_take_turns_and_the_first_round_counts_for_nothing(monkeypatch):
    clock, made = [0.0], []
    durations = {"a": iter([90, 1, 2, 30]), "b": iter([90, 10, 50, 20])}

    def call(name):
        made.append(name)
        clock[0] += next(durations[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = interleaved_medians({name: lambda name=name: call(name) for name in "ab"}, rounds=3, device=CPU)
    assert made == list("abababab")
    assert found == {"a": 2, "b": 20}


def test_random_inputs_of_texts_and_images():
    inputs = random_inputs(tiny_bert(), 3, 7, CPU)
    assert {name: tuple(values.shape) for name, values in inputs.items()} == dict.fromkeys(inputs, (3, 7))
    assert inputs["attention_mask"].all()
    assert torch.equal(inputs["input_ids"], random_inputs(tiny_bert(), 3, 7, CPU)["input_ids"])
    images = random_inputs(model_of("ViTConfig")[0], 2, 7, CPU)
    assert images["pixel_values"].shape == (2, 3, 8, 8)
    assert images["pixel_values"].dtype == torch.float64


@pytest.mark.parametrize("rounds", [1, 4])
def test_every_call_is_made_once_a_round(rounds):
    count = [0]
    interleaved_medians({"one": lambda: count.__setitem__(0, count[0] + 1)}, rounds=rounds, device=CPU)
    assert count == [rounds + 1]
