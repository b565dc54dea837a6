"""A teacher and a student of different families, each with a tokenizer of its own."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from distill import DistillationConfig, DistillationTrainer, build_student, trim_vocabulary
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_model
from distill.models.load import load_tokenizer
from distill.recipes.check import print_plan
from distill.recipes.dry_run import runnable_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from distill.verbs.training.train import read_rows
from tests.compression.test_vocabulary import OTHERS, TEXTS, model_of, tokenizer_of
from tests.conftest import make_tokenizer, sentences, tiny_bert, write_rows

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
    by_name = {model["name"]: model for model in asdict(write_report(made))["models"]}
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


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Rows of two sentences, a BERT, and a DistilBERT whose tokenizer is BERT's but for the token types."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"sentence1": a["sentence"], "sentence2": b["sentence"], "label": a["label"]} for a, b in zip(
        sentences(24), sentences(24, seed=3), strict=True)]  # fmt: skip
    for split in ("train", "validation"):
        write_rows(folder / "rows" / f"{split}.jsonl", rows)
    bert = tiny_bert(seed=4)
    models = {"bert": bert, "distilbert": build_student(tiny_bert(seed=5), student_arch="distilbert")}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer = make_tokenizer()
        if name == "distilbert":
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.save_pretrained(folder / name)
    return folder


def options_for(folder, **more):
    return DistillationConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        save_strategy="no",
        **more,
    )


@pytest.mark.parametrize("first", ["bert", "distilbert"])
@pytest.mark.parametrize("cache", ["none", "logits"])
def test_a_bert_reads_token_types_beside_a_distilbert_whoever_came_first(pairs, first, cache, tmp_path):
    options = DataOptions(kind="classification", path=str(pairs / "rows"), text=["sentence1", "sentence2"])
    data = load_data(None, options)
    data.tokenized("train", load_tokenizer(str(pairs / first), data.max_length))
    rows = read_rows(data, str(pairs / "distilbert"), [str(pairs / "bert")])
    assert "token_type_ids" not in rows.train.column_names
    assert {type for row in rows.train["teacher1_token_type_ids"] for type in row} == {0, 1}

    bert = AutoModelForSequenceClassification.from_pretrained(pairs / "bert").eval()
    student = AutoModelForSequenceClassification.from_pretrained(pairs / "distilbert")
    args = options_for(tmp_path, hidden_weight=1.0, cache_teacher="none" if cache == "none" else "hidden")
    trainer = DistillationTrainer(
        model=student, teacher=bert, args=args, train_dataset=rows.train, eval_dataset=rows.validation,
        processing_class=rows.processor,
    )  # fmt: skip
    trainer.cache_teachers()
    numbers = [3, 0, 7]
    batch = trainer.rows.completed(trainer.batch_reader()(numbers, 0))
    logits, _ = trainer.teachers[0].outputs(batch)
    chosen = data.splits["train"].select(numbers)
    encoded = load_tokenizer(str(pairs / "bert"))(
        list(chosen["sentence1"]), list(chosen["sentence2"]), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(logits, bert(**encoded).logits, atol=1e-5, rtol=0)
        without = bert(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    assert not torch.allclose(without, logits, atol=1e-2)
    assert "eval_loss/soft" in trainer.evaluate()


def test_a_teacher_that_is_given_no_token_types_reads_none_beside_a_bert(pairs, tmp_path):
    (tmp_path / "teacher").mkdir()
    AutoModelForSequenceClassification.from_pretrained(pairs / "bert").save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(pairs / "distilbert")).save_pretrained(tmp_path / "teacher")
    options = DataOptions(kind="classification", path=str(pairs / "rows"), text=["sentence1", "sentence2"])
    rows = read_rows(load_data(None, options), str(pairs / "bert"), [str(tmp_path / "teacher")])
    assert {type for row in rows.train["token_type_ids"] for type in row} == {0, 1}
    assert {type for row in rows.train["teacher1_token_type_ids"] for type in row} == {0}
    distilbert = read_rows(load_data(None, options), str(pairs / "bert"), [str(pairs / "distilbert")])
    trainer = DistillationTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(pairs / "bert"),
        teacher=AutoModelForSequenceClassification.from_pretrained(pairs / "distilbert"),
        args=options_for(tmp_path), train_dataset=distilbert.train, eval_dataset=distilbert.validation,
        processing_class=distilbert.processor,
    )  # fmt: skip
    assert "eval_loss/soft" in trainer.evaluate()


def test_hidden_states_of_a_bert_and_a_distilbert_with_its_vocabulary_are_compared(pairs, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
output_dir: {tmp_path}/run
data: {{kind: classification, path: {pairs}/rows, text: [sentence1, sentence2]}}
steps:
  teacher: {{run: finetune, model: {pairs}/bert, max_steps: 1}}
  student: {{run: distill, teacher: teacher, model: {pairs}/distilbert, hidden_weight: 1.0, max_steps: 1}}
""")
    assert make_plan(load_recipe(path, {"data.max_length": "32"})).steps["student"].plan.layer_pairs


# --- a vocabulary that was trimmed ------------------------------------------------------------------------------------

TRIMMED = """
output_dir: {folder}/{how}
data: {{kind: {kind}, path: {rows}, text: {text}, max_length: 64{data}}}
steps:
  student: {{run: distill, teacher: {folder}/teacher, model: {folder}/{model}, layer_map: uniform, max_steps: 3,
             bf16: false, per_device_train_batch_size: 8, cache_teacher: {how}, {more}}}
"""


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory):
    """A teacher, and students with most and with the least of its vocabulary; rows of pairs of texts."""
    folder = tmp_path_factory.mktemp("trimmed")
    tokenizer = tokenizer_of("bert")
    teacher = model_of("bert", tokenizer)
    given = {"teacher": (teacher, tokenizer)}
    given["student"] = trim_vocabulary(model_of("bert", tokenizer), tokenizer, TEXTS, vocab_size=240)
    given["bare"] = trim_vocabulary(model_of("bert", tokenizer), tokenizer, TEXTS, min_count=10**6)
    for name, (model, its) in given.items():
        model.save_pretrained(folder / name)
        its.save_pretrained(folder / name)
    rows = [{"a": a, "b": b, "label": f"LABEL_{number % 3}"} for number, (a, b) in enumerate(zip(
        OTHERS[:60], OTHERS[60:120], strict=True))]  # fmt: skip
    for split in ("train", "validation"):
        write_rows(folder / "rows" / f"{split}.jsonl", rows)
    return folder


def planned(
    folder, how="none", model="student", kind="classification", text="[a, b]", data="", more="hidden_weight: 1"
):
    path = folder / "recipe.yaml"
    path.write_text(TRIMMED.format(
        folder=folder, rows=folder / "rows", how=how, model=model, kind=kind, text=text, data=data, more=more,
    ))  # fmt: skip
    return runnable_plan(load_recipe(path, draft=True))


def test_a_student_with_a_trimmed_vocabulary_learns_tokens_of_the_rows_that_both_read_alike(trimmed, capsys):
    more = "hidden_weight: 1, relation_weight: 0.5, embedding_weight: 0.5, optim: sgd"
    weights, records = [], []
    for how in ("none", "relations"):
        made = planned(trimmed, how, data=", sampled_pairs: 20", more=more)
        if how == "none":
            print_plan(made)
            checked = " ".join(capsys.readouterr().out.split())
        run_plan(made)
        weights.append(AutoModelForSequenceClassification.from_pretrained(made.steps["student"].folder).state_dict())
        records.append(json.loads((made.steps["student"].folder / "step.json").read_text()))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)

    tokenizers = [load_tokenizer(str(trimmed / name)) for name in ("student", "teacher")]
    train = [dict(row) for split in ("train", "unlabelled") for row in made.data.splits[split]]
    read = [[each.tokenize(row["a"], row["b"]) for row in train] for each in tokenizers]
    left_out = sum(ours != theirs for ours, theirs in zip(*read, strict=True))
    assert (len(train), 10 < left_out < 75) == (80, True)
    told = {f"{trimmed}/teacher": {"rows": 80, "left_out": left_out}}
    assert [record["other_tokens"] for record in records] == [told, told]
    said = f"losses that compare token with token leave out {left_out} of 80 training rows"
    assert said in checked
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("part", ["hidden", "attention", "relation", "embedding"])
def test_two_that_read_hardly_a_row_alike_are_refused(trimmed, part):
    message = f"{part}_weight: compares token with token, but student and teacher have a tokenizer each"
    with pytest.raises(InputError, match=message):
        planned(trimmed, model="bare", more=f"{part}_weight: 1")


def test_predictions_of_whole_rows_need_no_token_to_be_the_same(trimmed):
    made = planned(trimmed, model="bare", more="contrastive_weight: 0.1")
    run_plan(made)
    assert json.loads((made.steps["student"].folder / "step.json").read_text())["other_tokens"] is None


def test_language_models_learn_from_the_trimmed_teacher(tmp_path):
    tokenizer = tokenizer_of("bert")
    teacher = model_of("bert", tokenizer, AutoModelForMaskedLM)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    write_rows(tmp_path / "rows" / "train.jsonl", [{"text": text} for text in OTHERS])
    small, its = trim_vocabulary(teacher, tokenizer, TEXTS, vocab_size=240)
    small.save_pretrained(tmp_path / "words")
    its.save_pretrained(tmp_path / "words")
    with pytest.raises(InputError, match=r"or say teacher: .*/words if that has its trimmed vocabulary"):
        planned(tmp_path, model="words", kind="masked-lm", text="[text]")
    with pytest.raises(InputError, match="a student with a trimmed vocabulary learns from the trimmed teacher"):
        DistillationTrainer(model=small, teacher=teacher, args=options_for(tmp_path / "run"))
