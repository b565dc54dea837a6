"""What training and evaluation change around them for their time: models' modes and devices, the process's settings."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from distill.common.distributed import AcceleratorSnapshot
from distill.common.hardware import available_cores, freed_memory_kept
from distill.common.private_names import put_forward, take_prepared_forward
from distill.compression.student import dropout
from distill.models.modes import fast_attention, modes_kept
from distill.models.packing import packed
from distill.training.config import DistillationConfig, TrainingConfig
from distill.training.features import FeatureExtractor

# What `transformers.enable_full_determinism` writes into the environment.
_OF_DETERMINISM = (
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
    "FLASH_ATTENTION_DETERMINISTIC",
)
_HOOKS_OF_TRAINER = ("make_inputs_require_grads", "neftune_post_forward_hook")


class RunConditions:
    """What holds while a trainer's models compute, in training and outside of it; all is put back afterwards.

    It is made when the trainer's Accelerate state is set up, which it remembers.

    Args:
        student: the model that is trained, without what is wrapped around it.
        teachers: the teachers' models.
        args: the trainer's arguments.
        device: where teachers compute.
        extractors: those that read what the losses compare.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teachers: Sequence[PreTrainedModel],
        *,
        args: TrainingConfig,
        device: torch.device,
        extractors: Sequence[FeatureExtractor],
    ):
        self.accelerate = AcceleratorSnapshot()
        self._student, self._teachers, self._extractors = student, teachers, extractors
        self._args, self._device = args, device
        self._prepared_forward: dict[str, Any] = {}
        self._is_running = False

    def forget_prepared_forward(self) -> None:
        """Let Accelerate prepare the student anew."""
        self._prepared_forward = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Teachers lie on the device, and what the losses compare can be read; within itself it changes nothing."""
        if self._is_running:  # an evaluation in the middle of a training
            yield
            return
        self._is_running = True
        try:
            with ExitStack() as stack:
                stack.enter_context(self.accelerate.restored())
                stack.enter_context(verbosity_of(self._args))
                stack.enter_context(determinism(self._args.full_determinism))
                if self._args.device.type == "cpu":
                    stack.enter_context(available_cores())
                stack.enter_context(modes_kept([self._student]))
                stack.enter_context(using_cache(self._student.config, self._args.use_cache))
                stack.enter_context(self._forward_as_prepared())
                stack.enter_context(on_device(self._teachers, self._device))
                for extractor in self._extractors:
                    stack.enter_context(extractor.attached())
                yield
        finally:
            self._is_running = False

    @contextmanager
    def training(self, longest: int) -> Iterator[None]:
        """`running`, with attention, dropout, packing and memory as they are in a training.

        Args:
            longest: tokens of the longest training row.
        """
        student, args = self._student, self._args
        models = [student, *self._teachers]
        probability = args.dropout if isinstance(args, DistillationConfig) else None
        embeddings = list(student.get_input_embeddings().parameters()) if args.freeze_embeddings else []
        with (
            self.running(),
            freed_memory_kept() if args.device.type == "cpu" else nullcontext(),
            frozen(embeddings),
            checkpointing_kept(student),
            hooks_of_trainer_removed(student),
            fast_attention(models, longest, args.device),
            dropout(student, probability),
            packed(models) if args.packing else nullcontext(),
        ):
            yield

    @contextmanager
    def _forward_as_prepared(self) -> Iterator[None]:
        """A student without a teacher is what Accelerate puts its autocast around, for good; here for the run."""
        put_forward(self._student, self._prepared_forward)
        try:
            yield
        finally:
            self._prepared_forward = take_prepared_forward(self._student)


@contextmanager
def on_device(models: Sequence[PreTrainedModel], device: torch.device) -> Iterator[None]:
    """The models on a device; each lies again where it lay afterwards. What `device_map` has spread out stays so."""
    moved = [(model, model.device) for model in models if _lies_elsewhere(model, device)]
    try:
        for model, _ in moved:
            model.to(device)
        yield
    finally:
        for model, before in moved:
            model.to(before)


def _lies_elsewhere(model: PreTrainedModel, device: torch.device) -> bool:
    return model.device != device and len(getattr(model, "hf_device_map", None) or ()) < 2


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that get no gradient."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


@contextmanager
def checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """Which blocks are computed twice to save memory is afterwards as it was before."""
    name = "gradient_checkpointing"
    before = {module: getattr(module, name) for module in model.modules() if hasattr(module, name)}
    try:
        yield
    finally:
        for module, on in before.items():
            if getattr(module, name) != on:
                setattr(module, name, on)


@contextmanager
def hooks_of_trainer_removed(model: nn.Module) -> Iterator[None]:
    """No hook is left that transformers puts on word embeddings for checkpointing, or for NEFTune if it fails."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, own in before.items():
            hooks = module._forward_hooks
            for added in set(hooks) - own:
                if getattr(hooks[added], "__name__", None) in _HOOKS_OF_TRAINER:
                    del hooks[added]


@contextmanager
def using_cache(config: PretrainedConfig, use_cache: bool | None) -> Iterator[None]:
    """Whether a language model keeps keys and values for the next token, by its config."""
    if getattr(config, "use_cache", None) is None:
        yield
        return
    before, config.use_cache = config.use_cache, use_cache
    try:
        yield
    finally:
        config.use_cache = before


@contextmanager
def verbosity_of(args: TrainingArguments) -> Iterator[None]:
    """transformers' log level as `log_level` says."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(args.get_process_log_level())
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def determinism(full: bool) -> Iterator[None]:
    """torch's deterministic kernels and the environment that they need, where `full_determinism` is asked for.

    `transformers.enable_full_determinism` leaves them on for the rest of the process, and draws a seed anew.
    """
    if not full:
        yield
        return
    kernels, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn
    warns, flags = torch.is_deterministic_algorithms_warn_only_enabled(), (cudnn.deterministic, cudnn.benchmark)
    environment = {name: os.environ.get(name) for name in _OF_DETERMINISM}
    try:
        os.environ.update({"CUDA_LAUNCH_BLOCKING": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"})
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(kernels, warn_only=warns)
        cudnn.deterministic, cudnn.benchmark = flags
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
