"""What makes training fast must not change what is trained, and must be undone."""

import copy
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from distill import DistillationConfig, DistillationTrainer
from distill.common.hardware import (
    allocator,
    available_cores,
    freed_memory_kept,
    has_bf16,
)
from distill.compression.student import dropout
from distill.models.modes import fast_attention
from distill.runs.run import run_plan
from distill.training.config import TrainingConfig
from tests.conftest import make_tokenizer, tiny_bert
from tests.runs.test_run import plan, write_recipe
from tests.training.test_exactness import make_models, make_rows, only, relative_difference


def train(folder, student=None, teacher=None, callbacks=(), count=24, **options):
    made_teacher, made_student = make_models()
    student, teacher = student or made_student, teacher or made_teacher
    args = DistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True,
        **{"max_steps": 4, "learning_rate": 1e-3, "cache_teacher": "none", "bf16": False, **options},
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(count=count), callbacks=list(callbacks),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


class Watch(TrainerCallback):
    """What holds while the model is trained."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.dropout = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        self.attention = model.config._attn_implementation


def test_bf16_follows_the_hardware_and_an_explicit_word_stands(tmp_path, monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr("distill.training.config.has_bf16", lambda device, supported=supported: supported)
        assert DistillationConfig(output_dir=str(tmp_path)).bf16 is supported
        assert TrainingConfig(output_dir=str(tmp_path), bf16=False).bf16 is False
        assert TrainingConfig(output_dir=str(tmp_path), bf16=True).bf16 is True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # a launcher's word is weaker than an explicit one
    assert TrainingConfig(output_dir=str(tmp_path), bf16=False).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert TrainingConfig(output_dir=str(tmp_path)).mixed_precision == "fp16"
    assert isinstance(has_bf16("cpu"), bool)
    assert has_bf16("mps") is False


def test_the_teacher_computes_in_the_precision_of_the_training(tmp_path):
    """Accelerate's autocast covers the student's forward alone; a teacher called beside it would be in float32."""
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        teacher, _ = make_models()
        seen = set()
        teacher.bert.encoder.layer[0].output.dense.register_forward_hook(lambda m, i, o, seen=seen: seen.add(o.dtype))
        train(tmp_path, teacher=teacher, bf16=bf16)
        assert seen == {expected}


def test_attention_and_dropout_are_the_models_own_again(tmp_path):
    teacher = tiny_bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    student = copy.deepcopy(teacher)
    watch = Watch()
    train(tmp_path, student, teacher, [watch])
    assert watch.dropout == {0.0}
    assert watch.attention == ("eager" if not torch.cuda.is_available() else "sdpa")
    assert {module.p for module in student.modules() if isinstance(module, nn.Dropout)} == {0.1, 0.2}
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    train(tmp_path, student, teacher, [watch], dropout=None)
    assert watch.dropout == {0.1, 0.2}
    train(tmp_path, student, teacher, [watch], dropout=0.3)
    assert watch.dropout == {0.3}


def test_dropout_reaches_models_that_keep_it_as_a_number():
    module = nn.Module()
    module.attention_dropout, module.dropout_name, module.drop = 0.1, "x", nn.Dropout(0.2)
    with dropout(module, 0.0):
        assert (module.attention_dropout, module.drop.p) == (0.0, 0.0)
    assert (module.attention_dropout, module.dropout_name, module.drop.p) == (0.1, "x", 0.2)


def test_long_rows_keep_the_attention_that_saves_memory():
    model = tiny_bert()
    with fast_attention([model], 129, torch.device("cpu")):
        assert model.config._attn_implementation == "sdpa"
    with fast_attention([model], 128, torch.device("cpu")):
        assert model.config._attn_implementation == "eager"
    with fast_attention([model], 128, torch.device("cuda")):
        assert model.config._attn_implementation == "sdpa"


def test_frozen_embeddings_stay_and_the_rest_learns(tmp_path):
    teacher, student = make_models()
    before = copy.deepcopy(student.state_dict())
    train(tmp_path, student, teacher, freeze_embeddings=True)
    after = student.state_dict()
    assert torch.equal(
        before["bert.embeddings.word_embeddings.weight"], after["bert.embeddings.word_embeddings.weight"]
    )
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


@pytest.mark.parametrize("case", ["soft", "hidden", "relation"])
def test_gradient_checkpointing_changes_no_weight(tmp_path, case):
    weights = []
    for checkpointing in (False, True):
        trainer = train(tmp_path, gradient_checkpointing=checkpointing, **only(case))
        weights.append(trainer.student.state_dict())
    assert relative_difference(*weights) < 1e-6


def test_a_token_budget_trains_on_every_row(tmp_path):
    seen = []

    class Rows(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    trainer = train(tmp_path, max_tokens_per_batch=40, max_steps=-1, num_train_epochs=2, callbacks=[Rows()])
    per_epoch = len(trainer.get_train_dataloader())
    assert len(seen) == 2 * per_epoch
    assert trainer.state.epoch == 2
    for batch in trainer.get_train_dataloader():
        assert batch["input_ids"].numel() <= 40


def test_a_profile_adds_up(tmp_path, pretrained, sst2_folder):
    steps = "\n  teacher: {{run: finetune, model: {pretrained}, max_steps: 2}}"
    steps += "\n  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 12, cache_teacher: none}}\n"
    path = write_recipe(tmp_path / "profile", pretrained, sst2_folder, steps)
    made = plan(path)
    run_plan(made, profile=True)
    folder = made.steps["student"].folder
    rows = [line.strip("| ").split(" | ") for line in (folder / "profile.md").read_text().splitlines()[2:]]
    times = {name: float(milliseconds) for name, milliseconds, _ in rows}
    whole = times.pop("all")
    assert set(times) >= {"data", "teacher", "student forward", "losses", "backward", "optimizer"}
    assert min(times.values()) > 0
    assert sum(times.values()) == pytest.approx(whole, abs=0.05)
    trace = json.loads((folder / "profile.json").read_text())
    assert sum(event.get("name") == "teacher" for event in trace["traceEvents"]) >= 5


_MEMORY = """
import sys
sys.path.insert(0, {root!r})
import datasets, numpy as np
from transformers import TrainerCallback
from distill import DistillationConfig, DistillationTrainer, build_student
from tests.conftest import make_tokenizer, tiny_bert

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

class Peak(TrainerCallback):
    found = 0
    def on_step_end(self, args, state, control, **kwargs):
        self.found = max(self.found, anonymous())

generator = np.random.default_rng(0)
ids = generator.integers(5, 20, ({rows}, 32)).astype("int32")
rows = datasets.Dataset.from_dict({{"input_ids": ids, "labels": generator.integers(0, 2, {rows})}})
teacher = tiny_bert()
peak = Peak()
trainer = DistillationTrainer(
    model=build_student(teacher, num_layers=2), teacher=teacher, train_dataset=rows, processing_class=make_tokenizer(),
    args=DistillationConfig(
        output_dir={folder!r}, cache_dir={folder!r}, max_steps=40, hidden_weight=1.0, cache_teacher="hidden",
        save_strategy="no", report_to=[], per_device_eval_batch_size=256,
    ), callbacks=[peak],
)
trainer.train()
print("PEAK", peak.found)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what memory is anonymous")
@pytest.mark.parametrize("most", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_cached_rows(tmp_path, most):
    """20,000 rows of hidden states are 160 MB, 100,000 five times as much; they stay on disk."""
    peaks = {}
    for rows in (1_000, most):
        folder = tmp_path / str(rows)
        script = _MEMORY.format(root=str(Path(__file__).parents[2]), rows=rows, folder=str(folder))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr
        peaks[rows] = float(done.stdout.split("PEAK")[1])
        stored = sum(path.stat().st_size for path in folder.rglob("chunk-*.arrow"))
        assert stored > rows * 32 * 2 * 64 * 2
    assert peaks[most] < 1.1 * peaks[1_000]


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1)])
def test_no_more_threads_than_a_container_may_use(tmp_path, monkeypatch, quota, threads):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr("distill.common.hardware._CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    chosen = []
    monkeypatch.setattr("torch.get_num_threads", lambda: chosen[-1] if chosen else 4)
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    with available_cores():
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_kept_in_training_alone(monkeypatch):
    """A large block that is freed is the process's no longer, but for the time of a training."""
    libc = ctypes.CDLL(None)
    if getattr(libc, "mallopt", None) is None:
        pytest.skip("another C library")

    names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    mallinfo2 = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    libc.mallinfo2.restype = mallinfo2

    def kept_of_a_freed_block() -> float:
        """As a share of it."""
        before, size = libc.mallinfo2(), 512 * 2**20
        torch.empty(size, dtype=torch.uint8)
        after = libc.mallinfo2()
        return (after.arena + after.hblkhd - before.arena - before.hblkhd) / size

    with freed_memory_kept():
        assert kept_of_a_freed_block() > 0.9
    assert abs(kept_of_a_freed_block()) < 0.1
    assert allocator().endswith("in training keeping what is freed")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")  # what the process has begun with, and stays
    with freed_memory_kept():
        assert abs(kept_of_a_freed_block()) < 0.1
