"""Tiny models of every family that is exported, each of another kind, and what reads their rows."""

import torch
import transformers

from tests.conftest import WORDS

SIZES = {
    "vocab_size": len(WORDS) + 5, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 66, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3, "num_labels": 3,
}  # fmt: skip
_IMAGES = {"image_size": 32, "num_labels": 3}
_BLOCKS = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
FAMILIES = {
    "Bert": ("SequenceClassification", SIZES | {"problem_type": "multi_label_classification"}),
    "DistilBert": ("MaskedLM", SIZES | {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}),
    "Roberta": ("TokenClassification", SIZES),
    "Electra": ("QuestionAnswering", SIZES | {"embedding_size": 16, "num_labels": 2}),
    "Albert": ("SequenceClassification", SIZES | {"embedding_size": 16}),
    "DebertaV2": ("SequenceClassification", SIZES | {
        "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    }),
    "MPNet": ("SequenceClassification", SIZES | {"num_labels": 1, "problem_type": "regression"}),
    "ModernBert": ("TokenClassification", SIZES | {
        "num_hidden_layers": 2, "cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2,
        "local_attention": 8,
    }),
    "ViT": ("ImageClassification", _IMAGES | _BLOCKS | {"patch_size": 8, "initializer_range": 0.2}),
    "ResNet": ("ImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3,
                                       "layer_type": "basic"}),
    "MobileNetV2": ("ImageClassification", _IMAGES | {"depth_multiplier": 0.25, "initializer_range": 0.3}),
}  # fmt: skip
IMAGES = ("ViT", "ResNet", "MobileNetV2")


def family_model(family: str) -> transformers.PreTrainedModel:
    """A random model, its weights large enough to matter."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}For{kind}")(config).eval()


def image_processor() -> transformers.BaseImageProcessor:
    """What makes images of 32×32."""
    return transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
