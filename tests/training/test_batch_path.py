"""How many modules a batch passes, from the collator that makes it to the log of its step."""

import sys

import pytest
from transformers import TrainerCallback

from distill import DistillationConfig, DistillationTrainer
from distill.training.config import PARTS, TrainingConfig
from tests.conftest import make_tokenizer
from tests.training.test_exactness import make_models, make_rows

HIDDEN = {"hidden_weight": 0.5, "hard_weight": 0.3}
SCHEDULES = {"temperature": {"from": 4, "to": 1}, "hidden_weight": {"from": 1, "to": 0.5}, "hard_weight": 0.3}
CASES = {
    "live": ("classes", {**HIDDEN, "cache_teacher": "none"}, 10),
    "schedules": ("classes", {**SCHEDULES, "cache_teacher": "none", "gradient_accumulation_steps": 2}, 10),
    "cached": ("classes", {**HIDDEN, "cache_teacher": "hidden"}, 11),
    "every part": ("classes", {f"{part}_weight": 0.3 for part in PARTS} | {"cache_teacher": "none"}, 10),
    "tokens": ("tokens", {**HIDDEN, "cache_teacher": "none"}, 10),
    "tokens, cached": ("tokens", {**HIDDEN, "cache_teacher": "hidden"}, 11),
    "masked language model": ("masked anew", {**HIDDEN, "cache_teacher": "none"}, 12),
    "two tokenizers": ("some rows of other tokens", {**HIDDEN, "cache_teacher": "none"}, 10),
    "no teacher": ("classes", None, 8),
}
"""Kind, options, and the most modules that may be passed."""


class Trace(TrainerCallback):
    """The modules of ours whose functions are called after the log of the first step, up to that of the third."""

    def __init__(self):
        self.modules = set()

    def note(self, frame, event, argument):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("distill"):
            self.modules.add(name)

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.before = sys.getprofile()
            sys.setprofile(self.note)
        elif state.global_step == 3:
            sys.setprofile(self.before)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_passes_few_modules(tmp_path, case):
    kind, options, most = CASES[case]
    teacher, student = make_models(kind)
    given = {
        "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "bf16": False,
    }  # fmt: skip
    if options is None:
        args, teacher = TrainingConfig(**given), None
    else:
        args = DistillationConfig(**given, cache_dir=str(tmp_path / "cache"), **options)
    trace = Trace()
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(kind, 16), processing_class=make_tokenizer(),
        callbacks=[trace],
    )  # fmt: skip
    trainer.train()
    assert {"distill.data.batches", "distill.training.objective", "distill.training.trainer"} <= trace.modules
    assert len(trace.modules) <= most, sorted(trace.modules)
