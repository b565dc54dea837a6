"""What tests of the browser share: programs that must be here, a tokenizer that JavaScript reads, texts."""

import shutil
import string
from importlib.util import find_spec

import torch
from transformers import BertTokenizer

from tests.conftest import WORDS, missing, tiny_bert

CHROMIUM = "/usr/bin/chromium"
LABELS = ["<b>bad</b>", 'good & "fine"', "neither"]
TEXTS = [
    "the film was great", "the plot was very dull", "a lovely cast, a sad end", "Great!", "AWFUL", "good",
    "bad?", "the end is poor", "fine; the start was nice", "very very very good", "it's 5 o'clock", "décor naïve",
    "film\nplot\tcast", "<script>alert('the film')</script> &amp;", "電影 great", "the 🎬 was bad", "the the the",
    "unbelievably great", "a", "great film, poor plot", " ".join(["the cast was lovely and the plot was dull"] * 20),
]  # fmt: skip
PAIRS = [
    ("the film was great", "the plot was dull"), ("a cast", TEXTS[-1]), (TEXTS[-1], "a lovely end"),
    (TEXTS[-1], TEXTS[-1] + " bad"),
]  # fmt: skip
"""Most are too long for the tokenizer below."""


def need(*programs: str) -> None:
    """Skip a test where a program or playwright is missing; fail in CI."""
    for program in programs:
        if shutil.which(program) is None:
            missing(f"{program} is not installed (Debian: apt-get install nodejs npm chromium)")
    if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        missing("the extra onnx is not installed")
    if CHROMIUM in programs and find_spec("playwright") is None:
        missing("playwright is not installed (pip install -e '.[dev]')")


def wordpiece_tokenizer() -> BertTokenizer:
    """One of 40 tokens at most, which reads every word of Latin letters."""
    letters = [prefix + each for prefix in ("", "##") for each in string.ascii_lowercase if prefix or each != "a"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *".,;!?<>()/&'0123456789"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)})
    tokenizer.model_max_length = 40
    return tokenizer


def web_settings() -> dict:
    """Of a tiny model with three labels that reads that tokenizer's tokens."""
    return {
        "num_hidden_layers": 2,
        "vocab_size": len(wordpiece_tokenizer()),
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }


def web_model():
    """A tiny BERT with three labels."""
    return tiny_bert(**web_settings())


def calibration() -> list[dict[str, torch.Tensor]]:
    """Batches for int8."""
    tokenizer = wordpiece_tokenizer()
    return [dict(tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True))]
