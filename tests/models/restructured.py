"""Small random models of the families that are pruned, and the same models with heads and neurons cut out."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from distill.models.replacements import Removed, Resized, restructure
from tests.architectures import IDS, MASK, small_model

HIDDEN, HEADS, HEAD_SIZE, NEURONS = 96, 4, 24, 160
KEPT_HEADS, KEPT_NEURONS = [0, 2, 3], list(range(5, 137))


@dataclass(frozen=True)
class Layout:
    """Names inside a block, and how many parts stand in one layer."""

    block: str
    queries: tuple[str, ...]
    attention_output: str
    neurons: tuple[str, ...]
    neurons_output: str
    removed_attention: dict[str, Removed]
    removed_feed_forward: dict[str, Removed]
    fused: int = 1
    fused_neurons: int = 1


_BERT = Layout(
    "encoder.layer.{}", tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.output.dense", ("intermediate.dense",), "output.dense",
    {"attention.self": Removed(attention=True), "attention.output.dense": Removed(bias="bias")},
    {"intermediate": Removed(), "output.dense": Removed(bias="bias")},
)  # fmt: skip
LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": Layout(
        "encoder.layer.{}",
        tuple(f"attention.self.{part}_proj" for part in ("query", "key", "value", "pos_key", "pos_query")),
        "attention.output.dense", ("intermediate.dense",), "output.dense",
        _BERT.removed_attention, _BERT.removed_feed_forward,
    ),
    "distilbert": Layout(
        "transformer.layer.{}", tuple(f"attention.{part}_lin" for part in "qkv"),
        "attention.out_lin", ("ffn.lin1",), "ffn.lin2",
        {"attention": Removed(attention=True, bias="out_lin.bias")}, {"ffn": Removed(bias="lin2.bias")},
    ),
    "albert": Layout(
        "encoder.albert_layer_groups.0.albert_layers.{}",
        tuple(f"attention.{part}" for part in ("query", "key", "value")),
        "attention.dense", ("ffn",), "ffn_output", {}, {"ffn": Removed(), "ffn_output": Removed(bias="bias")},
    ),
    "modernbert": Layout(
        "layers.{}", ("attn.Wqkv",), "attn.Wo", ("mlp.Wi",), "mlp.Wo",
        {"attn": Removed(attention=True)}, {"mlp": Removed()}, fused=3, fused_neurons=2,
    ),
    "vit": Layout(
        "layers.{}", tuple(f"attention.{part}_proj" for part in "qkv"), "attention.o_proj", ("mlp.fc1",), "mlp.fc2",
        {"attention": Removed(attention=True, bias="o_proj.bias")}, {"mlp": Removed(bias="fc2.bias")},
    ),
    "gpt2": Layout(
        "h.{}", ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj",
        {"attn": Removed(attention=True, bias="c_proj.bias")}, {"mlp": Removed(bias="c_proj.bias")}, fused=3,
    ),
    "llama": Layout(
        "layers.{}", tuple(f"self_attn.{part}_proj" for part in "qkv"), "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", {"self_attn": Removed(attention=True)}, {"mlp": Removed()},
    ),
}  # fmt: skip


def family_model(family):
    """A classifier with three labels and two blocks of four heads; Llama's queries share two keys."""
    if family in ("bert", "roberta", "distilbert", "modernbert", "gpt2"):
        return small_model(family, HIDDEN)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "hidden_size": HIDDEN, "intermediate_size": NEURONS}
    shared = sizes | {"initializer_range": 0.1, "num_labels": 3}
    text = shared | {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
    if family == "electra":
        return ElectraForSequenceClassification(ElectraConfig(embedding_size=32, **text)).eval()
    if family == "albert":
        return AlbertForSequenceClassification(AlbertConfig(embedding_size=32, **text)).eval()
    if family == "deberta-v2":
        relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
        return DebertaV2ForSequenceClassification(DebertaV2Config(**text, **relative)).eval()
    if family == "vit":
        return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **shared)).eval()
    return LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=2, **text)).eval()


def outputs(model):
    """Logits of two short rows, or images."""
    if model.config.model_type == "vit":
        inputs = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    else:
        inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        return model.eval()(**{name: values.to(model.device) for name, values in inputs.items()}).logits.float()


def block_of(family, model, index):
    """The full name of a block, 0 for ALBERT's only one."""
    return f"{model.base_model_prefix}.{LAYOUTS[family].block.format(0 if family == 'albert' else index)}"


def cut_heads_and_neurons(family, model, index=0):
    """Cut a head (of Llama's, a key with its queries) and some neurons out of a block.

    Returns what `outputs` gives beforehand with these made to add nothing: known values.
    """
    layout, block = LAYOUTS[family], block_of(family, model, index)
    heads = [2, 3] if family == "llama" else KEPT_HEADS
    keys = [1] if family == "llama" else heads
    replacements, weights = {}, {}
    for name in layout.queries:
        kept = keys if name.endswith(("k_proj", "v_proj")) else heads
        columns = [head * HEAD_SIZE + each for head in kept for each in range(HEAD_SIZE)]
        _cut(model, f"{block}.{name}", columns, layout.fused, replacements, weights)
    for name in layout.neurons:
        _cut(model, f"{block}.{name}", KEPT_NEURONS, layout.fused_neurons, replacements, weights)
    into = {layout.attention_output: [head * HEAD_SIZE + each for head in heads for each in range(HEAD_SIZE)]}
    into[layout.neurons_output] = KEPT_NEURONS
    for name, kept in into.items():
        layer = model.get_submodule(f"{block}.{name}")
        side = 0 if isinstance(layer, Conv1D) else 1
        gone = [each for each in range(layer.weight.shape[side]) if each not in kept]
        layer.weight.data.index_fill_(side, torch.tensor(gone), 0)
        weights[f"{block}.{name}.weight"] = layer.weight.index_select(side, torch.tensor(kept))
        replacements[f"{block}.{name}"] = Resized(len(kept), layer.weight.shape[1 - side])
    known = outputs(model)
    restructure(model, replacements, weights)
    return known


def _cut(model, name, kept, parts, replacements, weights):
    """Keep outputs of a layer in each of its parts."""
    layer = model.get_submodule(name)
    side = 1 if isinstance(layer, Conv1D) else 0
    width = layer.weight.shape[side] // parts
    rows = torch.tensor([part * width + each for part in range(parts) for each in kept])
    weights[f"{name}.weight"] = layer.weight.index_select(side, rows)
    if layer.bias is not None:
        weights[f"{name}.bias"] = layer.bias[rows]
    replacements[name] = Resized(layer.weight.shape[1 - side], len(rows))


def remove(family, model, part, index=1):
    """Leave the attention or the feed-forward network of a block out.

    Returns what `outputs` gives beforehand with the weights of its last layer made zero: a known value.
    """
    layout, block = LAYOUTS[family], block_of(family, model, index)
    last = layout.attention_output if part == "attention" else layout.neurons_output
    removed = layout.removed_attention if part == "attention" else layout.removed_feed_forward
    nn.init.zeros_(model.get_submodule(f"{block}.{last}").weight)
    known = outputs(model)
    restructure(model, {f"{block}.{name}": each for name, each in removed.items()}, {})
    return known
