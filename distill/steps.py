"""The verbs of a recipe: each one's options, and the plain function that makes its model folder."""

import copy
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.config import DistillationConfig, TrainingConfig
from distill.console import log
from distill.data import Data
from distill.metrics import compute_metrics
from distill.models import load_classifier, load_for_finetuning, load_tokenizer
from distill.processes import process_state
from distill.profiling import StepProfile
from distill.quantize import Format, quantize_model
from distill.student import StudentArch, build_student, choose_layers
from distill.teacher import FROM_DATA, AnyTeacher
from distill.trainer import DistillationTrainer

# Checkpoints of a small model are less than a second apart; Trainer then sorts them by number, which is just right.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not be" not in record.getMessage())


@dataclass
class StudentOptions:
    """How a student is cut from the model it starts from."""

    student_arch: StudentArch = field(
        default="same", metadata={"help": "Architecture of the student: its source's, or DistilBERT's (from a BERT)."}
    )
    num_layers: int | None = field(
        default=None,
        metadata={
            "help": "Layers of the student. By default all; half of the teacher's for a distill step without model."
        },
    )
    layers: Literal["uniform"] | list[int] = field(
        default="uniform", metadata={"help": "0-based source layers that seed the student's; uniform spreads them."}
    )


@dataclass
class FinetuneOptions(StudentOptions, TrainingConfig):
    """Train a model on labels alone: a teacher, or the same student without a teacher."""

    model: str = field(
        kw_only=True, metadata={"help": "What to train: a Hub id, a folder, package:…, or an earlier step."}
    )


@dataclass
class DistillOptions(StudentOptions, DistillationConfig):
    """Train a student against a teacher."""

    teacher: str | list[str] = field(
        kw_only=True,
        metadata={
            "help": "The fine-tuned teacher, or several: a Hub id, a folder, package:…, an earlier step; data stands "
            "for predictions in the rows (data.teacher_logits, data.teacher_probabilities)."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "What the student starts from; by default layers of the teacher."}
    )
    teacher_label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The teacher's label names → the task's, where they differ."}
    )


@dataclass(kw_only=True)
class QuantizeOptions:
    """Quantize a model with bitsandbytes, word embeddings in int8, heads left in bfloat16."""

    model: str = field(metadata={"help": "What to quantize: a Hub id, a folder, package:…, or an earlier step."})
    format: Format = field(metadata={"help": "Format of the linear layers in the blocks."})
    double_quant: bool = field(default=True, metadata={"help": "Quantize the scales of 4-bit blocks too."})
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )


Options = FinetuneOptions | DistillOptions | QuantizeOptions

VERBS: dict[str, type] = {"finetune": FinetuneOptions, "distill": DistillOptions, "quantize": QuantizeOptions}


@dataclass(frozen=True)
class Made:
    """What a step tells of its run; it goes into step.json."""

    train_seconds: float | None = None
    samples_per_second: float | None = None
    """Training rows per second, all processes together."""
    world_size: int | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    """Trainer's log lines."""


def referenced_models(given: Mapping[str, Any]) -> dict[str, str]:
    """The models that a step's options name: `teacher`, `teacher 2`, …, `model`."""
    models = {
        "teacher" if number == 1 else f"teacher {number}": reference
        for number, reference in enumerate((each for each in teachers_of(given) if each != FROM_DATA), start=1)
    }
    return models | ({"model": given["model"]} if given.get("model") is not None else {})


def is_teacher(option: str) -> bool:
    """Whether a key of `referenced_models` names a teacher."""
    return option.startswith("teacher")


def teachers_of(given: Mapping[str, Any]) -> list[str]:
    """The teachers that a step's options name, predictions in the rows (`data`) among them."""
    teacher = given.get("teacher") or []
    return [teacher] if isinstance(teacher, str) else list(teacher)


def run_step(options: Options, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False) -> Made:
    """Make one model folder.

    Args:
        options: of the verb to run.
        inputs: for each option that names a model, where `from_pretrained` finds it.
        folder: the run folder; may hold `checkpoints/` of a run that was cut off.
        profile: write a `StepProfile` of the training into the folder.
    """
    if isinstance(options, QuantizeOptions):
        return quantize(options, inputs, data, folder)
    if isinstance(options, DistillOptions):
        return distill(options, inputs, data, folder, profile=profile)
    return finetune(options, inputs, data, folder, profile=profile)


def finetune(
    options: FinetuneOptions, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False
) -> Made:
    """Train `inputs["model"]`, or a student cut from it, on the labels."""
    transformers.set_seed(options.seed)  # a new head is drawn here
    model = load_for_finetuning(inputs["model"], data.task)
    return _train(_cut_student(model, options), [], options, data, inputs["model"], folder, profile)


def distill(
    options: DistillOptions, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False
) -> Made:
    """Train a student, cut from `inputs["model"]` or else from the teacher, against `inputs["teacher"]`."""
    transformers.set_seed(options.seed)
    teachers: list[AnyTeacher] = []
    models = (location for option, location in inputs.items() if is_teacher(option))
    for reference in teachers_of(options.__dict__):
        teachers.append(
            FROM_DATA
            if reference == FROM_DATA
            else load_classifier(next(models), data.task, label_map=options.teacher_label_map, dtype=torch.float32)
        )
    started_from = inputs.get("model") or inputs["teacher"]
    if "model" in inputs:
        source = load_for_finetuning(inputs["model"], data.task)
    else:
        source = next(teacher for teacher in teachers if isinstance(teacher, PreTrainedModel))
    return _train(_cut_student(source, options), teachers, options, data, started_from, folder, profile)


def quantize(options: QuantizeOptions, inputs: dict[str, str], data: Data, folder: Path) -> Made:
    """Quantize `inputs["model"]`; on the main process alone."""
    if process_state().is_main_process:
        model = load_classifier(inputs["model"], data.task, label_map=options.label_map, dtype=torch.float32)
        quantize_model(model, format=options.format, double_quant=options.double_quant).save_pretrained(folder)
        load_tokenizer(inputs["model"], data.max_length).save_pretrained(folder)
    return Made()


def chosen_layers(options: StudentOptions, num_source_layers: int) -> list[int]:
    """The 0-based source layers of a step's student.

    Raises:
        InputError: out of range.
    """
    num_layers = options.num_layers
    if num_layers is None and options.layers == "uniform" and isinstance(options, DistillOptions) and not options.model:
        num_layers = max(1, num_source_layers // 2)
    return choose_layers(options.layers, num_layers, num_source_layers)


def _cut_student(source: PreTrainedModel, options: FinetuneOptions | DistillOptions) -> PreTrainedModel:
    layers = chosen_layers(options, source.config.num_hidden_layers)
    whole = layers == list(range(source.config.num_hidden_layers)) and options.student_arch == "same"
    source_is_teacher = isinstance(options, DistillOptions) and options.model is None
    if whole and not source_is_teacher:
        return source
    return build_student(source, student_arch=options.student_arch, layers=layers)


def _train(
    model: PreTrainedModel,
    teachers: list[AnyTeacher],
    options: TrainingConfig,
    data: Data,
    tokenizer_from: str,
    folder: Path,
    profile: bool,
) -> Made:
    tokenizer = load_tokenizer(tokenizer_from, data.max_length)
    train_rows = data.training_rows(tokenizer, unlabelled=bool(teachers))
    validation_rows = data.tokenized(data.task.validation_splits[0][0], tokenizer)
    clock = _Clock()
    checkpoint = last_checkpoint(Path(options.output_dir))
    if checkpoint is not None:
        options = _with_step_counts(options, checkpoint)
    trainer = DistillationTrainer(
        model=model,
        teacher=teachers,
        args=options,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        compute_metrics=lambda output: compute_metrics(data.task, output.predictions, output.label_ids),
        callbacks=[clock, *([StepProfile(folder)] if profile else [])],
    )
    if options.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_ProgressLines())
    if checkpoint is not None:
        clock.resume(checkpoint)
        if trainer.is_world_process_zero():
            log.print(f"      resuming from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(folder))
    seconds = clock.seconds()
    rows = len(trainer.train_dataset) * (trainer.state.epoch or 0)
    return Made(seconds, rows / seconds, trainer.accelerator.num_processes, trainer.state.log_history)


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a Trainer's output folder; one that a kill cut short lacks its last file."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _with_step_counts(options: TrainingConfig, checkpoint: Path) -> TrainingConfig:
    """The options with shares of all steps as counts: Trainer compares them with a checkpoint's counts, and warns."""
    max_steps = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).max_steps
    counted = copy.copy(options)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(options, name)
        if share and share < 1:
            setattr(counted, name, math.ceil(max_steps * share))
    return counted


class _ProgressLines(TrainerCallback):
    """For a log file: one line per logging step, with an estimate, where a terminal has Trainer's moving bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        parts = ", ".join(f"{key.partition('/')[2]} {logs[key]:.4f}" for key in sorted(logs) if key.startswith("loss/"))
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        step = f"step {state.global_step}/{state.max_steps}"
        log.print(f"      {step}, loss {logs['loss']:.4f} ({parts}), {left:.0f} s left")


class _Clock(TrainerCallback):
    """Training time, summed over the sessions of a run that was cut off."""

    _FILE = "seconds.json"

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            (checkpoint / self._FILE).write_text(json.dumps(self.seconds()))

    def resume(self, checkpoint: Path) -> None:
        file = checkpoint / self._FILE
        self._before = json.loads(file.read_text()) if file.is_file() else 0.0

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started
