"""Every verb and every loss on a GPU: what it makes there is what it makes on the CPU, or close to it."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from distill import DistillationConfig, DistillationTrainer
from distill.common.hardware import compute_device
from distill.recipes.plan import make_plan
from distill.runs.run import run_plan
from distill.training.config import PARTS
from tests.conftest import make_tokenizer, tiny_bert
from tests.verbs.test_pairs import STEPS, recipe_of, written
from tests.verbs.test_trim_step import word_pieces

pytestmark = pytest.mark.gpu


def test_every_verb_runs_and_reloads(tmp_path, sst2_folder):
    tokenizer, start = word_pieces(), tmp_path / "start"
    model = tiny_bert(num_hidden_layers=3, intermediate_size=128, initializer_range=0.1, vocab_size=len(tokenizer))
    model.config.id2label = {0: "negative", 1: "positive"}
    model.config.label2id = {"negative": 0, "positive": 1}
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    steps = {name: written(name, str(start)) for name in STEPS}
    steps |= {"fast": f"{{run: prune, model: {start}, speedup: 1.2, calibration_rows: 20, sequence_length: 16}}"}
    plan = make_plan(recipe_of(tmp_path, sst2_folder, steps, start))
    run_plan(plan)
    device = compute_device()
    for name, planned in plan.steps.items():
        record = json.loads((planned.folder / "step.json").read_text())
        assert record["status"] == "finished", name
        assert record["device"] in (None, device.type), name
        if not planned.plan.is_adapter:
            loaded = AutoModelForSequenceClassification.from_pretrained(planned.folder).to(device).eval()
            with torch.inference_mode():
                assert loaded(torch.arange(5, 21, device=device)[None]).logits.isfinite().all(), name


@pytest.mark.parametrize("part", PARTS)
def test_every_loss_is_that_of_the_cpu(part, tmp_path):
    rows = Dataset.from_list(
        [{"input_ids": [2, *range(5, 9 + row % 5), 3], "labels": row % 2} for row in range(40)]
    ).map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    losses = []
    for use_cpu in (True, False):
        torch.manual_seed(0)
        teacher, student = tiny_bert(num_hidden_layers=2), tiny_bert(num_hidden_layers=2)
        weights = {f"{each}_weight": float(each == part) for each in PARTS}
        args = DistillationConfig(
            output_dir=str(tmp_path / str(use_cpu)),
            use_cpu=use_cpu, bf16=False, max_steps=2, per_device_train_batch_size=8, logging_steps=1, report_to=[],
            cache_teacher="none", disable_tqdm=True, **weights,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=student, teacher=teacher, args=args, train_dataset=rows, processing_class=make_tokenizer()
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
