"""A training that may take several sessions: what it goes on from, and the time it took."""

import copy
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.common.folders import write_atomically
from distill.errors import InputError
from distill.models.weights import load_weights
from distill.training.features import ProjectedStudent

Options = TypeVar("Options", bound=TrainingArguments)

CHECKPOINTS = "checkpoints"
"""In a step's folder, where its training leaves them until it is finished."""
_BATCHES_FILE = "batches.json"
_PROJECTIONS_FILE = "projections.safetensors"
_RANGES_FILE = "activation_ranges.safetensors"

# Checkpoints of a small model are less than a second apart; Trainer then sorts them by number, which is just right.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not be" not in record.getMessage())


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a Trainer's output folder."""
    whole = filter(_is_whole, folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def drop_half_made(folder: Path) -> None:
    """Delete the checkpoints in a Trainer's output folder that a kill or a full disk cut short."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its last file, and all of it."""
    try:
        return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def batches_of(args: TrainingArguments) -> dict[str, int | None]:
    """How the rows of an epoch are dealt to optimizer steps; a checkpoint's place in them holds for the same alone."""
    return {
        "processes": args.world_size,
        "rows of a batch": args.per_device_train_batch_size,
        "tokens of a batch": getattr(args, "max_tokens_per_batch", None),
        "batches of a step": args.gradient_accumulation_steps,
    }


def note_batches(folder: Path, step: int, args: TrainingArguments) -> None:
    """Write what `batches_of` gives into a checkpoint.

    Args:
        folder: the Trainer's output folder, or that of its trial.
        step: optimizer steps done; the checkpoint's folder, named after it, is made where it is not there yet.
        args: of the training.
    """
    checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_atomically(checkpoint / _BATCHES_FILE, json.dumps(batches_of(args)))


def other_batches(checkpoint: Path, args: TrainingArguments) -> str | None:
    """Describe what differs between a checkpoint's `batches_of` and this training's; None where both deal rows alike.

    One that does not say (from another Trainer) tells its batch size at most.

    Args:
        checkpoint: its folder.
        args: of this training.
    """
    now = batches_of(args)
    file = checkpoint / _BATCHES_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
    elif (checkpoint / TRAINER_STATE_NAME).is_file():
        rows = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).train_batch_size
        before = now if rows is None else now | {"rows of a batch": rows}
    else:
        return None  # Trainer says what is missing
    different = [name for name, value in now.items() if before.get(name) != value]
    return ", ".join(f"{name}: {before.get(name)}, now {now[name]}" for name in different) or None


def refuse_other_batches(checkpoint: Path, args: TrainingArguments) -> None:
    """Refuse a checkpoint of other batches: Trainer would take its batch size, and skip as many batches as were done.

    Args:
        checkpoint: its folder.
        args: of this training.

    Raises:
        InputError: its training dealt rows to optimizer steps otherwise.
    """
    different = other_batches(checkpoint, args)
    if different is not None:
        raise InputError(f"{checkpoint}: can't be gone on from ({different}); say the same, or start anew")


def save_student(
    folder: Path,
    model: nn.Module,
    student: PreTrainedModel,
    state: dict[str, Tensor] | None,
    *,
    ranges: dict[str, Tensor],
    is_main_process: bool,
) -> None:
    """Write the student alone, in plain form; beside it, in a checkpoint, what its training goes on with.

    Args:
        model: what is trained: the student, or a `ProjectedStudent`, whose projections a checkpoint has.
        state: of that; None reads it here.
        ranges: of the activations of a quantization-aware training, for a checkpoint; empty for any other.
        is_main_process: the one that writes.
    """
    projections = {}
    if isinstance(model, ProjectedStudent):
        whole = model.state_dict() if state is None else state
        state = {name.removeprefix("student."): each for name, each in whole.items() if name.startswith("student.")}
        projections = {name: each for name, each in whole.items() if name.startswith("projections.")}
    student.save_pretrained(folder, state_dict=state, is_main_process=is_main_process)
    if not is_main_process or not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
        return
    if ranges:
        safetensors.torch.save_file(ranges, folder / _RANGES_FILE)
    if isinstance(model, ProjectedStudent) and model.projections:
        safetensors.torch.save_file(projections, folder / _PROJECTIONS_FILE)


def load_projections(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's projections into the model that is trained, where it has some.

    Args:
        checkpoint: its folder.
        model: without what is wrapped around it; nothing is loaded where it is no `ProjectedStudent`.
    """
    if isinstance(model, ProjectedStudent) and model.projections:
        model.load_state_dict(safetensors.torch.load_file(checkpoint / _PROJECTIONS_FILE), strict=False)


def load_ranges(checkpoint: Path) -> dict[str, Tensor]:
    """What a checkpoint keeps of the activations' ranges, on the CPU."""
    return safetensors.torch.load_file(checkpoint / _RANGES_FILE)


def load_student(checkpoint: str, student: PreTrainedModel) -> None:
    """Load a checkpoint's weights into the student, those too that Trainer would skip: tied ones, and renamed ones.

    Args:
        checkpoint: its folder.
        student: of the same config; it is changed in place.

    Raises:
        InputError: the weights are not those of the student's config.
    """
    saved, fit = load_weights(checkpoint, type(student), student.config, student.dtype)
    if fit.problem is not None or fit.untrained:
        raise InputError(f"{checkpoint}: {fit.problem or 'its head is not stored'}")
    student.load_state_dict(saved.state_dict())


def with_step_counts(options: Options, checkpoint: Path) -> Options:
    """Copy the options, with shares of all steps as counts: Trainer compares them with a checkpoint's, and warns.

    Args:
        options: hold `logging_steps`, `eval_steps` and `save_steps`; below 1 each is a share.
        checkpoint: its folder, which says how many steps there are.
    """
    max_steps = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).max_steps
    counted = copy.copy(options)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(options, name)
        if share and share < 1:
            setattr(counted, name, math.ceil(max_steps * share))
    return counted


class Clock(TrainerCallback):
    """Training time, summed over the sessions of a run that was cut off."""

    _FILE = "seconds.json"

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting."""
        self._started = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the time so far with the checkpoint."""
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            write_atomically(checkpoint / self._FILE, json.dumps(self.seconds()))

    def resume(self, checkpoint: Path) -> None:
        """Go on counting from what a checkpoint says."""
        file = checkpoint / self._FILE
        self._before = json.loads(file.read_text()) if file.is_file() else 0.0

    def seconds(self) -> float:
        """Of all sessions together."""
        return self._before + time.perf_counter() - self._started
