"""Where heads and neurons stand in the blocks of each family that can be pruned."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Names, within a block of a family, of the linear layers that make heads and neurons, and of those that read them.

    One name alone in `attention` is a layer whose outputs are queries, keys and values one after the other.
    """

    attention_module: str
    """What is left out, its output layer too, where no head is left."""
    attention: tuple[str, ...]
    attention_output: str
    feed_forward_module: str
    """The same where no neuron is left."""
    feed_forward: tuple[str, ...]
    feed_forward_output: str
    removable: bool = True
    """Whether all heads or neurons of a block may go; not where all layers are one block."""
    own_heads: bool = True
    """Whether heads of one block can go alone; a position bias that all blocks share has a column for each head."""
    size_name: str = "intermediate_size"
    """What the config calls the number of neurons."""


_BERT = Layout(
    "attention.self",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "intermediate",
    ("intermediate.dense",),
    "output.dense",
)
_VIT = Layout(
    "attention",
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.o_proj",
    "mlp",
    ("mlp.fc1",),
    "mlp.fc2",
)
_LLAMA = Layout(
    "self_attn",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    "mlp",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)
LAYOUTS = {
    "albert": Layout(
        "attention",
        ("attention.query", "attention.key", "attention.value"),
        "attention.dense",
        "ffn",
        ("ffn",),
        "ffn_output",
        removable=False,
    ),
    "bert": _BERT,
    "camembert": _BERT,
    "deberta-v2": Layout(
        "attention.self",
        ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        "attention.output.dense",
        "intermediate",
        ("intermediate.dense",),
        "output.dense",
    ),
    "deit": _VIT,
    "distilbert": Layout(
        "attention",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        "ffn",
        ("ffn.lin1",),
        "ffn.lin2",
        size_name="hidden_dim",
    ),
    "electra": _BERT,
    "gpt2": Layout("attn", ("attn.c_attn",), "attn.c_proj", "mlp", ("mlp.c_fc",), "mlp.c_proj", size_name="n_inner"),
    "llama": _LLAMA,
    "modernbert": Layout("attn", ("attn.Wqkv",), "attn.Wo", "mlp", ("mlp.Wi",), "mlp.Wo"),
    "mpnet": Layout(
        "attention.attn",
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "attention.attn.o",
        "intermediate",
        ("intermediate.dense",),
        "output.dense",
        own_heads=False,
    ),
    "qwen2": _LLAMA,
    "roberta": _BERT,
    "vit": _VIT,
    "xlm-roberta": _BERT,
}
"""By `model_type`; each was tried (tests/compression/pruning)."""
