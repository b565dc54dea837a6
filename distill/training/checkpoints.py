"""A training that may take several sessions: what it goes on from, and the time it took."""

import copy
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.common.folders import write_atomically

Options = TypeVar("Options", bound=TrainingArguments)

CHECKPOINTS = "checkpoints"
"""In a step's folder, where its training leaves them until it is finished."""
_BATCHES_FILE = "batches.json"

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


def note_batches(checkpoint: Path, args: TrainingArguments) -> None:
    """Leave `batches_of` with a checkpoint."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_atomically(checkpoint / _BATCHES_FILE, json.dumps(batches_of(args)))


def other_batches(checkpoint: Path, args: TrainingArguments) -> str | None:
    """What a checkpoint's training had, and this one has not; None where both deal rows alike.

    One that does not say (from another Trainer) tells its batch size at most.
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


def with_step_counts(options: Options, checkpoint: Path) -> Options:
    """The options with shares of all steps as counts: Trainer compares them with a checkpoint's counts, and warns."""
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
