"""What a recipe will do, told before it does it: students, labels, layers, memory and expected time."""

import copy
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from distill.common.console import log, results, styled
from distill.common.distributed import forget_precision, process_state
from distill.compression.quantization.formats import QuantizationSettings, choose_formats
from distill.compression.quantization.quantize import apply_formats, weight_memory
from distill.compression.replacements import Format, formats_of
from distill.data.batches import row_lengths
from distill.data.load import describe_cut
from distill.errors import InputError
from distill.models.adapters import in_float32, lora_config, with_adapters
from distill.models.load import (
    from_config,
    label_order,
    load_processor,
    set_labels,
    size_on_disk,
)
from distill.recipes.finished import is_finished, pending_reruns, remarks_on
from distill.recipes.plan import Plan, PlannedStep
from distill.recipes.recipe import located, problem_at
from distill.tasks.base import Task, TaskKind
from distill.training.cache_plan import show_bytes
from distill.training.config import TrainingConfig
from distill.training.features import show_pairs
from distill.training.teachers import FROM_DATA
from distill.training.trainer import DistillationTrainer
from distill.verbs.options import (
    DistillOptions,
    FinetuneOptions,
    QuantizeOptions,
    StudentOptions,
    is_adapter,
    teachers_of,
)
from distill.verbs.training import batch_of, read_rows, rows_cut

_TIMED_BATCHES = 3
_SETTINGS = {field.name for field in fields(QuantizationSettings)}


@dataclass(frozen=True)
class Memory:
    """Bytes that a step holds at once; the teachers' own activations, which are short-lived, are left out."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    teachers: int = 0
    activations: int = 0
    """What the forward of the longest batch keeps for its backward."""

    @property
    def peak(self) -> int:
        """All together."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in asdict(self).items() if size)
        return f"{self.peak / 1e6:.1f} MB of memory at the peak ({parts})"


@dataclass(frozen=True)
class Estimate:
    """What one step will need."""

    num_parameters: int
    weight_bytes: int
    """Of the model that the step makes."""
    memory: Memory
    batch: str | None = None
    """The rows of an optimizer step, and how processes share them."""
    optimizer_steps: int | None = None
    seconds: float | None = None
    """Of its training, from batches timed on this machine."""
    cache_bytes: int = 0
    """Of its teachers' outputs, on disk."""


def print_plan(plan: Plan) -> None:
    """Everything that `distill check` tells of a recipe that can run; from the main process, while all take part."""
    if not process_state().is_main_process:
        for planned in plan.steps.values():
            estimate_step(plan, planned)
        return
    data, task = plan.data, plan.data.task
    rows = ", ".join(f"{split} {len(rows)}" for split, rows in data.splits.items())
    results.print(styled((str(plan.recipe.path), "bold"), f" → {plan.recipe.output_dir}"))
    results.print(f"task: {plan.recipe.task or task.kind}, scored by {task.primary_metric}; baseline: {plan.baseline}")
    results.print(f"labels: {', '.join(task.label_names or ('a score',))}")
    results.print(f"rows: {rows}; at most {data.max_length} tokens each")
    for note in data.notes:
        results.print(f"note: {note}")
    total, said, reruns = 0.0, list[str](), pending_reruns(plan.recipe.output_dir)
    for name, planned in plan.steps.items():
        with log.status(f"{name}: timing a few batches"):
            estimate = estimate_step(plan, planned)
        results.print(styled("\n", (name, "bold"), f": {planned.step.run} of {', '.join(planned.parents)}"))
        results.print(f"  {_size(estimate.num_parameters, estimate.weight_bytes)}")
        for line in _inputs(plan, planned):
            results.print(f"  {line}")
        for note in planned.notes:
            results.print(f"  note: {note}")
        if isinstance(planned.step.options, FinetuneOptions | DistillOptions):
            processor = load_processor(planned.tokenizer_location, task.kind)
            cut = describe_cut(rows_cut(data, processor, planned.step.options))
            if cut is not None and cut not in said:  # each tokenizer's once
                results.print(f"  {cut}")
                said.append(cut)
        if planned.layers is not None:
            results.print(f"  source layers {', '.join(map(str, planned.layers))} (from 0)")
        elif isinstance(planned.step.options, StudentOptions):
            results.print("  new weights")
        if isinstance(planned.step.options, TrainingConfig) and planned.step.options.qat is not None:
            results.print(f"  {_awareness(planned.step.options)}")
        for teacher, pairs in planned.layer_pairs.items():
            for part, layers in pairs.items():
                results.print(f"  {part} loss: {show_pairs(layers)} (student→{teacher}; 0 is the embeddings)")
        if name in reruns:
            results.print("  will be made anew, as --rerun asked a run that was stopped")
        if is_finished(planned) and name not in reruns:
            for line in ["finished already", *remarks_on(planned)]:
                results.print(f"  {line}")
        elif estimate.seconds is None:
            results.print(f"  about {estimate.memory}")
        else:
            total += estimate.seconds
            results.print(f"  {estimate.optimizer_steps} optimizer steps, about {_duration(estimate.seconds)}")
            results.print(f"  {estimate.batch}")
            results.print(f"  about {estimate.memory}")
            if estimate.cache_bytes:
                results.print(f"  {show_bytes(estimate.cache_bytes)} of teacher outputs cached on disk")
    results.print(f"\nabout {_duration(total)} of training on this machine")
    for name, repo_id in plan.recipe.push.items():
        results.print(f"then {name} is pushed to {repo_id}")


def _inputs(plan: Plan, planned: PlannedStep) -> list[str]:
    """Commits of models on the Hub, the teachers' sizes, and how labels of models from outside stand to the task's."""
    lines, options, kind = [], planned.step.options, plan.data.task.kind
    for source in (plan.sources[name] for name in planned.parents if name in plan.sources):
        if source.revision is not None:
            lines.append(f"{source.reference}: commit {source.revision}")
    for name, config in _teacher_configs(plan, planned):
        num_parameters = _num_parameters(config, kind)
        lines.append(f"teacher {name}: {_size(num_parameters, 4 * num_parameters)}")
    label_map: dict[str, str] | None = None
    with_heads: list[str] = [name for name, _ in _teacher_configs(plan, planned)]
    if isinstance(options, DistillOptions):
        label_map = options.teacher_label_map
    elif isinstance(options, QuantizeOptions):
        with_heads, label_map = [*planned.parents], options.label_map
    for name in with_heads:
        if name in plan.sources and plan.data.task.label_names:
            config = plan.sources[name].config
            order = label_order(config, plan.data.task, label_map, where=name)
            task_labels = enumerate(plan.data.task.label_names)
            pairs = zip(order or range(config.num_labels), task_labels, strict=True)
            shown = ", ".join(f"{its} {config.id2label[its]} → {ours} {label}" for its, (ours, label) in pairs)
            lines.append(f"labels of {name}: {shown}")
    return lines


def estimate_step(plan: Plan, planned: PlannedStep) -> Estimate:
    """Sizes from the configs alone, time and memory from a few real batches through randomly initialised models.

    Raises:
        InputError: with the step's name, what its training would stop at.
    """
    try:
        return _estimate(plan, planned)
    except InputError as error:
        where, recipe = f"steps.{planned.step.name}", plan.recipe
        problems = [problem_at(where, problem) for problem in error.problems]
        raise InputError(*(located(problem, recipe.path, recipe.flags) for problem in problems)) from None


def _estimate(plan: Plan, planned: PlannedStep) -> Estimate:
    options = planned.step.options
    with torch.device("meta"):
        skeleton = from_config(planned.config, plan.data.task.kind)
    num_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    if isinstance(options, QuantizeOptions):
        weights = options.planned_size(skeleton)
        return Estimate(num_parameters, weights, Memory(weights=4 * num_parameters + weights))
    student, adapted_bytes = _stand_in(plan, planned, options)
    weights = 4 * num_parameters
    if options.lora is not None and is_adapter(options):
        adapted = with_adapters(skeleton, lora_config(options.lora, plan.data.task.kind))
        adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        num_parameters, weights = num_parameters + adapters, adapted_bytes + 4 * adapters
    with tempfile.TemporaryDirectory() as scratch:  # Trainer makes its output folder when it is built
        return Estimate(num_parameters, weights, *_timed(plan, planned, options, student, scratch))


def _stand_in(
    plan: Plan, planned: PlannedStep, options: FinetuneOptions | DistillOptions
) -> tuple[PreTrainedModel, int]:
    """The model that a step trains, with new weights, and what the one that it starts from weighs on disk; quantized
    where that one is.
    """
    model, source = from_config(planned.config, plan.data.task.kind), options.model or ""
    size = 4 * model.num_parameters()
    formats: Mapping[str, Format] = {}
    given: dict[str, Any] = {}
    made = plan.steps[source].step.options if source in plan.steps else None
    outside = formats_of(plan.sources[source].config) if source in plan.sources else ({}, {})
    if isinstance(made, QuantizeOptions):
        size, given = made.planned_size(model), asdict(made)
        given["format"] = made.format or "nf4"  # as most that a budget picks
    elif outside[0]:
        size, (formats, given) = size_on_disk(Path(plan.sources[source].location)), outside
    settings = QuantizationSettings(**{name: given[name] for name in _SETTINGS & given.keys()})
    if settings.format not in (None, "bf16"):
        formats = choose_formats(model, settings)
    return (apply_formats(model, formats, settings) if formats else model), size


def _timed(
    plan: Plan,
    planned: PlannedStep,
    options: FinetuneOptions | DistillOptions,
    student: PreTrainedModel,
    scratch: str,
) -> tuple[Memory, str, int, float, int]:
    """(memory, rows of a step, optimizer steps, seconds, bytes of cached teachers), from training steps over the
    longest rows, which warm up, and then over short, middling and long ones.
    """
    timed, kind = copy.copy(options), plan.data.task.kind
    timed.output_dir, timed.disable_tqdm, timed.report_to = scratch, True, []
    timed.qat_delay = 0.0  # the steps that take longer
    teachers = [None if name == FROM_DATA else _model(plan, name) for name in teachers_of(planned.step.given)]
    read_from = [None if teacher is None else teacher[1] for teacher in teachers]
    inputs = read_rows(plan.data, planned.tokenizer_location, read_from)
    rows = inputs.train
    forget_precision()
    trainer = DistillationTrainer(
        model=student,
        teacher=[FROM_DATA if teacher is None else _teacher(teacher[0], plan.data.task) for teacher in teachers],
        args=timed,
        peft_config=None if options.lora is None else lora_config(options.lora, kind),
        train_dataset=rows,
        eval_dataset=inputs.validation,
        processing_class=inputs.processor,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "check: steps under FSDP or DeepSpeed can't be timed on their own; check with --accelerate_config multi_gpu"
        )
    trainer.create_optimizer()
    lengths = row_lengths(rows, "length")
    order, size = np.arange(len(rows)) if lengths is None else np.argsort(lengths), options.per_device_train_batch_size
    read = trainer.batch_reader()
    plans = trainer.planned_caches()

    def step(position: float) -> tuple[float, float]:
        """Seconds of a training step, and of what is cached of the teachers, at a place from short to long rows."""
        start = int(position * max(len(rows) - size, 0))
        batch = read(order[start : start + size].tolist(), 0)
        began = time.perf_counter()
        trainer.begin_quantized_step()
        with trainer.accelerator.autocast():  # as the prepared model has it in training
            trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], options.device))
        trainer.optimizer.step()
        stepped = time.perf_counter()
        for teacher, cached in plans:
            if cached.layout is not None:
                teacher.outputs(trainer.rows.completed(trainer._prepare_inputs(batch)))
        in_caches = time.perf_counter() - stepped
        return stepped - began - in_caches, in_caches

    with trainer.training_conditions(), in_float32(trainer.student):
        parameters = list(trainer.model.parameters())
        with kept_for_backward(parameters) as activations:
            step(1.0)
        memory = Memory(
            weights=weight_memory(trainer.model),
            gradients=_bytes(each.grad for each in parameters if each.grad is not None),
            optimizer=_bytes(
                each for state in trainer.optimizer.state.values() for each in state.values() if torch.is_tensor(each)
            ),
            teachers=_bytes(
                each for teacher in trainer.teachers if teacher.model for each in teacher.model.parameters()
            ),
            activations=sum(activations.values()),
        )
        seconds = []
        for number in range(_TIMED_BATCHES):
            trainer.optimizer.zero_grad()
            seconds.append(step((number + 0.5) / _TIMED_BATCHES))
    in_step, in_caches = np.mean(seconds, axis=0)
    micro_batches, steps = _count_steps(options, len(trainer.get_train_dataloader()))
    expected = micro_batches * in_step + len(rows) / size / options.world_size * in_caches
    return memory, batch_of(trainer)[1], steps, float(expected), sum(cached.size for _, cached in plans)


@contextmanager
def kept_for_backward(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for a backward, by address; parameters' own are left out.

    Each is counted once, however many views of it are kept; all of them live until the backward begins.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _awareness(options: TrainingConfig) -> str:
    """What a quantization-aware step trains with, and from when on."""
    parts = [f"{options.qat} weights", f"{options.qat_embeddings} embeddings"]
    parts[-1] = "embeddings as they are" if options.qat_embeddings == "none" else parts[-1]
    if options.qat_activations:
        parts.append("8-bit inputs")
    delay = f"{options.qat_delay:.0%} of its steps" if options.qat_delay < 1 else f"{options.qat_delay:.0f} steps"
    return f"quantization-aware: {', '.join(parts)}" + (f", after {delay}" if options.qat_delay else "")


def _count_steps(options: TrainingConfig, batches_of_an_epoch: int) -> tuple[int, int]:
    """(micro-batches of one process, optimizer steps)."""
    if options.max_steps > 0:
        return options.max_steps * options.gradient_accumulation_steps, options.max_steps
    steps = math.ceil(math.ceil(batches_of_an_epoch / options.gradient_accumulation_steps) * options.num_train_epochs)
    return math.ceil(batches_of_an_epoch * options.num_train_epochs), steps


def _teacher_configs(plan: Plan, planned: PlannedStep) -> list[tuple[str, PretrainedConfig]]:
    return [(name, _model(plan, name)[0]) for name in teachers_of(planned.step.given) if name != FROM_DATA]


def _model(plan: Plan, name: str) -> tuple[PretrainedConfig, str]:
    """The config of a step's model or of one from outside, and where its tokenizer lies."""
    if name in plan.steps:
        return plan.steps[name].config, plan.steps[name].tokenizer_location
    return plan.sources[name].config, plan.sources[name].location


def _teacher(config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """A stand-in for a teacher, its labels in the task's order, as loading leaves them."""
    labelled = copy.deepcopy(config)
    set_labels(labelled, task)
    return from_config(labelled, task.kind)


def _num_parameters(config: PretrainedConfig, kind: TaskKind) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in from_config(config, kind).parameters())


def _size(num_parameters: int, weight_bytes: int) -> str:
    return f"{num_parameters / 1e6:.1f} M parameters, {weight_bytes / 1e6:.1f} MB of weights"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
