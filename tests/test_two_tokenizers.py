"""A teacher and a student of different families, each with a tokenizer of its own."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, RobertaConfig

from distill.check import print_plan
from distill.errors import InputError
from distill.evaluation import evaluate_model
from distill.models import load_tokenizer
from distill.pipeline import run_plan
from distill.plan import make_plan
from distill.recipe import load_recipe
from distill.report import write_report
from tests.conftest import sentences

RECIPE = """
task: sst2
output_dir: {folder}/run
data: {{path: {data}, max_length: 32}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {roberta}, from_scratch: true, max_steps: 80, learning_rate: 2e-3}}
  student: {{run: distill, teacher: teacher, model: {bert}, num_layers: 2, max_steps: 60, learning_rate: 2e-3{more}}}
"""


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A RoBERTa's config, and a byte-level tokenizer trained on the rows' words."""
    folder = tmp_path_factory.mktemp("roberta")
    backend = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator([row["sentence"] for row in sentences(200)], vocab_size=320, special_tokens=special)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    RobertaConfig(vocab_size=backend.get_vocab_size(), max_position_embeddings=66, **sizes).save_pretrained(folder)
    return folder


def plan_of(tmp_path, sst2_folder, pretrained, roberta, more="", overrides=None):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, data=sst2_folder, roberta=roberta, bert=pretrained, more=more))
    return make_plan(load_recipe(path, overrides, draft=True))


def test_whole_rows_are_compared(tmp_path, sst2_folder, pretrained, roberta, capsys):
    more = ", contrastive_weight: 0.1, eval_strategy: steps, eval_steps: 60, bf16: false"
    made = plan_of(tmp_path, sst2_folder, pretrained, roberta, more)
    print_plan(made)  # times a few batches with random models
    run_plan(made)
    assert re.search(r"step 60/\d+, validation: loss \d.*, accuracy \d", capsys.readouterr().err)
    by_name = {model["name"]: model for model in write_report(made)["models"]}
    assert by_name["teacher"]["metrics"]["accuracy"] > 0.9
    assert by_name["student"]["agreement"] > 0.9

    # The loss of an evaluation is against the teacher on tokens of its own too.
    folders = [made.steps[name].folder for name in ("student", "teacher")]
    student, teacher = (
        np.array(
            evaluate_model(
                AutoModelForSequenceClassification.from_pretrained(folder), load_tokenizer(str(folder)), made.data
            ).logits
        )
        for folder in folders
    )
    log = json.loads((folders[0] / "step.json").read_text())["log"]
    found = [line["eval_loss/soft"] for line in log if "eval_loss/soft" in line]
    assert found[-1] == pytest.approx(np.square(student - teacher).mean(), rel=1e-3)


def test_cached_and_live_teachers_teach_the_same(tmp_path, sst2_folder, pretrained, roberta):
    weights = []
    for how in ("none", "logits"):
        (tmp_path / how).mkdir()
        short = {"teacher.max_steps": "5", "student.max_steps": "3"}
        more = f", bf16: false, cache_teacher: {how}"
        made = plan_of(tmp_path / how, sst2_folder, pretrained, roberta, more, short)
        run_plan(made)
        weights.append(AutoModelForSequenceClassification.from_pretrained(made.steps["student"].folder).state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", ["hidden_weight", "attention_weight", "relation_weight", "embedding_weight"])
def test_what_compares_token_with_token_is_refused(tmp_path, sst2_folder, pretrained, roberta, part):
    with pytest.raises(
        InputError, match=f"{part}: compares token with token, but student and teacher have a tokenizer each"
    ):
        plan_of(tmp_path, sst2_folder, pretrained, roberta, f", {part}: 1.0")
