"""What a training will need: sizes from its config, time and memory from a few real batches through new weights."""

import copy
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from distill.common.distributed import forget_precision
from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.quantize import apply_formats, weight_memory
from distill.compression.replacements import formats_of
from distill.data.batches import row_lengths
from distill.data.load import Data
from distill.errors import InputError
from distill.models.adapters import in_float32, lora_config, with_adapters
from distill.models.labels import set_labels
from distill.models.load import from_config
from distill.tasks.base import Task
from distill.training.config import TrainingConfig
from distill.training.teachers import FROM_DATA
from distill.training.trainer import DistillationTrainer
from distill.verbs.base import Estimate, Memory
from distill.verbs.training.options import TrainingOptions
from distill.verbs.training.planning import TrainingPlan
from distill.verbs.training.train import batch_of, read_rows, rows_cut, rows_left_out

_TIMED_BATCHES = 3
_SETTINGS = {field.name for field in fields(QuantizationSettings)}


def estimate_training(options: TrainingOptions, plan: TrainingPlan, data: Data) -> Estimate:
    """Sizes, memory and time of a training.

    Args:
        options: of the step.
        plan: of the step.
        data: its rows, of which a few are trained on.

    Raises:
        InputError: what the training would stop at.
    """
    kind = data.task.kind
    with torch.device("meta"):
        skeleton = from_config(plan.config, kind)
    num_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    student, weights = _stand_in(plan, data), 4 * num_parameters
    if options.lora is not None and plan.is_adapter:
        adapted = with_adapters(skeleton, lora_config(options.lora, kind))
        adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        beneath = weights if plan.source.weight_bytes is None else plan.source.weight_bytes
        num_parameters, weights = num_parameters + adapters, beneath + 4 * adapters
    with tempfile.TemporaryDirectory() as scratch:  # Trainer makes its output folder when it is built
        return _timed(options, plan, data, student, scratch, sizes=(num_parameters, weights))


def _stand_in(plan: TrainingPlan, data: Data) -> PreTrainedModel:
    """The model that a step trains, with new weights; quantized where the one that it starts from is."""
    model = from_config(plan.config, data.task.kind)
    formats, given = formats_of(plan.source.config)
    if not formats:
        return model
    settings = QuantizationSettings(**{name: given[name] for name in _SETTINGS & given.keys()})
    return apply_formats(model, formats, settings)


def _timed(
    options: TrainingOptions,
    plan: TrainingPlan,
    data: Data,
    student: PreTrainedModel,
    scratch: str,
    *,
    sizes: tuple[int, int],
) -> Estimate:
    """What training steps over the longest rows need, which warm up, and then over short, middling and long ones.

    Args:
        options: of the step.
        plan: of the step.
        data: its rows.
        student: a stand-in for it.
        scratch: a folder that is thrown away.
        sizes: parameters and bytes of weights that the step will leave.
    """
    timed, kind = copy.copy(options), data.task.kind
    timed.output_dir, timed.disable_tqdm, timed.report_to = scratch, True, []
    timed.qat_delay = 0.0  # the steps that take longer
    read_from = [None if teacher is None else teacher.tokenizer_location for teacher in plan.teachers]
    inputs = read_rows(data, plan.source.tokenizer_location, read_from)
    rows, other_tokens = inputs.train, rows_left_out(inputs, options, plan)
    forget_precision()
    trainer = DistillationTrainer(
        model=student,
        teacher=[FROM_DATA if teacher is None else _teacher(teacher.config, data.task) for teacher in plan.teachers],
        args=timed,
        layer_pairs=plan.pairs_of_teachers,
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
    caches = trainer.planned_caches()

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
        for teacher, cached in caches:
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
    return Estimate(
        num_parameters=sizes[0],
        weight_bytes=sizes[1],
        memory=memory,
        batch=batch_of(trainer)[1],
        optimizer_steps=steps,
        seconds=float(expected),
        cache_bytes=sum(cached.size for _, cached in caches),
        truncated=rows_cut(data, inputs.processor, plan),
        other_tokens=other_tokens,
    )


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


def _count_steps(options: TrainingConfig, batches_of_an_epoch: int) -> tuple[int, int]:
    """(micro-batches of one process, optimizer steps)."""
    if options.max_steps > 0:
        return options.max_steps * options.gradient_accumulation_steps, options.max_steps
    steps = math.ceil(math.ceil(batches_of_an_epoch / options.gradient_accumulation_steps) * options.num_train_epochs)
    return math.ceil(batches_of_an_epoch * options.num_train_epochs), steps


def _teacher(config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """A stand-in for a teacher, its labels in the task's order, as loading leaves them."""
    labelled = copy.deepcopy(config)
    set_labels(labelled, task)
    return from_config(labelled, task.kind)
