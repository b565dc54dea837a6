"""The code of every model card runs, on tiny models of every kind."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image

from distill import DistillationTrainer
from distill.tasks.kinds import KINDS, usage_code
from distill.training.config import TrainingConfig
from tests.conftest import WORDS, make_tokenizer, tiny_config


def gpt2():
    size = {"vocab_size": len(WORDS) + 5, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=2, eos_token_id=3))


def vit(folder):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**size, image_size=32, patch_size=16))


def bert(head, **settings):
    return getattr(transformers, f"BertFor{head}")(tiny_config(num_hidden_layers=1, **settings))


MODELS = {
    "classification": lambda _: bert("SequenceClassification"),
    "multi-label": lambda _: bert("SequenceClassification", problem_type="multi_label_classification", num_labels=3),
    "regression": lambda _: bert("SequenceClassification", problem_type="regression", num_labels=1),
    "token-classification": lambda _: bert("TokenClassification", id2label={0: "B-PER", 1: "B-LOC"}),
    "question-answering": lambda _: bert("QuestionAnswering"),
    "masked-lm": lambda _: bert("MaskedLM"),
    "causal-lm": lambda _: gpt2(),
    "image-classification": vit,
}


def printed(kind, folder, *, pairs=False):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(usage_code(kind, str(folder), pairs=pairs, needs_import=False), {})
    return out.getvalue()


_CHILD = """
import contextlib, io, json, sys
said = {}
for kind, code in json.loads(sys.stdin.read()).items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    said[kind] = out.getvalue()
assert "distill" not in sys.modules
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the code of each kind prints of a model that our trainer saved, where there is only transformers."""
    folder = tmp_path_factory.mktemp("usages")
    Image.new("RGB", (40, 40)).save(folder / "photo.jpg")
    for kind, make in MODELS.items():
        model = make(folder / kind)
        reads = None if kind == "image-classification" else make_tokenizer()
        args = TrainingConfig(output_dir=str(folder / "unused"), report_to=[])
        DistillationTrainer(model=model, args=args, processing_class=reads).save_model(str(folder / kind))
    codes = {kind: usage_code(kind, kind, pairs=False, needs_import=False) for kind in MODELS}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(codes), cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_for_each_kind_prints_a_prediction(kind, said):
    expected = {
        "classification": 1, "multi-label": 3, "regression": 1, "masked-lm": 5, "image-classification": 2,
    }  # fmt: skip
    if kind in expected:
        assert said[kind].count("'score'") == expected[kind]
    elif kind == "token-classification":
        assert "'entity_group': '" in said[kind]
    elif kind == "causal-lm":
        assert "'generated_text': 'The plot" in said[kind]
    else:
        assert said[kind].endswith("\n")


def test_a_score_is_not_squashed_and_pairs_are_read_as_pairs(tmp_path):
    model = bert("SequenceClassification", problem_type="regression", num_labels=1)
    with torch.no_grad():
        model.classifier.bias.fill_(7)
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    inputs = tokenizer("A man is asleep.", "He sleeps.", return_tensors="pt")
    score = model.eval()(**inputs).logits.item()
    assert 5 < score < 9
    (found,) = [
        float(part.partition("}")[0]) for part in printed("regression", tmp_path, pairs=True).split("'score': ")[1:]
    ]
    assert found == pytest.approx(score, abs=1e-5)
