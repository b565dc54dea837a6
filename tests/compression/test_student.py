import json

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    Qwen2Config,
)

from distill.compression.student import build_student, choose_layers, student_config
from distill.errors import InputError
from distill.recipes.check import print_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from tests.conftest import tiny_bert

IDS = torch.tensor([[2, 5, 9, 14, 3, 0, 0], [2, 6, 7, 8, 9, 10, 3]])
MASK = (IDS > 0).long()


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),  # DistilBERT's choice
        (6, 3, [0, 2, 5]),
        (4, 4, [0, 1, 2, 3]),
        (4, 1, [0]),
        (12, None, list(range(12))),
    ],
)
def test_uniform_layers(teacher, student, expected):
    assert choose_layers("uniform", student, teacher) == expected


@pytest.mark.parametrize(
    ("layers", "num_layers", "message"),
    [
        ([0, 4], None, r"\[0, 4\] is out of range; the model has layers 0 to 3"),
        ([], None, "out of range"),
        ([0, 1], 3, "names 2"),
        ("uniform", 5, "the model has 4 layers"),
        ("uniform", 0, "out of range"),
    ],
)
def test_wrong_layers_are_refused(layers, num_layers, message):
    with pytest.raises(InputError, match=message):
        choose_layers(layers, num_layers, 4)


def test_a_student_of_the_same_family_has_the_chosen_layers(bert):
    student = build_student(bert, layers=[3, 1])
    assert student.config.num_hidden_layers == 2
    weights = student.state_dict()
    for name, weight in bert.state_dict().items():
        if ".layer.3." in name:
            assert torch.equal(weights[name.replace(".layer.3.", ".layer.0.")], weight)
        elif ".layer.1." in name or ".layer." not in name:
            assert torch.equal(weights[name], weight)


def test_the_student_does_not_share_memory_with_the_teacher(bert):
    student = build_student(bert, num_layers=4)
    with torch.no_grad():
        student.classifier.weight.zero_()
    assert bert.classifier.weight.abs().sum() > 0


def test_distilbert_with_all_layers_gives_the_teachers_hidden_states(bert):
    student = build_student(bert, student_arch="distilbert")
    with torch.no_grad():
        theirs = bert(IDS, MASK, output_hidden_states=True).hidden_states
        ours = student(IDS, MASK, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 5
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our[MASK.bool()], their[MASK.bool()], atol=1e-5, rtol=0)


def test_distilbert_takes_the_head_and_every_weight(bert):
    student = build_student(bert, student_arch="distilbert", num_layers=2)
    assert torch.equal(student.classifier.weight, bert.classifier.weight)
    assert torch.equal(student.pre_classifier.weight, bert.bert.pooler.dense.weight)
    assert torch.equal(
        student.distilbert.transformer.layer[1].ffn.lin2.weight, bert.bert.encoder.layer[3].output.dense.weight
    )
    assert student.config.id2label == bert.config.id2label


def test_distilbert_from_another_family_is_refused():
    distilbert = build_student(tiny_bert(), student_arch="distilbert")
    with pytest.raises(InputError, match="needs a BERT teacher; this one is distilbert"):
        build_student(distilbert, student_arch="distilbert")


@pytest.mark.parametrize("student_arch", ["same", "distilbert"])
def test_a_student_reloads_as_an_ordinary_model(bert, student_arch, tmp_path):
    student = build_student(bert, student_arch=student_arch, num_layers=2).eval()
    student.save_pretrained(tmp_path)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(reloaded(IDS, MASK).logits, student(IDS, MASK).logits)


@pytest.mark.parametrize(
    ("more", "said", "layers"),
    [
        ("intermediate_size: 32", "source layers 0, 3", [0, 3]),
        ("hidden_size: 16, num_attention_heads: 2", "new weights", None),
        ("model: {model}, from_scratch: true", "new weights", None),
    ],
)
def test_a_recipe_says_where_the_weights_of_a_student_come_from(
    more, said, layers, tmp_path, pretrained, sst2_folder, capsys
):
    path = tmp_path / "narrow.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {sst2_folder}, max_length: 32}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 2}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 2, {more.format(model=pretrained)}}}
""")
    made = make_plan(load_recipe(path))
    print_plan(made)
    assert said in capsys.readouterr().out
    run_plan(made)
    assert f"student: distill\n      {said}" in capsys.readouterr().err
    folder = tmp_path / "run" / "student"
    assert json.loads((folder / "step.json").read_text())["layers"] == layers
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    assert all(getattr(config, name) == size for name, size in sizes.items() if name in more)
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("num_layers: 2", "its blocks don't stand in one ModuleList, so no layers can be chosen"),
        ("model: teacher, relation_weight: 1.0", "its blocks don't stand in one ModuleList"),
    ],
)
def test_what_cannot_be_cut_is_told_before_the_teacher_is_trained(tmp_path, sst2_folder, tokenizer, more, message):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    AlbertModel(AlbertConfig(vocab_size=25, embedding_size=16, **sizes)).save_pretrained(tmp_path / "albert")
    tokenizer.save_pretrained(tmp_path / "albert")
    path = tmp_path / "r.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {sst2_folder}, max_length: 32}}
steps:
  teacher: {{run: finetune, model: {tmp_path / "albert"}, max_steps: 2}}
  student: {{run: distill, teacher: teacher, max_steps: 2, {more}}}
""")
    with pytest.raises(InputError, match=message):
        make_plan(load_recipe(path))


def test_neurons_that_cannot_be_cut_are_told_before_the_teacher_is_trained(tmp_path, sst2_folder, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=25, **sizes)).save_pretrained(tmp_path / "square")  # which axis are neurons?
    tokenizer.save_pretrained(tmp_path / "square")
    path = tmp_path / "r.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {sst2_folder}, max_length: 32}}
steps:
  teacher: {{run: finetune, model: {tmp_path / "square"}, max_steps: 2}}
  student: {{run: distill, teacher: teacher, intermediate_size: 16, max_steps: 2}}
""")
    with pytest.raises(InputError, match="intermediate_size: the feed-forward network"):
        make_plan(load_recipe(path))


def test_only_lists_of_layers_are_cut_with_them():
    """DeBERTa's `pos_att_type` has as many entries as this model has layers."""
    config = DebertaV2Config(
        vocab_size=25, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        pos_att_type=["p2c", "c2p"], relative_attention=True,
    )  # fmt: skip
    assert student_config(config, "same", [1]).pos_att_type == ["p2c", "c2p"]
    layered = Qwen2Config(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert student_config(layered, "same", [1, 2]).layer_types == ["sliding_attention", "full_attention"]


def test_a_student_of_a_student_can_be_cut_again(bert):
    distilbert = build_student(bert, student_arch="distilbert")
    assert build_student(distilbert, num_layers=2).config.num_hidden_layers == 2
    assert isinstance(build_student(build_student(bert, num_layers=3), num_layers=1), BertForSequenceClassification)
