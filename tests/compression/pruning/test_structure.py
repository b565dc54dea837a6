"""A model that was cut gives what the whole one does with the same heads and neurons set to zero, in every family."""

import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from distill.compression.pruning.layouts import LAYOUTS
from distill.compression.pruning.structure import (
    BlockSizes,
    block_sizes,
    columns_of,
    cut_to_sizes,
    keep_units,
    prunable_sublayers,
)
from distill.compression.quantization.quantize import quantize_model
from distill.errors import InputError
from tests.architectures import small_model
from tests.conftest import tiny_bert
from tests.models.test_families import FAMILIES, SIZES, make

IDS = torch.tensor([[2, 7, 8, 9, 10, 3], [2, 9, 12, 3, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
EVERY = (
    *FAMILIES, "AlbertConfig", "ViTConfig", "DeiTConfig", "XLMRobertaConfig", "CamembertConfig", "unshared DeBERTa",
    "GPT2LMHeadModel", "LlamaForCausalLM",
)  # fmt: skip
WITHOUT_SOME = (
    "BertConfig", "RobertaConfig", "ElectraConfig", "DebertaV2Config", "ModernBertConfig", "DistilBertConfig",
    "ViTConfig", "DeiTConfig", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2Config",
)  # fmt: skip


def model_of(family):
    """A small float64 model, and a batch that it takes."""
    torch.manual_seed(0)
    if family == "AlbertConfig":
        sizes = {**SIZES, "embedding_size": 16}
        model = AlbertForSequenceClassification(AlbertConfig(**sizes))
    elif family in ("ViTConfig", "DeiTConfig"):
        config = getattr(transformers, family)(
            image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=64, initializer_range=0.2,
        )  # fmt: skip
        config.architectures = [family.replace("Config", "ForImageClassification")]
        return AutoModelForImageClassification.from_config(config).eval().double(), PIXELS
    elif family in ("XLMRobertaConfig", "CamembertConfig"):
        model = AutoModelForSequenceClassification.from_config(getattr(transformers, family)(**SIZES))
    elif family == "unshared DeBERTa":
        config = make("DebertaV2Config").config
        config.share_att_key = False
        model = AutoModelForSequenceClassification.from_config(config)
    elif family == "GPT2LMHeadModel":
        model = GPT2LMHeadModel(make("GPT2Config").config)
    elif family == "LlamaForCausalLM":
        model = LlamaForCausalLM(make("LlamaConfig").config)
    else:
        model = make(family)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases, which are zero at first
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().double(), BATCH


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def zeroed_logits(model, kept, batch):
    """Of the whole model, where the columns of the other units get zeros."""
    hooks = []
    for sublayer, units in kept.items():
        mask = torch.zeros(sublayer.units * sublayer.width, dtype=torch.float64)
        mask[columns_of(units, sublayer.width)] = 1
        output = model.get_submodule(f"{sublayer.block}.{sublayer.output}")
        hooks.append(output.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
    found = logits(model, batch)
    for hook in hooks:
        hook.remove()
    return found


def some_units(sublayers, *, least=1):
    generator = torch.Generator().manual_seed(3)
    kept = {}
    for each in sublayers:
        count = int(torch.randint(least, each.units, (1,), generator=generator))
        kept[each] = torch.randperm(each.units, generator=generator)[:count].sort().values
    return kept


@pytest.mark.parametrize("family", EVERY)
def test_a_cut_model_gives_what_zeros_in_the_whole_one_give(family):
    model, batch = model_of(family)
    whole = logits(model, batch)
    kinds = ("neurons",) if family == "MPNetConfig" else ("heads", "neurons")
    sublayers = [each for each in prunable_sublayers(model, kinds) if each.kind in kinds]
    kept = some_units(sublayers)
    expected = zeroed_logits(model, kept, batch)
    assert not torch.allclose(expected, whole, rtol=1e-3)
    before = sum(parameter.numel() for parameter in model.parameters())
    for sublayer, units in kept.items():
        keep_units(model, sublayer, units)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-10, atol=1e-10)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    found = {(each.block, each.kind): each.units for each in prunable_sublayers(model, kinds)}
    assert all(found[each.block, each.kind] == len(units) for each, units in kept.items())


@pytest.mark.parametrize("family", WITHOUT_SOME)
def test_whole_sublayers_go_and_their_bias_stays(family):
    model, batch = model_of(family)
    sublayers = prunable_sublayers(model)
    kept = {sublayers[0]: torch.arange(0), sublayers[3]: torch.arange(0), sublayers[6]: torch.arange(0)}
    expected = zeroed_logits(model, kept, batch)
    for sublayer, units in kept.items():
        keep_units(model, sublayer, units)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-10, atol=1e-10)
    found = block_sizes(prunable_sublayers(model))
    heads = 2 if family in ("LlamaForCausalLM", "Qwen2Config") else 4
    assert found == BlockSizes((0, heads, heads, 0), (64, 0, 64, 64))
    model.train()(**batch).logits.sum().backward()  # it still learns


def test_every_family_is_tried():
    tried = {model_of(family)[0].config.model_type for family in EVERY}
    assert tried == set(LAYOUTS)


def test_groups_of_queries_go_with_their_keys():
    model, _ = model_of("Qwen2Config")
    heads = [each for each in prunable_sublayers(model) if each.kind == "heads"]
    assert [(each.units, each.width) for each in heads] == [(2, 16)] * 4
    keep_units(model, heads[1], torch.tensor([1]))
    attention = model.model.layers[1].self_attn
    assert [getattr(attention, name).weight.shape[0] for name in ("q_proj", "k_proj", "v_proj")] == [16, 8, 8]
    assert attention.o_proj.weight.shape == (32, 16)


@pytest.mark.parametrize("family", EVERY)
def test_an_empty_model_takes_the_weights_of_a_cut_one(family):
    model, batch = model_of(family)
    heads = (4,) if family == "AlbertConfig" else (2, 1, 2, 1)
    neurons = (32,) if family == "AlbertConfig" else (32, 1, 64, 5)
    if family == "MPNetConfig":
        heads = (4, 4, 4, 4)
    sizes = BlockSizes(heads, neurons)
    cut_to_sizes(model, sizes)
    with torch.device("meta"):
        other = type(model)(model.config).eval()
    cut_to_sizes(other, sizes)
    assert {name: tuple(weight.shape) for name, weight in other.state_dict().items()} == {
        name: tuple(weight.shape) for name, weight in model.state_dict().items()
    }
    assert block_sizes(prunable_sublayers(other, ("neurons",))) == sizes
    other = type(model)(model.config).eval().double()
    cut_to_sizes(other, sizes)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: make("MPNetConfig"), "share one position bias"),
        (lambda: quantize_model(small_model("bert"), format="int8"), "is quantized"),
        (lambda: tiny_bert(is_decoder=True, add_cross_attention=True), "attends to an encoder"),
        (lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=20)
        ), "of t5 can't be cut; those of these can: albert, bert"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(make_model, message):
    with pytest.raises(InputError, match=message):
        prunable_sublayers(make_model())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (BlockSizes((1, 1), (8, 8)), "heads: 2 sizes, and the model has 4 blocks"),
        (BlockSizes((4, 4, 5, 4), (128,) * 4), "heads: block 2 has 4"),
        (BlockSizes((4,) * 4, (128, 128, -1, 0)), "neurons: block 2 has 128"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        cut_to_sizes(tiny_bert(), sizes)


def test_a_block_that_is_every_layer_keeps_some_of_each():
    with pytest.raises(InputError, match="and 1 to as many can be left: 0"):
        cut_to_sizes(model_of("AlbertConfig")[0], BlockSizes((0,), (64,)))
