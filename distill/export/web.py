"""Exports for the browser: what transformers.js can't read of a model, and what it is told in config.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.common.folders import write_atomically
from distill.export.record import Format
from distill.models.structure import input_names
from distill.tasks.outputs import plain_model

DTYPES: dict[Format, str] = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
"""What transformers.js calls the formats; it finds each by the name of its file."""

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
FAMILIES = {
    "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "esm", "mobilebert",
    "modernbert", "mpnet", "roberta", "roformer", "squeezebert", "xlm-roberta",
}  # fmt: skip
"""`model_type` of the encoders of texts that transformers.js has."""
WITHOUT = {
    "ForTokenClassification": {"albert", "mobilebert", "squeezebert"},
    "ForQuestionAnswering": {"esm", "modernbert"},
}
"""Those of which it lacks a head."""

TYPED_TOKENIZERS = {
    "Albert", "Bert", "ConvBert", "Deberta", "DebertaV2", "Electra", "Herbert", "MobileBert", "RoFormer", "SqueezeBert",
    "XLM",
}  # fmt: skip
"""Tokenizers that give `token_type_ids` there."""
_PARTS = {
    "model": "BPE Unigram WordPiece",
    "normalizer": "BertNormalizer Lowercase NFC NFD NFKC NFKD Precompiled Prepend Replace Sequence Strip StripAccents",
    "pre_tokenizer": "BertPreTokenizer ByteLevel Digits FixedLength Metaspace Punctuation Replace Sequence Split "
    "Whitespace WhitespaceSplit",
    "post_processor": "BertProcessing ByteLevel RobertaProcessing Sequence TemplateProcessing",
    "decoder": "BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Sequence Strip WordPiece",
}
"""What a tokenizer.json may be made of there."""


def web_problems(model: PreTrainedModel, tokenizer: Any, engine: str) -> list[str]:
    """What keeps transformers.js from reading an export of a model, one sentence each.

    Args:
        model: its weights may lie on meta.
        tokenizer: or the image processor.
        engine: that the export is for.
    """
    problems = [] if engine == "onnxruntime" else [f"web: browsers run exports for onnxruntime, not for {engine}"]
    model = plain_model(model)
    if "pixel_values" in input_names(model):
        return [
            *problems,
            "web: for models that read texts; transformers.js resizes images in another way than transformers, which "
            "alone moves a ViT's probabilities by more than 0.01",
        ]
    family, name = model.config.model_type, type(model).__name__
    head = next((head for head in HEADS if name.endswith(head)), None)
    if head is None or family not in FAMILIES or family in WITHOUT.get(head, ()):
        problems.append(f"web: transformers.js has no {name}; its families are {', '.join(sorted(FAMILIES))}")
    return problems + _tokenizer_problems(model, tokenizer)


def say_format(folder: Path, format: Format) -> None:
    """Tell transformers.js in an export's config.json which of the files to take where its user names none."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"transformers.js_config": {"dtype": DTYPES[format]}}
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _tokenizer_problems(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    name = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [f"web: {name} has no tokenizer.json, which is all that transformers.js reads"]
    saved = json.loads(backend.to_str())
    problems = [
        f"web: transformers.js has no {part} {kind}, which this tokenizer.json has"
        for part, known in _PARTS.items()
        for kind in sorted(set(_kinds(saved[part])) - set(known.split()))
    ]
    reads_types = "token_type_ids" in input_names(model) and "token_type_ids" in tokenizer.model_input_names
    if reads_types and name.removesuffix("Fast").removesuffix("Tokenizer") not in TYPED_TOKENIZERS:
        problems.append(
            f"web: transformers.js gives no token_type_ids for a {name}, so pairs of texts would be read as one; "
            "load the tokenizer as the model's own class, BertTokenizer for BERT"
        )
    return problems


def _kinds(part: Any) -> Iterator[str]:
    """The types of a part of a tokenizer.json and of the parts that it is a sequence of."""
    if part is None:
        return
    yield part["type"]
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        for each in part.get(name, ()):
            yield from _kinds(each)
