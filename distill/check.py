"""What a recipe will do, told before it does it: students, labels, layers, bytes and expected time."""

import copy
import math
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from distill.batches import row_lengths
from distill.cache import show_bytes
from distill.config import TrainingConfig
from distill.console import log, results
from distill.models import from_config, load_processor
from distill.pipeline import is_finished
from distill.plan import Plan, PlannedStep
from distill.representations import show_pairs
from distill.steps import DistillOptions, QuantizeOptions, teachers_of
from distill.teacher import FROM_DATA
from distill.trainer import DistillationTrainer

_TIMED_BATCHES = 3


@dataclass(frozen=True)
class Estimate:
    """What one step will need."""

    num_parameters: int
    weight_bytes: int
    """Of the model that the step makes."""
    training_bytes: int | None
    """Weights, gradients, AdamW's two moments, and the teacher's weights; activations come on top."""
    optimizer_steps: int | None
    seconds: float | None
    """Of its training, from batches timed on this machine."""
    cache_bytes: int = 0
    """Of its teachers' outputs, on disk."""


def print_plan(plan: Plan) -> None:
    """Everything that `distill check` tells of a recipe that can run."""
    data, task = plan.data, plan.data.task
    rows = ", ".join(f"{split} {len(rows)}" for split, rows in data.splits.items())
    results.print(f"[bold]{plan.recipe.path}[/] → {plan.recipe.output_dir}")
    results.print(f"task: {plan.recipe.task or task.kind}, scored by {task.primary_metric}; baseline: {plan.baseline}")
    results.print(f"labels: {', '.join(task.label_names or ('a score',))}")
    results.print(f"rows: {rows}; at most {data.max_length} tokens each")
    for note in data.notes:
        results.print(f"note: {note}")
    total = 0.0
    for name, planned in plan.steps.items():
        with log.status(f"{name}: timing a few batches"):
            estimate = estimate_step(plan, planned)
        results.print(f"\n[bold]{name}[/]: {planned.step.run} of {', '.join(planned.parents)}")
        results.print(
            f"  {estimate.num_parameters / 1e6:.1f} M parameters, {estimate.weight_bytes / 1e6:.1f} MB of weights"
        )
        if planned.layers is not None:
            results.print(f"  source layers {', '.join(map(str, planned.layers))} (from 0)")
        for teacher, pairs in planned.layer_pairs.items():
            for part, layers in pairs.items():
                results.print(f"  {part} loss: {show_pairs(layers)} (student→{teacher}; 0 is the embeddings)")
        if is_finished(planned):
            results.print("  finished already")
        elif estimate.seconds is not None and estimate.training_bytes is not None:
            total += estimate.seconds
            results.print(
                f"  {estimate.optimizer_steps} optimizer steps, about {_duration(estimate.seconds)}; "
                f"{estimate.training_bytes / 1e6:.0f} MB for weights, gradients and optimizer, activations on top"
            )
            if estimate.cache_bytes:
                results.print(f"  {show_bytes(estimate.cache_bytes)} of teacher outputs cached on disk")
    results.print(f"\nabout {_duration(total)} of training on this machine")


def estimate_step(plan: Plan, planned: PlannedStep) -> Estimate:
    """Sizes from the configs alone, time from a few real batches through randomly initialised models."""
    options = planned.step.options
    with torch.device("meta"):
        skeleton = from_config(planned.config, plan.data.task.kind)
    num_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    if isinstance(options, QuantizeOptions):
        weights = options.planned_size(skeleton)
        return Estimate(num_parameters, weights, None, None, None)
    training_bytes = 16 * num_parameters
    teacher_configs = _teacher_configs(plan, planned)
    with torch.device("meta"):
        for config in teacher_configs:
            training_bytes += 4 * sum(
                parameter.numel() for parameter in from_config(config, plan.data.task.kind).parameters()
            )
    with tempfile.TemporaryDirectory() as scratch:  # Trainer makes its output folder when it is built
        return Estimate(
            num_parameters,
            4 * num_parameters,
            training_bytes,
            *_timed(plan, planned, options, teacher_configs, scratch),
        )


def _timed(
    plan: Plan, planned: PlannedStep, options: TrainingConfig, teacher_configs: list[PretrainedConfig], scratch: str
) -> tuple[int, float, int]:
    """(optimizer steps, seconds, bytes of cached teachers), from training steps over short, middling and long rows."""
    timed, kind = copy.copy(options), plan.data.task.kind
    timed.output_dir, timed.disable_tqdm, timed.report_to = scratch, True, []
    tokenizer = load_processor(planned.tokenizer_location, kind, plan.data.max_length)
    rows = plan.data.training_rows(tokenizer, unlabelled=isinstance(planned.step.options, DistillOptions))
    trainer = DistillationTrainer(
        model=from_config(planned.config, kind),
        teacher=[
            *(from_config(config, kind) for config in teacher_configs),
            *([FROM_DATA] * (FROM_DATA in teachers_of(planned.step.given))),
        ],
        args=timed,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    lengths = row_lengths(rows, "length")
    order, size = np.arange(len(rows)) if lengths is None else np.argsort(lengths), options.per_device_train_batch_size
    read = trainer.reader(rows, "timing")
    plans = trainer.planned_caches()
    in_steps, in_caches = [], []
    for position in [0.5, *((np.arange(_TIMED_BATCHES) + 0.5) / _TIMED_BATCHES)]:  # the first one warms up
        start = int(position * max(len(rows) - size, 0))
        batch = read(order[start : start + size].tolist())
        began = time.perf_counter()
        trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], options.device))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        stepped = time.perf_counter()
        for teacher, cached in plans:
            if cached.layout is not None:
                teacher.outputs(trainer._completed(batch))
        in_caches.append(time.perf_counter() - stepped)
        in_steps.append(stepped - began - in_caches[-1])
    micro_batches, steps = _count_steps(options, len(trainer.get_train_dataloader()))
    batches_to_cache = len(rows) / size / options.world_size
    seconds = micro_batches * np.mean(in_steps[1:]) + batches_to_cache * np.mean(in_caches[1:])
    return steps, float(seconds), sum(cached.size for _, cached in plans)


def _count_steps(options: TrainingConfig, batches_of_an_epoch: int) -> tuple[int, int]:
    """(micro-batches of one process, optimizer steps)."""
    if options.max_steps > 0:
        return options.max_steps * options.gradient_accumulation_steps, options.max_steps
    steps = math.ceil(math.ceil(batches_of_an_epoch / options.gradient_accumulation_steps) * options.num_train_epochs)
    return math.ceil(batches_of_an_epoch * options.num_train_epochs), steps


def _teacher_configs(plan: Plan, planned: PlannedStep) -> list[PretrainedConfig]:
    teachers = [name for name in teachers_of(planned.step.given) if name != FROM_DATA]
    return [plan.steps[name].config if name in plan.steps else plan.sources[name].config for name in teachers]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
