"""Students of every family: cut, distilled, saved, and read again by transformers alone."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
import transformers
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from distill import DistillationConfig, DistillationTrainer, build_student
from distill.compression.student import Width, fresh_model
from distill.data.load import tokenize
from distill.errors import InputError
from distill.tasks.base import GLUE
from distill.training.features import FeatureExtractor, FeatureSpec
from tests.conftest import WORDS, make_tokenizer, sentences

SIZES = {
    "vocab_size": len(WORDS) + 5, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 66, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
FAMILIES = {
    "BertConfig": {},
    "RobertaConfig": {},
    "ElectraConfig": {"embedding_size": 16},
    "DebertaV2Config": {**DEBERTA, "norm_rel_ebd": "layer_norm"},
    "MPNetConfig": {},
    "ModernBertConfig": {"cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2, "local_attention": 8},
    "DistilBertConfig": {},
    "GPT2Config": {},
    "Qwen2Config": {"num_key_value_heads": 2},
    "LlamaConfig": {"num_key_value_heads": 2},
}
NAMES_ELSEWHERE = {
    "DistilBertConfig": {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                         "intermediate_size": "hidden_dim"},
    "GPT2Config": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                   "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"},
}  # fmt: skip


def make(family):
    names = NAMES_ELSEWHERE.get(family, {})
    settings = {names.get(name, name): value for name, value in SIZES.items()}
    torch.manual_seed(0)
    config = getattr(transformers, family)(**settings, **FAMILIES[family])
    return AutoModelForSequenceClassification.from_config(config).eval()


def make_rows(count=16):
    return tokenize(datasets.Dataset.from_list(sentences(count)), GLUE["sst2"], make_tokenizer(), 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_every_family_is_cut_and_learns(family, folder):
    teacher = make(family)
    ids = torch.tensor([[2, 7, 8, 9, 10, 3], [2, 9, 12, 5, 6, 3]])
    whole = build_student(teacher, num_layers=4)
    assert torch.equal(whole(input_ids=ids).logits, teacher(input_ids=ids).logits)
    student = build_student(teacher, num_layers=2)
    shown = [model(input_ids=ids, output_hidden_states=True).hidden_states for model in (student, teacher)]
    assert [len(states) for states in shown] == [3, 5]
    torch.testing.assert_close(shown[0][0], shown[1][0])  # the embeddings
    if family not in ("ModernBertConfig", "Qwen2Config", "LlamaConfig"):  # which end with a norm
        torch.testing.assert_close(shown[0][1], shown[1][1])  # layer 0 seeds layer 0

    args = DistillationConfig(
        output_dir=str(folder), max_steps=3, hidden_weight=1.0, relation_weight=1.0, hard_weight=1.0,
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(), processing_class=tokenizer
    )
    trainer.train()
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert all(0 < loss < 100 for loss in logs)
    tokenizer.model_max_length = 32
    trainer.save_model(str(folder / family))
    logits = student.eval()(input_ids=ids).logits
    (folder / family / "expected.json").write_text(json.dumps(logits.tolist()))


def test_every_student_loads_without_this_package(folder):
    """One process that never imports distill reads all of them, and classifies with `pipeline`."""
    saved = sorted(path.name for path in folder.iterdir() if (path / "expected.json").is_file())
    if not saved:
        pytest.skip("the students come from the tests above")
    code = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForSequenceClassification, pipeline
ids = torch.tensor([[2, 7, 8, 9, 10, 3], [2, 9, 12, 5, 6, 3]])
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = torch.tensor(json.loads((folder / "expected.json").read_text()))
    assert torch.equal(model(input_ids=ids).logits, expected), folder
    assert pipeline("text-classification", str(folder))("a good film", truncation=True)[0]["score"] > 0
assert "distill" not in sys.modules
print("read", len(sys.argv) - 1)
"""
    command = [sys.executable, "-c", code, *(str(folder / name) for name in saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert f"read {len(saved)}" in done.stdout, done.stderr


def test_an_albert_learns_from_scratch(tmp_path):
    """Its blocks share weights, so none can be dropped; but any of its states can be compared."""
    teacher = make("BertConfig")
    config = transformers.AlbertConfig(**{**SIZES, "num_hidden_layers": 2}, embedding_size=16)
    student = fresh_model(transformers.AlbertForSequenceClassification, config)
    with pytest.raises(InputError, match="don't stand in one ModuleList"):
        build_student(student, num_layers=1)
    args = DistillationConfig(
        output_dir=str(tmp_path), max_steps=2, hidden_weight=1.0, save_strategy="no", disable_tqdm=True
    )
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(), processing_class=make_tokenizer()
    ).train()
    assert any(
        not torch.equal(weight, before[name]) for name, weight in student.state_dict().items() if "albert_layer" in name
    )


@pytest.mark.parametrize("family", ["ViTConfig", "DeiTConfig"])
def test_a_vision_transformer_is_cut(family):
    config = getattr(transformers, family)(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    config.architectures = [family.replace("Config", "ForImageClassification")]
    teacher = AutoModelForImageClassification.from_config(config).eval()
    student = build_student(teacher, num_layers=2)
    pixels = torch.randn(2, 3, 8, 8)
    shown = [model(pixel_values=pixels, output_hidden_states=True).hidden_states for model in (student, teacher)]
    torch.testing.assert_close(shown[0][1], shown[1][1])
    FeatureExtractor(student, [FeatureSpec(relations=(2,))])(
        {"pixel_values": pixels, "attention_mask": torch.ones(2, shown[0][0].shape[1])}
    )


# --- narrower students ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["BertConfig", "RobertaConfig", "MPNetConfig"])
def test_dropped_neurons_are_those_that_do_nothing(family):
    """Where half of the neurons have no outgoing weight, half a network computes what the whole did."""
    teacher = make(family)
    blocks = next(
        module for module in teacher.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4
    )
    with torch.no_grad():
        for block in blocks:
            block.output.dense.weight[:, torch.randperm(64)[:32]] = 0
    student = build_student(teacher, num_layers=4, width=Width(intermediate_size=32))
    assert student.config.intermediate_size == 32
    ids = torch.tensor([[2, 7, 8, 9, 10, 3]])
    torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_narrow_distilbert_of_a_bert():
    student = build_student(
        make("BertConfig"), student_arch="distilbert", num_layers=2, width=Width(intermediate_size=16)
    )
    assert student.config.hidden_dim == 16
    assert student.distilbert.transformer.layer[0].ffn.lin1.weight.shape == (16, 32)


def test_another_hidden_size_is_freshly_initialised_and_said(caplog):
    teacher = make("BertConfig")
    student = build_student(teacher, num_layers=2, width=Width(hidden_size=16, num_attention_heads=2))
    assert (student.config.hidden_size, student.config.num_attention_heads) == (16, 2)
    assert student.bert.embeddings.word_embeddings.weight.shape == (25, 16)
    assert "freshly initialised" in caplog.text
    assert student.config.id2label == teacher.config.id2label


@pytest.mark.parametrize(
    ("family", "width", "message"),
    [
        ("BertConfig", {"hidden_size": 30}, "4 heads don't divide a hidden size of 30"),
        ("BertConfig", {"intermediate_size": 65}, "65 is more than the teacher's 64"),
        ("ModernBertConfig", {"intermediate_size": 32}, "not two plain linear"),
        ("GPT2Config", {"intermediate_size": 32}, "gpt2 has no such size"),
    ],
)
def test_sizes_that_cannot_be_are_refused(family, width, message):
    with pytest.raises(InputError, match=message):
        build_student(make(family), num_layers=2, width=Width(**width))


def test_a_first_layer_that_differs_is_told():
    with pytest.raises(InputError, match="cannot stand in this order"):
        build_student(make("ModernBertConfig"), layers=[1, 3])
