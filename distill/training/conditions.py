"""What training and evaluation change around them for their time: models' modes and devices, the process's settings."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerState, TrainingArguments

from distill.common.distributed import AcceleratorSnapshot
from distill.common.hardware import available_cores, freed_memory_kept
from distill.common.private_names import put_forward, take_prepared_forward
from distill.compression.quantization.engine import EngineSimulation, computed_as_exported
from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.grids import SimulatedGrids, simulated_grids, write_grids
from distill.compression.quantization.qat import FakeQuantization, check_float, check_quantizable, fake_quantized
from distill.compression.student import dropout
from distill.errors import InputError
from distill.export.problems import export_problems
from distill.models.modes import evaluating, fast_attention, modes_kept
from distill.models.packing import packed
from distill.training.checkpoints import load_ranges
from distill.training.config import DistillationConfig, TrainingConfig
from distill.training.features import ProjectedStudent
from distill.training.teachers import Teacher

# What `transformers.enable_full_determinism` writes into the environment.
_OF_DETERMINISM = (
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
    "FLASH_ATTENTION_DETERMINISTIC",
)
_CALIBRATION_ROWS = 256
_ROWS_AT_ONCE = 32
_READ_CONSTANTS = ("deberta", "deberta-v2")
"""Families whose quantized layers read what depends on no input."""
_HOOKS_OF_TRAINER = ("make_inputs_require_grads", "neftune_post_forward_hook")


class RunConditions:
    """What holds while a trainer's models compute, in training and outside of it; all is put back afterwards.

    It is made when the trainer's Accelerate state is set up, which it remembers.

    Args:
        trained: the model that is trained.
        student: the same without what is wrapped around it.
        teachers: what it is compared with.
        args: the trainer's arguments.
        device: where teachers compute.
    """

    def __init__(
        self,
        trained: nn.Module,
        student: PreTrainedModel,
        teachers: Sequence[Teacher],
        *,
        args: TrainingConfig,
        device: torch.device,
    ):
        self.accelerate = AcceleratorSnapshot()
        self._student = student
        self._teachers = [each.model for each in teachers if each.model is not None]
        self._extractors = [each.extractor for each in teachers if each.extractor is not None]
        if isinstance(trained, ProjectedStudent):
            self._extractors.append(trained.extractor)
        self._args, self._device = args, device
        self._prepared_forward: dict[str, Any] = {}
        self._is_running = False

    def forget_prepared_forward(self) -> None:
        """Let Accelerate prepare the student anew."""
        self._prepared_forward = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Teachers predict on the device, and what the losses compare can be read; within itself it changes nothing."""
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
                for teacher in self._teachers:
                    stack.enter_context(evaluating(teacher))
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


Batch = dict[str, Tensor]
Rows = tuple[int, Callable[[list[int]], Batch]]
"""How many rows there are, and what makes the batch, on the device, of those with some numbers."""


class QuantizationAwareness:
    """The student as a later `quantize` or `export` will leave it, where `qat` asks for it; else as it is.

    Args:
        student: a float model.
        args: the trainer's arguments.
        rows: gives those of the training, on some of which an engine's scales are found.

    Raises:
        InputError: a student that can't be quantized, or that the engine can't take in int8.
    """

    def __init__(self, student: PreTrainedModel, args: TrainingConfig, rows: Callable[[], Rows]):
        if args.qat_engine is not None:
            check_simulated(student, args.qat_engine)
        elif args.quantization is not None:
            check_quantizable(student, args.quantization)
        self.is_on = args.qat_engine is not None or args.quantization is not None
        self._student, self._args, self._rows = student, args, rows
        self._fake: FakeQuantization | None = None
        self._simulation: EngineSimulation | None = None

    def applied(self) -> AbstractContextManager[object]:
        """Fake weights of what the student's own are now."""
        if self._args.qat_engine is not None:
            simulation = self._simulated(self._args.qat_engine)
            if simulation.grids is None:
                simulation.calibrate(self._calibration_batches())
            return computed_as_exported(simulation)
        return nullcontext() if self._args.quantization is None else self._faked(self._args.quantization)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Fake weights that a training makes anew at each step."""
        if self._args.qat_engine is not None:
            self._simulation = self._simulated(self._args.qat_engine)
            with computed_as_exported(self._simulation):
                yield
        elif self._args.quantization is not None:
            with self._faked(self._args.quantization) as self._fake:
                yield
        else:
            yield

    def begin_step(self, state: TrainerState, gather: Callable[[Tensor], Tensor]) -> None:
        """Quantize weights anew from here on; with `qat_delay` only once it is over.

        Args:
            gather: collects a tensor N×… from all processes.
        """
        delay = self._args.qat_delay * (state.max_steps if self._args.qat_delay < 1 else 1)
        on = state.global_step >= delay
        if self._fake is not None:
            self._fake.begin_step(on=on, gather=gather)
        if self._simulation is not None:
            if on and self._simulation.grids is None:
                self._simulation.calibrate(self._calibration_batches())
            self._simulation.begin_step(on=on)
            self.move_ranges(state, gather)

    def move_ranges(self, state: TrainerState, gather: Callable[[Tensor], Tensor]) -> None:
        """Bring what the activations were since the last step into their ranges."""
        if self._fake is not None:
            self._fake.average_ranges(gather)
        if self._simulation is not None:
            self._simulation.train_ranges(state.global_step / max(state.max_steps, 1), gather)

    @property
    def grids(self) -> SimulatedGrids | None:
        """What an engine will compute in 8 bit, and on what grids, where a training has found them."""
        return None if self._simulation is None else self._simulation.grids

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the activations' ranges, beside an engine's grids; empty where that is nothing."""
        if self._simulation is not None and self.grids is not None:
            return self._simulation.state
        return {"ranges": self._fake.ranges} if self._fake is not None and self._args.qat_activations else {}

    def save(self, folder: Path) -> None:
        """Write an engine's grids beside the weights in a folder, where a training has found them."""
        if self.grids is not None:
            write_grids(folder, self.grids)

    def load(self, checkpoint: Path) -> None:
        """Go on from the activations' ranges in a checkpoint, while a training quantizes them."""
        if self._fake is not None and self._args.qat_activations:
            self._fake.ranges = load_ranges(checkpoint)["ranges"].to(self._args.device)
        if self._simulation is not None and (grids := simulated_grids(checkpoint)) is not None:
            self._simulation.take(grids.grids)
            self._simulation.load_state(load_ranges(checkpoint))

    def _faked(self, settings: QuantizationSettings) -> AbstractContextManager[FakeQuantization]:
        return fake_quantized(self._student, settings, activations=self._args.qat_activations)

    def _simulated(self, engine: str) -> EngineSimulation:
        embeddings = self._args.qat_embeddings != "none"
        return EngineSimulation(self._student, engine, embeddings=embeddings, grids=self.grids)

    def _calibration_batches(self) -> list[Batch]:
        """As many rows as an export is calibrated on, evenly spread."""
        count, read = self._rows()
        numbers = [row * count // min(count, _CALIBRATION_ROWS) for row in range(min(count, _CALIBRATION_ROWS))]
        return [read(numbers[i : i + _ROWS_AT_ONCE]) for i in range(0, len(numbers), _ROWS_AT_ONCE)]


def check_simulated(student: PreTrainedModel, engine: str) -> None:
    """Refuse a student that an engine can't compute in int8, or not as it is trained.

    Raises:
        InputError: it is quantized already, has adapters, or is of a kind or family that is not exported.
    """
    check_float(student)
    problems = [f"qat: {each.partition(': ')[2]}" for each in export_problems(student, engine, "int8", runs=False)]
    if student.config.model_type in _READ_CONSTANTS:
        problems.append(
            f"qat: {student.config.model_type} projects positions too, which an export computes once, in float; "
            "export it without, or say qat: int8"
        )
    if problems:
        raise InputError(*problems)


@contextmanager
def on_device(models: Sequence[PreTrainedModel], device: torch.device) -> Iterator[None]:
    """Move models to a device within the block, and back afterwards.

    Args:
        models: those that `device_map` has spread over devices stay where they are.
        device: to move to.
    """
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
    """Set within the block whether a language model keeps keys and values for the next token.

    Args:
        config: the model's; one without this setting stays as it is.
        use_cache: the value within the block; the one before comes back after it.
    """
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
