"""What a training would stop at, found before it: a trainer is built on stand-ins, and takes one empty step."""

import copy
import gc
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, PreTrainedModel, TrainerCallback, TrainerControl
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from distill.common.distributed import forget_precision
from distill.data.load import Data
from distill.errors import InputError, in_one_line, nearest_name
from distill.models.adapters import lora_config
from distill.models.load import from_config
from distill.models.packing import packed
from distill.tasks.base import TaskKind
from distill.training.config import DistillationConfig
from distill.training.parts import COUNTS
from distill.training.teachers import FROM_DATA
from distill.training.trainer import DistillationTrainer
from distill.verbs.training.options import TrainingOptions
from distill.verbs.training.planning import TrainingPlan
from distill.verbs.training.train import read_rows, rows_left_out

_SHARDING = ("fsdp", "deepspeed")
_CHECKPOINTING_OF_TRANSFORMERS = ("every_n_layers", "offload")  # all others are torch's
_LARGEST_SIDES = (64, 64, 8, 8)
"""Of a stand-in's weights; in a matrix as many as bitsandbytes needs to hold an optimizer's state in 8 bit."""


def training_problems(options: TrainingOptions, plan: TrainingPlan, data: Data | None) -> list[str]:
    """What a step's training would stop at, each problem with the option where it is known.

    Args:
        options: of the step.
        plan: of the step.
        data: None where it can't be read; then only what no model is needed for is looked at.
    """
    problems = [*_logger_problems(options), *_outside_problems(options)]
    if data is not None:
        problems += _batch_problems(options, data, unlabelled=bool(plan.teachers))
    if not problems and data is not None and not plan.same_tokens:
        problems = _token_problems(options, plan, data)
    if not problems and data is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training says them
            problems = _rehearsal_problems(options, plan, data.task.kind)
    return problems


def _logger_problems(options: TrainingOptions) -> list[str]:
    """Loggers in `report_to` that don't exist, or whose packages are not installed."""
    try:
        callbacks = get_reporting_integration_callbacks(options.report_to)
    except ValueError as error:
        return [f"report_to: {in_one_line(error)}"]
    failures = [failure for callback in callbacks if (failure := _failure_of(callback)) is not None]
    return [f"report_to: {failure.rstrip('.')}; install it, or leave it out" for failure in failures]


def _failure_of(callback: Callable[[], Any]) -> str | None:
    """What a logger's callback raises where its package is missing or not set up."""
    shown = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # the destructors of some, half made, would print a traceback
    try:
        callback()
    except Exception as error:  # of whatever kind
        return in_one_line(error)
    finally:
        sys.unraisablehook = shown
    return None


def _outside_problems(options: TrainingOptions) -> list[str]:
    """Options that need an accelerator or a package, or that only a forward would stumble over."""
    problems = []
    if options.use_cpu and options.fp16:
        problems.append("fp16: needs a GPU; on a CPU say bf16: true, or leave it out")
    for option in _SHARDING:
        if options.use_cpu and getattr(options, option):
            problems.append(f"{option}: needs GPUs, and here is none; leave it out")
    if options.use_liger_kernel and not is_liger_kernel_available():
        problems.append("use_liger_kernel: the package liger-kernel is not installed; install it, or leave it out")
    backends = [backend.value.lower() for backend in DynamoBackend]
    if options.torch_compile_backend is not None and options.torch_compile_backend.lower() not in backends:
        nearest = nearest_name(options.torch_compile_backend, backends)
        problems.append(f"torch_compile_backend: no backend {options.torch_compile_backend!r}; {nearest}")
    if options.optim_args and not all("=" in part for part in options.optim_args.split(",")):
        problems.append(f"optim_args: should be like momentum=0.9,nesterov=true; got {options.optim_args!r}")
    if options.gradient_checkpointing and options.gradient_checkpointing_kwargs:
        given = {"use_reentrant": False, **options.gradient_checkpointing_kwargs}  # type: ignore[dict-item]
        given = {name: value for name, value in given.items() if name not in _CHECKPOINTING_OF_TRANSFORMERS}
        try:
            checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **given)
        except Exception as error:
            problems.append(f"gradient_checkpointing_kwargs: {in_one_line(error)}")
    return problems


def _batch_problems(options: TrainingOptions, data: Data, *, unlabelled: bool) -> list[str]:
    """Rows that fill no batch, of which Trainer would make a training without a step."""
    splits = ("train", "unlabelled") if unlabelled else ("train",)
    rows = sum(len(data.splits[split]) for split in splits if split in data.splits)
    batch = options.per_device_train_batch_size * options.world_size
    if not options.dataloader_drop_last or rows >= batch:
        return []
    return [f"dataloader_drop_last: leaves nothing of {rows} rows, as a batch is {batch}; leave it out"]


def _token_problems(options: TrainingOptions, plan: TrainingPlan, data: Data) -> list[str]:
    """Losses that compare tokens of a student and a teacher that read hardly a row as the same ones."""
    teachers = [None if each is None else each.tokenizer_location for each in plan.teachers]
    try:
        rows_left_out(read_rows(data, plan.source.tokenizer_location, teachers), options, plan)
    except InputError as error:
        return list(error.problems)
    return []


def _rehearsal_problems(options: TrainingOptions, plan: TrainingPlan, kind: TaskKind) -> list[str]:
    """What a trainer of stand-ins raises, from being built to the end of a training of one empty step."""
    with torch.device("meta"):
        student = from_config(plan.config, kind)
        models = [FROM_DATA if each is None else from_config(each.config, kind) for each in plan.teachers]
    stand_ins = [_with_small_weights(model) for model in (student, *models) if isinstance(model, PreTrainedModel)]
    forget_precision()
    gc.freeze()  # Trainer collects garbage before it trains, and would go through all that was ever imported
    try:
        with tempfile.TemporaryDirectory() as folder, packed(stand_ins) if options.packing else nullcontext():
            with _about(""):
                trainer = _Rehearsal(
                    model=student,
                    teacher=models,
                    args=_rehearsed(options, folder),
                    layer_pairs=plan.pairs_of_teachers,
                    peft_config=None if options.lora is None else lora_config(options.lora, kind),
                )
            trainer.rehearse()
    except InputError as error:
        return list(error.problems)
    finally:
        gc.unfreeze()
        forget_precision()
    return []


def _rehearsed(options: TrainingOptions, folder: str) -> TrainingOptions:
    """A step's options without what needs rows, writes something, or outlasts the training."""
    changed = copy.copy(options)
    changed.output_dir = folder
    changed.report_to, changed.disable_tqdm, changed.full_determinism = [], True, False
    changed.eval_strategy = changed.save_strategy = changed.logging_strategy = "no"
    changed.load_best_model_at_end, changed.eval_on_start, changed.include_num_input_tokens_seen = False, False, "no"
    if isinstance(changed, DistillationConfig):
        changed.contrastive_weight = 0.0
    if changed.max_steps < 1:
        changed.max_steps = 1000
    return changed


def _with_small_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model on meta with real weights of the same names, zeros of at most `_LARGEST_SIDES`; it has no forward."""
    small: dict[Tensor, Tensor] = {}  # tied ones stay so
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in small:
                    sides = [min(sides) for sides in zip(tensor.shape, _LARGEST_SIDES, strict=False)]
                    zeros = torch.zeros(sides, dtype=tensor.dtype)
                    small[tensor] = nn.Parameter(zeros) if isinstance(tensor, nn.Parameter) else zeros
                tensors[name] = small[tensor]
    return model


class _Rehearsal(DistillationTrainer):
    """A training that ends after its first optimizer step, whose gradients are zeros."""

    def rehearse(self) -> None:
        """Raise what Trainer would, as `InputError`."""
        args = self.args
        self.callback_handler.callbacks = [DefaultFlowCallback(), _StopAtOnce()]
        with _about("dataloader_num_workers"):
            DataLoader(
                [0],  # type: ignore[arg-type]
                num_workers=args.dataloader_num_workers,
                persistent_workers=args.dataloader_persistent_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
            )
        with _about("optim"):
            self.create_optimizer()
            self._set_gradients()
            self.optimizer.step()
        with _about("lr_scheduler_type"):
            self.create_scheduler(args.max_steps)
        if self.accelerator.num_processes == 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            with _about(""):
                transformers.Trainer.train(self)

    def _set_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _image_tokens(self) -> int:
        """None are looked for, as stand-ins have no forward."""
        return 1

    def get_train_dataloader(self) -> DataLoader:
        """One batch of no row."""
        return DataLoader([{}], collate_fn=lambda rows: rows[0])  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """That batch, which counts nothing."""
        return [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)], torch.zeros(COUNTS)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """No forward and no backward."""
        self._set_gradients()
        return torch.zeros((), device=self.args.device)


class _StopAtOnce(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


@contextmanager
def _about(option: str) -> Iterator[None]:
    """Turn whatever is raised into an `InputError` that begins with the option's name."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Trainer, Accelerate, PEFT and the optimizers' packages raise their own kinds
        raise InputError(f"{option}: {in_one_line(error)}" if option else in_one_line(error)) from error
