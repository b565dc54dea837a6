"""The verbs of a recipe: for each one the plain function that makes its model folder."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback

from distill.common.console import log
from distill.common.distributed import on_main_process, wait_for_everyone
from distill.common.hardware import compute_device
from distill.compression.quantization.formats import Format, choose_formats
from distill.compression.quantization.gptq import compensate
from distill.compression.quantization.mixed import (
    budget_in_bytes,
    calibration_logits,
    choose_mix,
    write_sensitivity,
)
from distill.compression.quantization.quantize import apply_formats
from distill.compression.student import build_student
from distill.data.load import (
    Data,
    Truncated,
    describe_cut,
    token_fingerprint,
    tokenizer_fingerprint,
)
from distill.data.tokenized import Processor, beside
from distill.evaluation.evaluate import input_batches, metrics_while_training
from distill.models.adapters import in_float32, lora_config, merged
from distill.models.load import load_classifier, load_for_finetuning, load_processor
from distill.models.structure import depth_of
from distill.tasks.targets import problem_type
from distill.training.callbacks import ProgressLines, StepProfile
from distill.training.checkpoints import (
    Clock,
    last_checkpoint,
    other_batches,
    with_step_counts,
)
from distill.training.teachers import FROM_DATA, AnyTeacher, own_columns
from distill.training.trainer import DistillationTrainer
from distill.verbs.options import (
    DistillOptions,
    FinetuneOptions,
    Options,
    QuantizeOptions,
    chosen_layers,
    cuts_student,
    is_teacher,
    teachers_of,
    width_of_student,
)


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
    learning_rate: float | None = None
    """The highest; by default it follows from the student's width."""
    log: list[dict[str, float]] = field(default_factory=list)
    """Trainer's log lines."""
    truncated: Truncated | None = None
    """How many rows of each split the model's tokenizer cuts; null where none was read, and for images."""


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
        teacher = load_classifier(
            location,
            data.task,
            label_map=options.teacher_label_map,
            dtype=torch.float32,
            merge=options.model is None,  # layers are taken from it
        )
        teachers.append((teacher, location))
    started_from = inputs.get("model") or inputs["teacher"]
    if "model" in inputs:
        source = load_for_finetuning(inputs["model"], data.task, from_scratch=options.from_scratch)
    else:
        source = next(teacher for teacher, _ in teachers if not isinstance(teacher, str))
    return _train(_cut_student(source, options), teachers, options, data, started_from, folder, profile)


def quantize(options: QuantizeOptions, inputs: dict[str, str], data: Data, folder: Path) -> Made:
    """Quantize `inputs["model"]`; on the main process alone."""

    def work() -> None:
        model = load_classifier(inputs["model"], data.task, label_map=options.label_map, dtype=torch.float32)
        processor = load_processor(inputs["model"], data.task.kind, data.max_length)
        model.to(compute_device() if options.reads_rows else "cpu")
        if options.bits_budget is None:
            formats = choose_formats(model, options)
        else:
            formats = _pick_formats(model, options, _calibration(data, processor, options, rows=256), folder)
        if options.gptq:
            compensate(model, formats, options, _calibration(data, processor, options, rows=512, tokens=65536))
        apply_formats(model.to("cpu"), formats, options).save_pretrained(folder)
        processor.save_pretrained(folder)

    on_main_process(work)
    return Made()


def _calibration(
    data: Data, processor: Processor, options: QuantizeOptions, *, rows: int, tokens: int | None = None
) -> list[dict[str, Tensor]]:
    """The model inputs of a random part of the training rows, in batches of like length.

    Args:
        rows: how many, where the options don't say.
        tokens: as many rows instead as hold these, where rows are texts.
    """
    found = data.tokenized("train", processor).shuffle(seed=0)
    if tokens is not None and "length" in found.column_names:
        rows = int(np.searchsorted(np.cumsum(found["length"]), tokens)) + 1
    found = found.select(range(min(options.calibration_rows or rows, len(found))))
    log.print(f"      measuring on {len(found):,} training rows")
    return [batch for _, batch in input_batches(found, processor, batch_size=64)]


def _pick_formats(
    model: PreTrainedModel, options: QuantizeOptions, batches: list[dict[str, Tensor]], folder: Path
) -> dict[str, Format]:
    """The formats that keep closest to the model within its budget; what was measured goes into the folder."""
    budget = budget_in_bytes(options.bits_budget or 0, model, options)
    mixes, measured = choose_mix(
        model,
        options,
        budget,
        predict=lambda model: calibration_logits(model, batches),
        problem=problem_type(model),
    )
    write_sensitivity(folder, budget, mixes, measured)
    for mix in mixes:
        log.print(f"      {mix.name}: {mix.size / 1e6:.2f} MB, divergence {mix.divergence:.3g}")
    return {name: format for name, format in mixes[0].formats.items() if format != "none"}  # type: ignore[misc]


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
    rows = read_rows(data, processor_from, [location for _, location in teachers])
    clock = Clock()
    checkpoint = _checkpoint_to_go_on_from(options)
    trained = options
    if checkpoint is not None:
        trained = with_step_counts(options, checkpoint)
    if options.lora is not None and Path(processor_from).is_dir():
        model.name_or_path = str(Path(processor_from).resolve())  # where the adapter will look for it, from anywhere
    trainer = DistillationTrainer(
        model=model,
        teacher=[teacher for teacher, _ in teachers],
        args=trained,
        peft_config=None if options.lora is None else lora_config(options.lora, kind),
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        processing_class=rows.processor,
        callbacks=[clock, *([StepProfile(folder)] if profile else [])],
        **metrics_while_training(data, rows.validation),
    )
    if options.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressLines())
    if checkpoint is not None:
        clock.resume(checkpoint)
        if trainer.is_world_process_zero():
            log.print(f"      resuming from {checkpoint.name}")
    rows_of_a_step, said = batch_of(trainer)
    truncated = rows_cut(data, rows.processor, options)
    if trainer.is_world_process_zero():
        log.print(f"      {said}")
        if cut := describe_cut(truncated):
            log.print(f"      {cut}")
    with in_float32(trainer.student):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if options.merge:
        if trainer.is_world_process_zero():
            merged(trainer.student).save_pretrained(folder)
            rows.processor.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    seconds = clock.seconds()
    num_rows = len(rows.train) * (trainer.state.epoch or 0)
    return Made(
        train_seconds=seconds,
        samples_per_second=num_rows / seconds,
        world_size=trainer.accelerator.num_processes,
        device=trainer.args.device.type,
        effective_batch_size=rows_of_a_step,
        learning_rate=trainer.args.learning_rate,
        log=trainer.state.log_history,
        truncated=truncated,
    )


def _checkpoint_to_go_on_from(options: FinetuneOptions | DistillOptions) -> Path | None:
    """The last one, if rows were dealt to its steps as they are now; with others in place the step starts anew."""
    folder = Path(options.output_dir)
    checkpoint = last_checkpoint(folder)
    different = None if checkpoint is None else other_batches(checkpoint, options)
    wait_for_everyone()  # nothing is deleted before all have looked
    if checkpoint is None or different is None:
        return checkpoint

    def start_anew() -> None:
        log.print(f"      {checkpoint.name} can't be gone on from ({different}): started anew")
        shutil.rmtree(folder)

    on_main_process(start_anew)
    return None


def rows_cut(data: Data, processor: Processor, options: FinetuneOptions | DistillOptions) -> Truncated | None:
    """The rows of each split that a training reads or its model is scored on, and how many of them are cut."""
    return data.truncated(processor, unlabelled=isinstance(options, DistillOptions))


@dataclass(frozen=True)
class ReadRows:
    """What a training reads, and how."""

    processor: Processor
    train: datasets.Dataset
    validation: datasets.Dataset


def read_rows(data: Data, processor_from: str, teachers_from: Sequence[str | None]) -> ReadRows:
    """The rows of a training as its student reads them, beside them what teachers read otherwise.

    Args:
        processor_from: folder or Hub id of the student's tokenizer or image processor.
        teachers_from: the same for each teacher; None for one that stands in the rows. Where there is any, rows
            without a label are read too.
    """
    kind, scored = data.task.kind, data.task.validation_splits[0][0]
    processor = load_processor(processor_from, kind, data.max_length)
    train = data.training_rows(processor, unlabelled=bool(teachers_from))
    validation = data.tokenized(scored, processor)
    for number, location in enumerate(teachers_from):
        if location is None or kind == "image-classification":
            continue
        own = load_processor(location, kind, data.max_length)
        if tokenizer_fingerprint(own) == tokenizer_fingerprint(processor):
            continue
        same_tokens, prefix = token_fingerprint(own) == token_fingerprint(processor), own_columns(number)
        train = _with_own_inputs(train, data.training_rows(own, unlabelled=True), own, prefix, same_tokens=same_tokens)
        others = data.tokenized(scored, own)
        validation = _with_own_inputs(validation, others, own, prefix, same_tokens=same_tokens)
    return ReadRows(processor, train, validation)


def _with_own_inputs(
    rows: datasets.Dataset, others: datasets.Dataset, own: Processor, prefix: str, *, same_tokens: bool
) -> datasets.Dataset:
    """Rows with what a teacher reads otherwise than the student: all of its inputs, or where the tokens are the same
    the token types that one of the two is not given.
    """
    if not same_tokens:
        return beside(rows, others, [name for name in own.model_input_names if name in others.column_names], prefix)
    types = "token_type_ids"
    if (types in rows.column_names) == (types in others.column_names):
        return rows
    if types not in others.column_names:  # a model that is given none reads zeros
        others = others.add_column(types, [[0] * length for length in others["length"]])
    return beside(rows, others, [types], prefix)


def batch_of(trainer: DistillationTrainer) -> tuple[int | None, str]:
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
