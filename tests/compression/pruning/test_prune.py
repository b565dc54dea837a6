"""Pruned models: what goes first, what is left of predictions, and that decided sizes give the same model."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from distill.compression.pruning import prune
from distill.compression.pruning.prune import decide_sizes, prune_model
from distill.compression.pruning.settings import PruningSettings
from distill.compression.pruning.speedup import TimeTables, sizes_to_try
from distill.compression.pruning.structure import BlockSizes, block_sizes, prunable_sublayers
from distill.errors import InputError
from tests.compression.pruning.test_structure import EVERY, logits, model_of
from tests.conftest import tiny_bert

BATCHES = [
    {
        "input_ids": torch.randint(5, 25, (16, 12), generator=torch.Generator().manual_seed(seed)),
        "attention_mask": (torch.arange(12) < torch.arange(3, 19)[:, None].clamp(max=12)).long(),
    }
    for seed in (0, 1)
]
FRESH = {
    "input_ids": torch.randint(5, 25, (16, 12), generator=torch.Generator().manual_seed(2)),
    "attention_mask": torch.ones(16, 12, dtype=torch.long),
}


def sizes_of(model):
    return block_sizes(prunable_sublayers(model, ("neurons",)))


def divergence(model, reference, batch=FRESH):
    wanted, found = (logits(each, batch).log_softmax(-1) for each in (reference, model))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


def with_idle_units(model, neurons=64, heads=2):
    """Half of the neurons and of the heads of each block have no outgoing weights."""
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight[:, torch.randperm(128)[:neurons]] = 0
            for head in torch.randperm(4)[:heads].tolist():
                layer.attention.output.dense.weight[:, 16 * head : 16 * head + 16] = 0
    return model


@pytest.mark.parametrize("settings", [
    {"importance": "fisher"}, {"importance": "taylor", "rounds": 3}, {"importance": "magnitude", "reconstruct": False},
    {"importance": "fisher", "rounds": 2, "uniform": False},
])  # fmt: skip
def test_units_that_do_nothing_go_first(settings):
    model = with_idle_units(tiny_bert()).double()
    reference = copy.deepcopy(model)
    pruned = prune_model(model, BATCHES, heads=0.5, neurons=0.5, **settings)
    assert pruned is model
    assert sizes_of(model) == BlockSizes((2,) * 4, (64,) * 4)
    torch.testing.assert_close(logits(model, FRESH), logits(reference, FRESH), rtol=1e-6, atol=1e-8)


def test_reconstruction_and_importance_keep_predictions():
    reference = tiny_bert(num_labels=3)
    ways = {
        "smallest weights": {"importance": "magnitude", "reconstruct": False},
        "fisher": {"reconstruct": False},
        "reconstructed": {},
    }
    found = {
        name: divergence(prune_model(tiny_bert(num_labels=3), BATCHES, neurons=0.5, **way), reference)
        for name, way in ways.items()
    }
    assert found["reconstructed"] < 0.7 * found["fisher"] < 0.7 * found["smallest weights"]


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_pruned(family):
    model, batch = model_of(family)
    model.float().config.pad_token_id = 0
    reference = copy.deepcopy(model)
    kinds = {} if family == "MPNetConfig" else {"heads": 0.5}
    batch = {name: values.float() if values.is_floating_point() else values for name, values in batch.items()}
    prune_model(model, [batch], neurons=0.5, rounds=2, **kinds)
    sizes = sizes_of(model)
    assert set(sizes.neurons) == {32}
    assert set(sizes.heads) <= {1, 2, 4}
    assert model.config.num_attention_heads == reference.config.num_attention_heads
    assert logits(model, batch).isfinite().all()
    assert not torch.equal(logits(model, batch), logits(reference, batch))


def test_decided_sizes_give_the_same_model():
    def make():
        model = tiny_bert()
        model.bert.encoder.layer[1].output.dense.weight.data *= 0.1
        return model

    settings = {"neurons": 0.5, "heads": 0.25, "uniform": False, "rounds": 2}
    sizes, _ = decide_sizes(make(), BATCHES, PruningSettings(**settings))
    assert len(set(sizes.neurons)) > 1
    assert sum(sizes.neurons) == 256
    assert sum(sizes.heads) == 12
    found = prune_model(make(), BATCHES, **settings)
    assert sizes_of(found) == sizes
    again = prune_model(make(), BATCHES, heads=list(sizes.heads), neurons=list(sizes.neurons), rounds=2)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in found.state_dict().items())


def test_a_speedup_is_decided_by_times_and_importance(monkeypatch):
    """The clock is given: every neuron takes as long as every other, and attention next to nothing."""

    def times(model, sublayers, inputs):
        per_unit = {"heads": 1e-9, "neurons": 1e-3 / 512}
        changes = tuple(
            {units: -per_unit[each.kind] * (each.units - units) for units in sizes_to_try(each)} for each in sublayers
        )
        return TimeTables(1.2e-3, changes)

    asked = []

    def speedup(model, sizes, inputs):
        asked.append(sizes)
        return 1.2e-3 / (1.2e-3 - 1e-3 / 512 * (512 - sum(sizes.neurons)))

    monkeypatch.setattr(prune, "measure_times", times)
    monkeypatch.setattr(prune, "measured_speedup", speedup)
    settings = PruningSettings(speedup=1.7)
    sizes, measured = decide_sizes(tiny_bert(), BATCHES, settings)
    assert measured == pytest.approx(1.2e-3 / (1.2e-3 - 256 * 1e-3 / 512))
    assert sizes.heads == (4,) * 4
    assert sum(sizes.neurons) == 256  # of 258, in steps of 32
    assert asked == [sizes]
    found = prune_model(tiny_bert(), BATCHES, speedup=1.7)
    again = prune_model(tiny_bert(), BATCHES, heads=list(sizes.heads), neurons=list(sizes.neurons))
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in found.state_dict().items())


def test_a_speedup_that_is_missed_is_chosen_again(monkeypatch):
    """What is saved is half of what the tables say, so more goes."""

    def times(model, sublayers, inputs):
        return TimeTables(
            1.0,
            tuple(
                {units: -0.2 * (1 - units / each.units) * (each.kind == "neurons") for units in sizes_to_try(each)}
                for each in sublayers
            ),
        )

    monkeypatch.setattr(prune, "measure_times", times)
    monkeypatch.setattr(
        prune, "measured_speedup", lambda model, sizes, inputs: 1 / (1 - 0.4 * (1 - sum(sizes.neurons) / 512))
    )
    sizes, _ = decide_sizes(tiny_bert(), BATCHES, PruningSettings(speedup=1.25))
    assert sum(sizes.neurons) == 256


def test_a_model_is_pruned_again():
    model = prune_model(tiny_bert(), BATCHES, heads=[4, 0, 3, 2], neurons=[0, 64, 128, 32])
    prune_model(model, BATCHES, heads=0.5, neurons=0.5)
    assert sizes_of(model) == BlockSizes((2, 0, 2, 1), (0, 32, 64, 16))
    assert logits(model, FRESH).isfinite().all()


def test_modes_and_gradients_stay_as_they_were():
    model = tiny_bert().train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].output.requires_grad_(False)
    prune_model(model, BATCHES, heads=0.5, neurons=0.5)
    assert all(module.training for module in model.modules())
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {
        *(f"bert.embeddings.{name}" for name, _ in model.bert.embeddings.named_parameters()),
        *(f"bert.encoder.layer.0.output.{name}" for name, _ in model.bert.encoder.layer[0].output.named_parameters()),
    }


def test_adapters_are_merged_into_a_copy():
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).eval()
    pruned = prune_model(model, BATCHES, neurons=0.0, importance="magnitude", reconstruct=False)
    torch.testing.assert_close(logits(pruned, FRESH), logits(model, FRESH), rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in pruned.named_parameters())


def test_small_weights_need_no_rows():
    pruned = prune_model(tiny_bert(), neurons=0.5, importance="magnitude", reconstruct=False)
    assert sizes_of(pruned).neurons == (64,) * 4
    assert pruned.config.intermediate_size == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neurons": 0.5}, "give calibration rows"),
        ({"neurons": 0.5, "uniform": False}, "give calibration rows"),
        ({"speedup": 2.0}, "give calibration rows"),
        ({"heads": [9, 1, 1, 1], "importance": "magnitude", "reconstruct": False}, "heads: block 0 has 4"),
    ],
)
def test_what_is_wrong_is_told_before_anything_changes(settings, message):
    model = tiny_bert()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        prune_model(model, **settings)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_weights_that_are_not_finite_are_refused():
    model = tiny_bert()
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite"):
        prune_model(model, BATCHES, neurons=0.5)
