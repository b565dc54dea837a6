"""The verbs of a recipe: each one's options, and the plain function that makes its model folder."""

import copy
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import Field
from transformers import PretrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.adapters import LoraOptions, in_float32, lora_config, merged
from distill.config import DistillationConfig, TrainingConfig
from distill.console import log
from distill.data import Data
from distill.errors import InputError
from distill.evaluation import input_batches, metrics_while_training
from distill.formats import Format, QuantizationSettings, choose_formats
from distill.models import load_classifier, load_for_finetuning, load_processor
from distill.predictions import problem_type
from distill.processes import on_main_process
from distill.profiling import StepProfile
from distill.quantize import apply_formats, quantized_size
from distill.representations import depth_of
from distill.sensitivity import budget_in_bytes, calibration_logits, check_budget, choose_mix, write_sensitivity
from distill.student import StudentArch, Width, build_student, choose_layers
from distill.teacher import FROM_DATA, AnyTeacher, own_columns
from distill.trainer import DistillationTrainer

# Checkpoints of a small model are less than a second apart; Trainer then sorts them by number, which is just right.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not be" not in record.getMessage())


@dataclass
class StudentOptions:
    """How a student is made from the model it starts from."""

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
    hidden_size: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Width of the student where it is another: it is then freshly initialised."}
    )
    num_attention_heads: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Heads of the student where they are others: it is then freshly initialised."}
    )
    intermediate_size: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={"help": "Neurons of the student's feed-forward layers; those of its source that weigh most stay."},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Start from the config of `model` alone, with new weights."}
    )
    lora: LoraOptions | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters alone: {r: 8, alpha: 16, dropout: 0, target_modules: all-linear}; the run "
            "folder then holds the adapter. Needed where `model` is quantized."
        },
    )
    merge: bool = field(
        default=False, metadata={"help": "With lora: add the adapters to the weights, and save the whole model."}
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
class QuantizeOptions(QuantizationSettings):
    """Quantize a model with bitsandbytes, embeddings included."""

    model: str = field(metadata={"help": "What to quantize: a Hub id, a folder, package:…, or an earlier step."})
    bits_budget: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?[kMG]B$")] | None = field(
        default=None,
        metadata={
            "help": "Instead of format: pick one for every module by measuring what each costs, within this many bits "
            "per quantizable weight on average (5.2), or bytes of the whole model (15.3MB)."
        },
    )
    calibration_rows: Annotated[int, Field(ge=1)] = field(
        default=256, metadata={"help": "bits_budget: training rows on which it is measured."}
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        if self.bits_budget is not None and self.format is not None:
            raise InputError("format: is picked by bits_budget; leave one of them out (overrides fix single modules)")

    def planned_size(self, model: PreTrainedModel) -> int:
        """Bytes of weights that the step will leave, from a float model that may lie on meta.

        Raises:
            InputError: patterns that match nothing, or a budget that is too small.
        """
        if self.bits_budget is None:
            return quantized_size(model, self)
        return check_budget(model, self, budget_in_bytes(self.bits_budget, model, self))


Options = FinetuneOptions | DistillOptions | QuantizeOptions

VERBS: dict[str, type] = {"finetune": FinetuneOptions, "distill": DistillOptions, "quantize": QuantizeOptions}


@dataclass(frozen=True)
class Made:
    """What a step tells of its run; it goes into step.json."""

    train_seconds: float | None = None
    samples_per_second: float | None = None
    """Training rows per second, all processes together."""
    world_size: int | None = None
    device: str | None = None
    effective_batch_size: int | None = None
    """Rows of an optimizer step, all processes together; null where batches are made by their tokens."""
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
    model = load_for_finetuning(inputs["model"], data.task, from_scratch=options.from_scratch)
    return _train(_cut_student(model, options), [], options, data, inputs["model"], folder, profile)


def distill(
    options: DistillOptions, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False
) -> Made:
    """Train a student, cut from `inputs["model"]` or else from the teacher, against `inputs["teacher"]`."""
    transformers.set_seed(options.seed)
    models = (location for option, location in inputs.items() if is_teacher(option))
    teachers: list[tuple[AnyTeacher, str | None]] = []
    for reference in teachers_of(options.__dict__):
        if reference == FROM_DATA:
            teachers.append((FROM_DATA, None))
            continue
        location = next(models)
        teacher = load_classifier(location, data.task, label_map=options.teacher_label_map, dtype=torch.float32)
        teachers.append((teacher, location))
    started_from = inputs.get("model") or inputs["teacher"]
    if "model" in inputs:
        source = load_for_finetuning(inputs["model"], data.task, from_scratch=options.from_scratch)
    else:
        source = next(teacher for teacher, _ in teachers if isinstance(teacher, PreTrainedModel))
    return _train(_cut_student(source, options), teachers, options, data, started_from, folder, profile)


def quantize(options: QuantizeOptions, inputs: dict[str, str], data: Data, folder: Path) -> Made:
    """Quantize `inputs["model"]`; on the main process alone."""

    def work() -> None:
        model = load_classifier(inputs["model"], data.task, label_map=options.label_map, dtype=torch.float32)
        if options.bits_budget is None:
            formats = choose_formats(model, options)
        else:
            formats = _pick_formats(model, options, data, inputs["model"], folder)
        apply_formats(model, formats, options).save_pretrained(folder)
        load_processor(inputs["model"], data.task.kind, data.max_length).save_pretrained(folder)

    on_main_process(work)
    return Made()


def _pick_formats(
    model: PreTrainedModel, options: QuantizeOptions, data: Data, processor_from: str, folder: Path
) -> dict[str, Format]:
    """The formats that keep closest to the model within its budget; what was measured goes into the folder."""
    processor = load_processor(processor_from, data.task.kind, data.max_length)
    rows = data.tokenized("train", processor)
    rows = rows.shuffle(seed=0).select(range(min(options.calibration_rows, len(rows))))
    batches = [batch for _, batch in input_batches(rows, processor, batch_size=64)]
    budget = budget_in_bytes(options.bits_budget or 0, model, options)
    mixes, measured = choose_mix(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        options,
        budget,
        predict=lambda model: calibration_logits(model, batches),
        problem=problem_type(model),
    )
    write_sensitivity(folder, budget, mixes, measured)
    for mix in mixes:
        log.print(f"      {mix.name}: {mix.size / 1e6:.2f} MB, divergence {mix.divergence:.3g}")
    model.to("cpu")
    return {name: format for name, format in mixes[0].formats.items() if format != "none"}  # type: ignore[misc]


def is_adapter(options: Options) -> bool:
    """Whether a step leaves an adapter, and not a whole model."""
    return isinstance(options, StudentOptions) and options.lora is not None and not options.merge


def chosen_layers(options: StudentOptions, num_source_layers: int) -> list[int]:
    """The 0-based source layers of a step's student.

    Raises:
        InputError: out of range.
    """
    num_layers = options.num_layers
    if num_layers is None and options.layers == "uniform" and isinstance(options, DistillOptions) and not options.model:
        num_layers = max(1, num_source_layers // 2)
    if num_source_layers == 0 and num_layers is None and options.layers == "uniform":
        return []  # a convolutional network
    return choose_layers(options.layers, num_layers, num_source_layers)


def width_of_student(options: StudentOptions) -> Width:
    """The sizes that a step's options give its student."""
    return Width(options.hidden_size, options.num_attention_heads, options.intermediate_size)


def cuts_student(options: StudentOptions, source: PretrainedConfig) -> bool:
    """Whether a step's student is another than the model it starts from."""
    layers = chosen_layers(options, depth_of(source))
    other = options.student_arch != "same" or width_of_student(options).differs_from(source)
    return other or layers != list(range(depth_of(source)))


def _cut_student(source: PreTrainedModel, options: FinetuneOptions | DistillOptions) -> PreTrainedModel:
    source_is_teacher = isinstance(options, DistillOptions) and options.model is None
    if not source_is_teacher and not cuts_student(options, source.config):
        return source
    return build_student(
        source,
        student_arch=options.student_arch,
        layers=chosen_layers(options, depth_of(source.config)),
        width=width_of_student(options),
    )


def _train(
    model: PreTrainedModel,
    teachers: list[tuple[AnyTeacher, str | None]],
    options: FinetuneOptions | DistillOptions,
    data: Data,
    processor_from: str,
    folder: Path,
    profile: bool,
) -> Made:
    """Train and save.

    Args:
        teachers: each with the folder or Hub id of its tokenizer; None for one that stands in the rows.
    """
    kind = data.task.kind
    processor = load_processor(processor_from, kind, data.max_length)
    train_rows = data.training_rows(processor, unlabelled=bool(teachers))
    for number, (_, location) in enumerate(teachers):
        if location is not None and kind != "image-classification":
            own = load_processor(location, kind, data.max_length)
            train_rows = data.with_inputs_of(train_rows, processor, own, own_columns(number))
    validation_rows = data.tokenized(data.task.validation_splits[0][0], processor)
    clock = _Clock()
    checkpoint = last_checkpoint(Path(options.output_dir))
    trained = options
    if checkpoint is not None:
        trained = _with_step_counts(options, checkpoint)
    trainer = DistillationTrainer(
        model=model,
        teacher=[teacher for teacher, _ in teachers],
        args=trained,
        peft_config=None if options.lora is None else lora_config(options.lora, kind),
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=processor,
        callbacks=[clock, *([StepProfile(folder)] if profile else [])],
        **metrics_while_training(data, validation_rows),
    )
    if options.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_ProgressLines())
    if checkpoint is not None:
        clock.resume(checkpoint)
        if trainer.is_world_process_zero():
            log.print(f"      resuming from {checkpoint.name}")
    rows_of_a_step, said = _batch(trainer)
    if trainer.is_world_process_zero():
        log.print(f"      {said}")
    with in_float32(trainer.student):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if options.merge:
        if trainer.is_world_process_zero():
            merged(trainer.student).save_pretrained(folder)
            processor.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    seconds = clock.seconds()
    rows = len(trainer.train_dataset) * (trainer.state.epoch or 0)
    return Made(
        train_seconds=seconds,
        samples_per_second=rows / seconds,
        world_size=trainer.accelerator.num_processes,
        device=trainer.args.device.type,
        effective_batch_size=rows_of_a_step,
        log=trainer.state.log_history,
    )


def _batch(trainer: DistillationTrainer) -> tuple[int | None, str]:
    """The rows of an optimizer step (None where tokens are counted), and in words how they are shared out and where."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    budget = args.max_tokens_per_batch
    a_batch, unit = (args.train_batch_size, "rows") if budget is None else (budget, "tokens")
    total = a_batch * args.gradient_accumulation_steps * processes
    shared = [f"{processes} processes" if processes > 1 else "1 process", f"{a_batch} {unit}"]
    shared += [f"{args.gradient_accumulation_steps} batches"] * (args.gradient_accumulation_steps > 1)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    at_most = "" if budget is None else "at most "
    said = f"{at_most}{total} {unit} a step ({' × '.join(shared)}) on {args.device.type}, {precision}"
    return (total if budget is None else None), said


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a Trainer's output folder; one that a kill cut short lacks its last file."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _with_step_counts(options: FinetuneOptions | DistillOptions, checkpoint: Path) -> FinetuneOptions | DistillOptions:
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
