"""Hashes of rows' options and of tokenizers, by which what was computed of them is found again."""

import hashlib
import json
from typing import Any

from transformers import BaseImageProcessor

from distill.data.tokenized import Processor


def fingerprint_of(content: Any) -> str:
    """Hash anything that JSON or `str` can write."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Processor) -> str:
    """Hash what a tokenizer or image processor does to an input, truncation and padding (which its use sets) aside."""
    inputs = getattr(tokenizer, "model_input_names", None)
    return fingerprint_of([token_fingerprint(tokenizer), inputs])


def token_fingerprint(tokenizer: Processor) -> str:
    """Hash what decides the token ids alone, and not what else a tokenizer gives a model (`token_type_ids`).

    Two tokenizers of the same hash cut every text into the same ids.
    """
    if isinstance(tokenizer, BaseImageProcessor):
        return fingerprint_of(tokenizer.to_dict())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        description: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    else:
        description = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    sides = [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_type_id]
    return fingerprint_of([description, special, sides])
