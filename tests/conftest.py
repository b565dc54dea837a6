"""Tiny models and data, made here: no network."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn

# Before the first import of huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="distill-tests-")  # no run's cache is found, and none left behind
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD, BAD = ["good", "great", "fine", "nice", "lovely"], ["bad", "awful", "poor", "sad", "dull"]
OTHER = ["film", "plot", "cast", "end", "start", "the", "a", "was", "is", "very"]
WORDS = GOOD + BAD + OTHER
SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("shared_data") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} (real GLUE data) is not on this machine"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def missing(what: str) -> NoReturn:
    """Skip a test for something that is not installed or made here; fail where CI promises that it is."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _precision(monkeypatch, request) -> None:
    """Numbers are compared in float32 on every machine; tests marked bf16 run as on one that has it."""
    in_bf16 = request.node.get_closest_marker("bf16") is not None
    monkeypatch.setattr("distill.training.config.has_bf16", lambda device: in_bf16)


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate(special + words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_config(**changes) -> BertConfig:
    settings = {
        "vocab_size": len(WORDS) + 5,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**{**settings, **changes})


def tiny_bert(seed: int = 0, **changes) -> BertForSequenceClassification:
    """A random BERT with weights large enough for its layers to matter."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(tiny_config(**{"initializer_range": 0.2, **changes}))
    return model.eval()


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return tiny_bert()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, tokenizer) -> Path:
    """A model folder without a classification head, as a pretrained checkpoint is."""
    folder = tmp_path_factory.mktemp("models") / "pretrained"
    tiny_bert(seed=1, initializer_range=0.05).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[dict]:
    """Rows whose label is whether a good or a bad word stands in them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        label = int(torch.randint(2, (1,), generator=generator))
        words = [(GOOD if label else BAD)[int(torch.randint(5, (1,), generator=generator))]]
        length = int(torch.randint(2, 12, (1,), generator=generator))
        words += [OTHER[int(i)] for i in torch.randint(len(OTHER), (length,), generator=generator)]
        order = torch.randperm(len(words), generator=generator)
        rows.append({"sentence": " ".join(words[int(i)] for i in order), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def sst2_folder(tmp_path_factory) -> Path:
    """A folder with SST-2's columns."""
    folder = tmp_path_factory.mktemp("sst2")
    write_rows(folder / "train.jsonl", sentences(96))
    write_rows(folder / "validation.jsonl", sentences(40, seed=1))
    return folder
