import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from distill import InputError, build_student, factorize_model, prune_model, quantize_model, share_layers
from distill.compression.share import SharingSettings, share_with
from distill.models.description import entries_of
from distill.models.load import from_config
from distill.models.modules import FactorizedLinear, SharedLayer
from distill.models.replacements import is_quantized, structure_of
from tests.architectures import IDS, MASK
from tests.conftest import tiny_bert
from tests.models.restructured import LAYOUTS, family_model, outputs

BATCHES = [{"input_ids": IDS, "attention_mask": MASK}]
FAMILIES = [family for family in LAYOUTS if family != "albert"]  # whose blocks are one already
LAYER = "bert.encoder.layer"


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def four_blocks():
    torch.manual_seed(0)
    return tiny_bert(num_hidden_layers=4, initializer_range=0.1).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_blocks_compute_as_copies_do_and_reload_bit_for_bit(tmp_path, family):
    model = family_model(family)
    known, before = copy.deepcopy(model), model.num_parameters()
    share_layers(model, groups=1, start="last")
    name, blocks = next(
        (name, module)
        for name, module in known.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == 2
    )
    blocks[0].load_state_dict(blocks[1].state_dict(), strict=False)
    torch.testing.assert_close(outputs(model), outputs(known), atol=1e-6, rtol=0)
    again = reloaded(model, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert again.num_parameters() == model.num_parameters() < 0.75 * before
    stored = load_file(tmp_path / "model.safetensors")
    of_second = [each for key, each in stored.items() if key.startswith(f"{name}.1.") and each.ndim]
    assert len(of_second) == (family == "modernbert")  # the norm that its first block lacks
    assert not is_quantized(again.config)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_groups_are_neighbours_and_start_from_their_mean():
    model = four_blocks()
    before = copy.deepcopy(model.state_dict())
    share_layers(model, groups=2, what="feed_forward", start="mean")
    name = f"{LAYER}.2.intermediate.dense"
    mean = (before[f"{LAYER}.2.intermediate.dense.weight"] + before[f"{LAYER}.3.intermediate.dense.weight"]) / 2
    torch.testing.assert_close(model.get_submodule(name).weight, mean)
    assert isinstance(model.get_submodule(f"{LAYER}.3.intermediate.dense"), SharedLayer)
    assert type(model.get_submodule(f"{LAYER}.3.attention.self.query")) is nn.Linear
    entries = {(entry.fields["of"], entry.names) for entry in entries_of(model.config)}
    assert (name, (f"{LAYER}.3.intermediate.dense",)) in entries
    assert (f"{LAYER}.0.output.dense", (f"{LAYER}.1.output.dense",)) in entries
    assert len(entries) == 4


def test_the_best_start_is_measured_and_the_model_then_diverges_as_much():
    model = four_blocks()
    reference = model(**BATCHES[0]).logits.log_softmax(-1).detach()
    shared, found = share_with(copy.deepcopy(model), BATCHES, SharingSettings(groups=2))
    assert list(found.values()) == sorted(found.values())
    assert found.keys() == {"mean", "first", "middle", "last"}
    for start, measured in found.items():
        said = share_layers(copy.deepcopy(model), groups=2, start=start)
        logits = said(**BATCHES[0]).logits.log_softmax(-1).detach()
        known = float((reference.exp() * (reference - logits)).sum(-1).mean())
        assert measured == pytest.approx(known, rel=1e-3)
    best = share_layers(copy.deepcopy(model), groups=2, start=next(iter(found)))
    assert all(torch.equal(each, best.state_dict()[name]) for name, each in shared.state_dict().items())


def test_gradients_of_all_uses_add_up():
    model = share_layers(four_blocks(), groups=1, start="mean").train()
    copied = four_blocks().train()
    first = model.bert.encoder.layer[0]
    for block in copied.bert.encoder.layer:
        block.load_state_dict(first.state_dict())
    for each in (model, copied):
        each.eval()(**BATCHES[0], labels=torch.tensor([0, 1])).loss.backward()
    weights = [block.output.dense.weight.grad for block in copied.bert.encoder.layer]
    torch.testing.assert_close(first.output.dense.weight.grad, sum(weights), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_it_is_quantized_and_factorized_as_shared(tmp_path, format):
    model = share_layers(four_blocks(), groups=2, start="first")
    prefix = [entry.kind for entry in structure_of(model.config)]
    factorize_model(model, BATCHES, modules=["*.intermediate.dense"], rank=8)
    assert isinstance(model.get_submodule(f"{LAYER}.2.intermediate.dense"), FactorizedLinear)
    assert torch.equal(outputs(reloaded(model, tmp_path / "factorized")), outputs(model))
    quantize_model(model, format=format)
    assert [entry.kind for entry in entries_of(model.config)] == [
        *prefix, "factorized", *dict.fromkeys(["int8", format])
    ]  # fmt: skip
    again = reloaded(model, tmp_path / "quantized")
    assert torch.equal(outputs(again), outputs(model))
    assert isinstance(again.get_submodule(f"{LAYER}.1.output.dense"), SharedLayer)
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    assert not [name for name, each in stored.items() if name.startswith(f"{LAYER}.1.") and each.ndim]


def test_adapters_are_shared_too(tmp_path):
    model = reloaded(share_layers(four_blocks(), groups=2, start="first"), tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert not [name for name, _ in adapted.named_parameters() if "lora" in name and "layer.1." in name]
    expected = outputs(adapted)
    assert not torch.equal(expected, outputs(share_layers(four_blocks(), groups=2, start="first")))
    adapted.save_pretrained(tmp_path / "adapters")
    again = type(model).from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapters"))
    assert torch.equal(outputs(again), expected)


def test_models_of_its_config_share_and_students_of_fewer_layers_are_refused():
    model = share_layers(four_blocks(), groups=2, start="first")
    assert (
        from_config(model.config, "token-classification").num_parameters()
        < from_config(four_blocks().config, "token-classification").num_parameters()
    )
    student = build_student(model)
    assert torch.equal(outputs(student), outputs(model))
    student.bert.encoder.layer[0].output.dense.weight.data.zero_()
    assert not torch.equal(outputs(student), outputs(model))
    with pytest.raises(InputError, match="no student is cut from it"):
        build_student(model, num_layers=2)


@pytest.mark.parametrize(("given", "problem"), [
    ({"groups": 4}, "groups: 4; the model has 4 blocks, so say 1 to 3"),
    ({"groups": 0}, "groups: 0; the model has 4 blocks"),
    ({"groups": 1}, "batches: there are none; give calibration rows, or say a start"),
])  # fmt: skip
def test_wrong_settings_are_told(given, problem):
    with pytest.raises(InputError, match=problem):
        share_layers(four_blocks(), **given)


def test_models_whose_blocks_cannot_share_are_told():
    with pytest.raises(InputError, match="is quantized, and its weights can't be shared"):
        share_layers(quantize_model(four_blocks(), format="int8"), groups=1, start="mean")
    with pytest.raises(InputError, match="its layers are factorized or shared already"):
        share_layers(share_layers(four_blocks(), groups=2, start="mean"), groups=1, start="mean")
    uneven = prune_model(
        four_blocks(), heads=[4, 2, 4, 4], neurons=[64, 32, 64, 64], importance="magnitude", reconstruct=False
    )
    with pytest.raises(InputError, match=f"{LAYER}.1 has layers of other sizes than {LAYER}.0"):
        share_layers(uneven, groups=2, start="mean")
    with pytest.raises(InputError, match="its layers are factorized or shared, and heads and neurons can't be cut"):
        prune_model(share_layers(four_blocks(), groups=2, start="mean"), BATCHES, neurons=0.5)


def test_plain_transformers_refuses_it(tmp_path):
    for what in ("all", "attention"):
        share_layers(four_blocks(), groups=2, what=what, start="mean").save_pretrained(tmp_path / what)
    code = """
import sys
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    try:
        AutoModelForSequenceClassification.from_pretrained(folder)
    except RuntimeError as error:
        assert "ize" in str(error) and "mismatch" in str(error), error
    else:
        raise SystemExit(f"{folder} loads")
assert "distill" not in sys.modules
"""
    folders = [str(tmp_path / what) for what in ("all", "attention")]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, cwd=tmp_path, capture_output=True, text=True)
