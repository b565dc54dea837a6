"""Pruned models reload bit for bit: after `import distill` where blocks differ, by plain transformers elsewhere."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

import distill  # noqa: F401  (what it registers)
from distill.compression.pruning.prune import prune_model
from distill.compression.pruning.structure import BlockSizes, block_sizes, prunable_sublayers
from tests.compression.pruning.test_structure import EVERY, WITHOUT_SOME, logits, model_of
from tests.conftest import tiny_bert

MAGNITUDE = {"importance": "magnitude", "reconstruct": False}
PLAIN = """
import sys
from transformers import BertForSequenceClassification

for folder in sys.argv[1:]:
    try:
        BertForSequenceClassification.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print("refused:", " ".join(str(error).split()))
assert "distill" not in sys.modules
"""


def load_plainly(folders):
    """What becomes of each in a process that never imports distill."""
    command = [sys.executable, "-c", PLAIN, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def reloads(model, batch, folder):
    expected = logits(model, batch)
    model.save_pretrained(folder / "saved")
    loaded = type(model).from_pretrained(folder / "saved").eval()
    assert torch.equal(logits(loaded, batch), expected)
    loaded.save_pretrained(folder / "again")
    again = type(model).from_pretrained(folder / "again").eval()
    assert torch.equal(logits(again, batch), expected)
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("saved", "again")]
    assert weights[0] == weights[1]
    return again


def float_model(family):
    model, batch = model_of(family)
    model.config.pad_token_id = 0
    batch = {name: values.float() if values.is_floating_point() else values for name, values in batch.items()}
    return model.float(), batch


@pytest.mark.parametrize("family", EVERY)
def test_sizes_of_their_own_for_each_block(family, tmp_path):
    model, batch = float_model(family)
    neurons = {"AlbertConfig": [32]}.get(family, [32, 64, 1, 33])
    now = block_sizes(prunable_sublayers(model, ("neurons",)))
    heads = None if family == "MPNetConfig" else [max(1, count // 2) for count in now.heads]
    prune_model(model, heads=heads, neurons=neurons, **MAGNITUDE)
    again = reloads(model, batch, tmp_path)
    assert block_sizes(prunable_sublayers(again, ("neurons",))) == block_sizes(prunable_sublayers(model, ("neurons",)))


@pytest.mark.parametrize("family", WITHOUT_SOME)
def test_whole_sublayers_that_are_gone(family, tmp_path):
    model, batch = float_model(family)
    heads = [2, 0, 1, 0]
    prune_model(model, [batch], heads=heads, neurons=[0, 64, 32, 0])
    again = reloads(model, batch, tmp_path)
    prune_model(again, [batch], neurons=[0, 32, 32, 0])
    reloads(again, batch, tmp_path)


@pytest.mark.parametrize("family", EVERY)
def test_as_many_neurons_in_every_block_need_nothing_special(family, tmp_path):
    model, batch = float_model(family)
    prune_model(model, neurons=0.5, **MAGNITUDE)
    reloads(model, batch, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_plain_transformers_reads_what_it_can_and_refuses_the_rest(tmp_path):
    ways = {
        "uniform": {"neurons": 0.5},
        "heads": {"heads": 0.5},
        "neurons": {"neurons": [128, 64, 32, 128]},
        "no attention": {"heads": [4, 4, 4, 0]},
        "no neurons": {"neurons": [128, 0, 128, 128]},
    }
    for name, sizes in ways.items():
        prune_model(tiny_bert(), **sizes, **MAGNITUDE).save_pretrained(tmp_path / name)
    uniform, *others = load_plainly(tmp_path / name for name in ways)
    assert uniform == "loaded"
    for said in others:
        assert said.startswith("refused:"), said
        assert "mismatch" in said, said


def test_blocks_that_are_alike_again_are_plain_again(tmp_path):
    model = prune_model(tiny_bert(), neurons=[64, 128, 96, 128], **MAGNITUDE)
    assert model.config.intermediate_size == 128
    assert hasattr(model.config, "quantization_config")
    prune_model(model, intermediate_size=64, **MAGNITUDE)
    assert model.config.intermediate_size == 64
    assert not hasattr(model.config, "quantization_config")
    other = prune_model(tiny_bert(), heads=[4, 2, 4, 4], neurons=[64, 0, 64, 64], **MAGNITUDE)
    assert other.config.intermediate_size == 64
    assert block_sizes(prunable_sublayers(other)) == BlockSizes((4, 2, 4, 4), (64, 0, 64, 64))


def test_another_head_on_a_pruned_body(tmp_path):
    model = prune_model(tiny_bert(), heads=[4, 2, 0, 4], neurons=[64, 0, 96, 128], **MAGNITUDE)
    model.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.bert(ids).last_hidden_state)


def test_a_pruned_model_learns_on(tmp_path):
    model = prune_model(tiny_bert(), heads=[4, 2, 0, 4], neurons=[64, 0, 96, 128], **MAGNITUDE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "labels": torch.tensor([1])}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model(**batch).loss.backward()
    optimizer.step()
    unmoved = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert all("embeddings" in name or "key.bias" in name for name in unmoved), unmoved
    reloads(model.eval(), {"input_ids": batch["input_ids"]}, tmp_path)
