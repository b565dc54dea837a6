"""Small random models of five families, with weights large enough for their layers to matter."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

IDS = torch.tensor([[2, 5, 9, 14, 3, 0, 0], [2, 6, 7, 8, 9, 10, 3]])
MASK = (IDS > 0).long()
ARCHITECTURES = ("bert", "distilbert", "roberta", "modernbert", "gpt2")

_CLASSES = {
    "bert": (BertForSequenceClassification, BertForMaskedLM),
    "distilbert": (DistilBertForSequenceClassification, DistilBertForMaskedLM),
    "roberta": (RobertaForSequenceClassification, RobertaForMaskedLM),
    "modernbert": (ModernBertForSequenceClassification, ModernBertForMaskedLM),
    "gpt2": (GPT2ForSequenceClassification, GPT2LMHeadModel),
}


def small_model(architecture: str, hidden: int = 96, *, language_model: bool = False) -> PreTrainedModel:
    """A classifier with three labels, or a language model whose output layer is tied to the word embeddings."""
    torch.manual_seed(0)
    shared = {"vocab_size": 60, "max_position_embeddings": 64, "initializer_range": 0.1, "num_labels": 3}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    blocks = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
    if architecture == "bert":
        config = BertConfig(hidden_size=hidden, **blocks, **shared)
    elif architecture == "distilbert":
        config = DistilBertConfig(dim=hidden, n_layers=2, n_heads=4, hidden_dim=160, **shared)
    elif architecture == "roberta":
        config = RobertaConfig(hidden_size=hidden, **blocks, **shared, pad_token_id=0)
    elif architecture == "modernbert":
        config = ModernBertConfig(hidden_size=hidden, **blocks, **shared, **ids)
    else:
        config = GPT2Config(n_embd=hidden, n_inner=160, n_layer=2, n_head=4, **shared, **ids)
    return _CLASSES[architecture][language_model](config).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of two short rows, in float32."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits.float()
