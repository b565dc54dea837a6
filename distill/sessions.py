"""A training that may take several sessions: what it goes on from, what it tells, and the time it took."""

import copy
import json
import logging
import math
import time
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.console import log

Options = TypeVar("Options", bound=TrainingArguments)

# Checkpoints of a small model are less than a second apart; Trainer then sorts them by number, which is just right.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not be" not in record.getMessage())


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a Trainer's output folder; one that a kill cut short lacks its last file."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def with_step_counts(options: Options, checkpoint: Path) -> Options:
    """The options with shares of all steps as counts: Trainer compares them with a checkpoint's counts, and warns."""
    max_steps = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).max_steps
    counted = copy.copy(options)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(options, name)
        if share and share < 1:
            setattr(counted, name, math.ceil(max_steps * share))
    return counted


class ProgressLines(TrainerCallback):
    """For a log file: one line per logging step, with an estimate, where a terminal has Trainer's moving bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where this session starts."""
        self._started, self._first_step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Print the loss, its parts, and the time that is left."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        parts = ", ".join(f"{key.partition('/')[2]} {logs[key]:.4f}" for key in sorted(logs) if key.startswith("loss/"))
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        step = f"step {state.global_step}/{state.max_steps}"
        log.print(f"      {step}, loss {logs['loss']:.4f} ({parts}), {left:.0f} s left")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Print the scores of an evaluation on the way."""
        if state.is_world_process_zero:
            shown = {name.partition("_")[2]: value for name, value in metrics.items() if "/" not in name}
            times = ("runtime", "samples_per_second", "steps_per_second")
            scores = ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if name and name not in times)
            log.print(f"      step {state.global_step}/{state.max_steps}, validation: {scores}")


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
            (checkpoint / self._FILE).write_text(json.dumps(self.seconds()))

    def resume(self, checkpoint: Path) -> None:
        """Go on counting from what a checkpoint says."""
        file = checkpoint / self._FILE
        self._before = json.loads(file.read_text()) if file.is_file() else 0.0

    def seconds(self) -> float:
        """Of all sessions together."""
        return self._before + time.perf_counter() - self._started
