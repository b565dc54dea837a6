"""Where heads and neurons stand in the blocks of each family that can be pruned."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Names, within a block of a family, of the linear layers that make heads and neurons, and of those that read them.

    One name alone in `attention` is a layer whose outputs are queries, keys and values one after the other.
    """

    attention: tuple[str, ...]
    attention_output: str
    feed_forward: tuple[str, ...]
    feed_forward_output: str
    attention_module: str
    """What is replaced where no head is left: it returns what it computes, and attention weights or None."""
    removable: bool = True
    """Whether a block works without any head or neuron; one that many layers share, or that keeps a cache, does not."""
    own_heads: bool = True
    """Whether heads of one block can go alone; a position bias that all blocks share has a column for each head."""


_BERT = Layout(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
    attention_module="attention.self",
)
_VIT = Layout(
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.o_proj",
    ("mlp.fc1",),
    "mlp.fc2",
    attention_module="attention",
)
_LLAMA = Layout(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    attention_module="self_attn",
    removable=False,
)
LAYOUTS = {
    "albert": Layout(
        ("attention.query", "attention.key", "attention.value"),
        "attention.dense",
        ("ffn",),
        "ffn_output",
        attention_module="attention",
        removable=False,
    ),
    "bert": _BERT,
    "camembert": _BERT,
    "deberta-v2": Layout(
        ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
        attention_module="attention.self",
    ),
    "deit": _VIT,
    "distilbert": Layout(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        ("ffn.lin1",),
        "ffn.lin2",
        attention_module="attention",
    ),
    "electra": _BERT,
    "gpt2": Layout(
        ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", attention_module="attn", removable=False
    ),
    "llama": _LLAMA,
    "modernbert": Layout(("attn.Wqkv",), "attn.Wo", ("mlp.Wi",), "mlp.Wo", attention_module="attn"),
    "mpnet": Layout(
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "attention.attn.o",
        ("intermediate.dense",),
        "output.dense",
        attention_module="attention.attn",
        own_heads=False,
    ),
    "qwen2": _LLAMA,
    "roberta": _BERT,
    "vit": _VIT,
    "xlm-roberta": _BERT,
}
"""By `model_type`; each was tried (tests/compression/pruning)."""
