"""Training in bfloat16, the default on hardware that has it: the same losses, caches, checkpoints and folders."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from distill import (
    DistillationConfig,
    DistillationTrainer,
    build_student,
    load_data,
    quantize_model,
)
from distill.common.records import read_record
from distill.compression.quantization.formats import QuantizationSettings
from distill.data.load import DataOptions
from distill.evaluation.evaluate import evaluate_model
from distill.losses import contrastive_loss
from distill.models.load import load_tokenizer
from distill.recipes.check import print_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from distill.training.config import PARTS, TrainingConfig
from tests.conftest import make_tokenizer, tiny_bert
from tests.training.test_cache import SGD, count_forwards, losses
from tests.training.test_cache import make_trainer as make_cached
from tests.training.test_exactness import make_rows, relative_difference, train, whole_step

pytestmark = pytest.mark.bf16

CASES = (
    *("soft", "hard", "hidden", "embedding", "attention", "relation", "contrastive", "every part"),
    *("quantization-aware", "regression", "label sets", "tokens", "spans", "masked", "causal", "images"),
    "two tokenizers",
)


def config(folder, **options):
    return DistillationConfig(output_dir=str(folder), disable_tqdm=True, logging_steps=1, **options)


def test_bf16_is_on_by_default_here(tmp_path):
    assert TrainingConfig(output_dir=str(tmp_path)).mixed_precision == "bf16"


@pytest.mark.parametrize("case", CASES)
def test_a_step_and_an_evaluation_are_those_of_float32_to_rounding(tmp_path, case):
    """bfloat16 keeps 8 bits: a part in 256 a value, and less in their sums."""
    gradients, log = whole_step(case)
    in_bf16, log_in_bf16 = train(tmp_path, case, bf16=None)
    assert 1e-4 < relative_difference(gradients, in_bf16) < 0.03
    assert log_in_bf16.keys() == log.keys()
    for name, value in log.items():
        assert log_in_bf16[name] == pytest.approx(value, rel=0.02, abs=1e-4), name


def test_a_row_is_no_negative_of_itself_after_rounding():
    """Its state among the negatives was computed in another batch and attention (5e-5 apart was seen)."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(4, 64, generator=generator) for _ in range(2))
    others = torch.randn(8, 64, generator=generator)
    again = teacher * (1 + 0.007 * torch.randn(4, 64, generator=generator))
    assert (1 - torch.cosine_similarity(teacher, again)).max() > 2e-5
    alone = contrastive_loss(student, teacher, others, 0.1)
    for row in range(4):
        one = slice(row, row + 1)
        with_itself = contrastive_loss(student[one], teacher[one], torch.cat([others, again[one]]), 0.1)
        assert with_itself == contrastive_loss(student[one], teacher[one], others, 0.1)
    assert alone > 0


@pytest.mark.parametrize(("case", "what"), [("soft", "logits"), ("hidden", "hidden"), ("relation", "relations")])
def test_cached_and_live_teachers_give_the_same_training(tmp_path, monkeypatch, case, what):
    trained = [make_cached(tmp_path, case, 16, bf16=None, cache_teacher=cache, **SGD) for cache in ("none", what, what)]
    for trainer in trained[:2]:
        trainer.train()
    np.testing.assert_allclose(losses(trained[1]), losses(trained[0]), rtol=0.02)
    calls = count_forwards(monkeypatch)
    trained[2].train()
    assert not calls
    assert losses(trained[2]) == losses(trained[1])


def test_bf16_and_float32_have_a_cache_each(tmp_path):
    for bf16 in (None, False):
        make_cached(tmp_path, "soft", 16, bf16=bf16, cache_teacher="logits").train()
    assert len([each for each in (tmp_path / "cache").iterdir() if each.name != ".locks"]) == 2


@pytest.mark.parametrize("options", [{"hidden_weight": 0.5, "relation_weight": 0.5}, {"qat": "int8"}])
def test_a_resumed_run_ends_the_same_and_saves_float32(tmp_path, options):
    def make(folder):
        args = config(folder, max_steps=4, save_steps=2, save_total_limit=None, learning_rate=1e-3, **options,
                      per_device_train_batch_size=4)  # fmt: skip
        return DistillationTrainer(
            model=build_student(tiny_bert(), num_layers=2), teacher=tiny_bert(), args=args, train_dataset=make_rows(),
            eval_dataset=make_rows(), processing_class=make_tokenizer(),
        )  # fmt: skip

    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    weights = whole.student.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.student.state_dict().items())
    whole.save_model(tmp_path / "student")
    saved = load_file(tmp_path / "student" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    batch = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, whole.student.eval()(**batch).logits)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_what_qat_evaluates_is_what_quantizing_leaves(tmp_path, format):
    """Its loss in bfloat16 is the quantized model's, and nearer to it than the float model's is."""
    teacher, rows = tiny_bert(), make_rows()
    student = build_student(teacher, num_layers=2)
    args = config(tmp_path, max_steps=2, save_strategy="no", qat=format, learning_rate=1e-3, soft_loss="mse")
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=rows, processing_class=make_tokenizer()
    )
    trainer.train()
    found = torch.from_numpy(trainer.predict(rows).predictions)
    batch = make_tokenizer().pad(list(rows.remove_columns(["length", "labels"])), return_tensors="pt")
    quantized = quantize_model(copy.deepcopy(student), QuantizationSettings(format=format))
    with torch.no_grad():
        expected, exact = quantized(**batch).logits.float(), student.eval()(**batch).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    if format == "nf4":  # int8 rounds by less than bfloat16 does
        assert (found - expected).norm() < 0.5 * (exact - expected).norm()


def test_a_recipe_is_checked_run_and_reported(tmp_path, pretrained, sst2_folder, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {sst2_folder}, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 48, learning_rate: 2e-3, per_device_train_batch_size: 8}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 24, learning_rate: 1e-3, hidden_weight: 0.1}}
  small: {{run: quantize, model: student, format: nf4}}
""")
    plan = make_plan(load_recipe(path))
    print_plan(plan)
    run_plan(plan)
    assert "cpu, bf16" in capsys.readouterr().err
    record = read_record(tmp_path / "run" / "student")
    assert record["options"]["bf16"] is True
    assert record["options"]["learning_rate"] == 1e-3
    write_report(plan)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    scores = {model["name"]: model["metrics"]["accuracy"] for model in report["models"]}
    assert min(scores.values()) > 0.9, scores
    data = load_data("sst2", DataOptions(path=str(sst2_folder), max_length=24))
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    found = evaluate_model(student, load_tokenizer(str(tmp_path / "run" / "student"), 24), data)
    assert found.metrics["accuracy"] == scores["student"]


def test_every_weight_has_a_case():
    assert set(PARTS) <= set(CASES)
