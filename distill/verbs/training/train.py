"""How a verb that trains makes its model as planned: the student, the rows that are read, and the training."""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.compute as pc
from transformers import PreTrainedModel, PrinterCallback

from distill.common.console import log
from distill.common.distributed import on_main_process, wait_for_everyone
from distill.compression.student import build_student
from distill.data.fingerprints import token_fingerprint, tokenizer_fingerprint
from distill.data.load import Data, Truncated, describe_cut
from distill.data.tokenized import Processor, beside, same_tokens
from distill.errors import InputError
from distill.evaluation.evaluate import metrics_while_training
from distill.models.adapters import in_float32, lora_config, merged
from distill.models.load import load_processor
from distill.tasks.kinds import KINDS
from distill.training.arguments import comparable, token_losses
from distill.training.callbacks import ProgressLines, StepProfile, watchers
from distill.training.checkpoints import (
    Clock,
    last_checkpoint,
    other_batches,
    with_step_counts,
)
from distill.training.config import DistillationConfig
from distill.training.teachers import SAME_TOKENS, AnyTeacher, own_columns
from distill.training.trainer import DistillationTrainer
from distill.verbs.base import OtherTokens, StepResult, describe_left_out
from distill.verbs.training.options import TrainingOptions
from distill.verbs.training.planning import TrainingPlan
from distill.verbs.training.trackers import tracked

_FEWEST_COMPARED = 0.01
"""Of the training rows, the share that losses of tokens need at least."""


def built_student(source: PreTrainedModel, options: TrainingOptions, plan: TrainingPlan) -> PreTrainedModel:
    """Build the student that was planned; `source` itself where it is to be trained as it is.

    Args:
        source: the model that the student is built from.
        options: hold the student's architecture and its width.
        plan: says which layers of the source the student's stand for.
    """
    if not plan.is_built:
        return source
    return build_student(source, student_arch=options.student_arch, layers=list(plan.seeds), width=options.width)


def train(
    model: PreTrainedModel,
    teachers: Sequence[AnyTeacher],
    options: TrainingOptions,
    plan: TrainingPlan,
    data: Data,
    folder: Path,
    *,
    profile: bool,
) -> StepResult:
    """Train and save.

    Args:
        model: the student.
        teachers: as many as the plan has.
        options: of the step.
        plan: of the step.
        data: the rows.
        folder: that the model goes into.
        profile: whether to leave a `StepProfile` of the training there.
    """
    kind, started_from = data.task.kind, plan.source.location
    rows = read_rows(data, started_from, [None if each is None else each.location for each in plan.teachers])
    other_tokens = rows_left_out(rows, options, plan)
    clock = Clock()
    checkpoint = _checkpoint_to_go_on_from(options)
    trained = copy.copy(options)
    trained.learning_rate = plan.learning_rate
    if checkpoint is not None:
        trained = with_step_counts(trained, checkpoint)
    if options.lora is not None and Path(started_from).is_dir():
        model.name_or_path = str(Path(started_from).resolve())  # where the adapter will look for it, from anywhere
    with tracked(trained):
        trainer = DistillationTrainer(
            model=model,
            teacher=list(teachers),
            args=trained,
            layer_pairs=plan.pairs_of_teachers,
            peft_config=None if options.lora is None else lora_config(options.lora, kind),
            train_dataset=rows.train,
            eval_dataset=rows.validation,
            processing_class=rows.processor,
            callbacks=[clock, *watchers(), *([StepProfile(folder)] if profile else [])],
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
        truncated = rows_cut(data, rows.processor, plan)
        if trainer.is_world_process_zero():
            log.print(f"      {said}")
            if cut := describe_cut(truncated):
                log.print(f"      {cut}")
            for line in describe_left_out(other_tokens):
                log.print(f"      {line}")
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
    return StepResult(
        train_seconds=seconds,
        samples_per_second=num_rows / seconds,
        world_size=trainer.accelerator.num_processes,
        device=trainer.args.device.type,
        effective_batch_size=rows_of_a_step,
        learning_rate=trainer.args.learning_rate,
        log=trainer.state.log_history,
        truncated=truncated,
        other_tokens=other_tokens,
    )


def _checkpoint_to_go_on_from(options: TrainingOptions) -> Path | None:
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


def rows_cut(data: Data, processor: Processor, plan: TrainingPlan) -> Truncated | None:
    """Count the rows of each split that a training reads or its model is scored on, and those of them that are cut.

    Args:
        data: the rows.
        processor: the student's; None is returned where it reads images.
        plan: with teachers, the training reads unlabelled rows too.
    """
    return data.truncated(processor, unlabelled=bool(plan.teachers))


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
        if location is None or KINDS[kind].reads == "images":
            continue
        own = load_processor(location, kind, data.max_length)
        if tokenizer_fingerprint(own) == tokenizer_fingerprint(processor):
            continue
        tokenizers, prefix = (processor, own), own_columns(number)
        train = _with_own_inputs(train, data.training_rows(own, unlabelled=True), tokenizers, prefix)
        validation = _with_own_inputs(validation, data.tokenized(scored, own), tokenizers, prefix)
    return ReadRows(processor, train, validation)


def rows_left_out(rows: ReadRows, options: TrainingOptions, plan: TrainingPlan) -> OtherTokens | None:
    """Count the training rows that losses of tokens leave out, for each teacher with other tokens than the student.

    Args:
        rows: as the student reads them, with what each teacher reads otherwise.
        options: of the training.
        plan: names the teachers.

    Returns:
        None where there are no such teachers, or no such losses.

    Raises:
        InputError: hardly a row is left.
    """
    if not isinstance(options, DistillationConfig) or not token_losses(options):
        return None
    found: OtherTokens = {}
    for number, teacher in enumerate(plan.teachers):
        column = f"{own_columns(number)}{SAME_TOKENS}"
        if teacher is None or column not in rows.train.column_names:
            continue
        same = pc.sum(rows.train.with_format("arrow")[column][:]).as_py()
        if same < _FEWEST_COMPARED * len(rows.train):
            raise InputError(*comparable(options, [plan.config, teacher.config], same_tokens=False))
        found[teacher.reference] = {"rows": len(rows.train), "left_out": len(rows.train) - same}
    return found or None


def _with_own_inputs(
    rows: datasets.Dataset, others: datasets.Dataset, tokenizers: tuple[Processor, Processor], prefix: str
) -> datasets.Dataset:
    """Rows with what a teacher reads otherwise than the student: all of its inputs, and which rows are the same tokens;
    or where all are, the token types that one of the two is not given.

    Args:
        rows: as the student reads them.
        others: as the teacher does.
        tokenizers: the student's and the teacher's.
        prefix: of the new columns.
    """
    processor, own = tokenizers
    if token_fingerprint(own) != token_fingerprint(processor):
        names = [name for name in own.model_input_names if name in others.column_names]
        same = same_tokens(rows, others, processor, own)
        return beside(rows, others, names, prefix).add_column(f"{prefix}{SAME_TOKENS}", same)
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
