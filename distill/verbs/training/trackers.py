"""Trackers (`report_to: trackio`, `tensorboard`, `wandb`): each step is a run of its own, called like the step."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.verbs.training.options import TrainingOptions

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


@contextmanager
def tracked(options: TrainingOptions) -> Iterator[None]:
    """Make a training inside of a block a run of its own.

    transformers names no run, goes on in wandb's last one, and writes TensorBoard's files among the checkpoints, which
    go when the step is finished: here they go to `.tensorboard/<step>` in the recipe's output folder.

    Args:
        options: those that the trainer gets. Its `run_name` becomes the step's name, unless the user chose another.
    """
    step = Path(options.output_dir).parent  # …/<step>/checkpoints
    if options.run_name is None:
        options.run_name = step.name
    chosen = os.environ.get(_TENSORBOARD)
    to_tensorboard = "tensorboard" in (options.report_to or ())
    is_ours = _wandb_run() is None
    if to_tensorboard:
        os.environ[_TENSORBOARD] = str(Path(chosen or step.parent / ".tensorboard") / step.name)
    try:
        yield
    finally:
        if to_tensorboard:
            os.environ.pop(_TENSORBOARD) if chosen is None else os.environ.update({_TENSORBOARD: chosen})
        if is_ours and _wandb_run() is not None:
            sys.modules["wandb"].finish()


def _wandb_run() -> object:
    """The run that wandb writes into; None where there is none."""
    return getattr(sys.modules.get("wandb"), "run", None)
