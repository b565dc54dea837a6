"""What is watched while a model trains: its losses' parts, whether they are finite, and what is matched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.common.console import log
from distill.errors import TrainingDiverged
from distill.training.config import TrainingConfig
from distill.training.features import show_pairs
from distill.training.teachers import Teacher


class Sums:
    """Pairs of sums by name, on their device."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Of one batch."""
        for name, pair in pairs.items():
            added = torch.stack(pair).detach()
            self.totals[name] = self.totals[name] + added if name in self.totals else added

    def reduced(self, accelerator: Any) -> dict[str, tuple[float, float]]:
        """Over all processes."""
        sums = accelerator.reduce(torch.stack(list(self.totals.values())), reduction="sum").tolist()
        return {name: (first, second) for name, (first, second) in zip(self.totals, sums, strict=True)}


class DivergenceWatch:
    """Stops a training whose losses are no longer finite."""

    def __init__(self, args: TrainingConfig):
        self._args = args
        self._first_bad_step: dict[str, Tensor] = {}

    def look_at(self, losses: Mapping[str, Tensor], state: TrainerState) -> None:
        """Remember the first step at which a part was not finite, on its device: to ask each step would wait for it.

        Raises:
            TrainingDiverged: on a CPU, where nothing has to be waited for.
        """
        step = state.global_step + 1
        for name, loss in losses.items():
            first = self._first_bad_step.get(name, torch.zeros((), dtype=torch.int64, device=loss.device))
            self._first_bad_step[name] = torch.where((first == 0) & ~loss.detach().isfinite(), step, first)
        if self._args.device.type == "cpu":
            self.stop_if_diverged(state)

    def stop_if_diverged(self, state: TrainerState) -> None:
        """Say the first part and step that were not finite.

        Raises:
            TrainingDiverged: there was one.
        """
        steps = {name: int(first) for name, first in self._first_bad_step.items() if first > 0}
        if steps:
            name = min(steps, key=lambda part: steps[part])
            self.stop(f"the {name} loss was NaN or infinite at step {steps[name]}", state)

    def stop(self, what: str, state: TrainerState) -> None:
        """Raise TrainingDiverged, and name the last checkpoint."""
        folders = Path(self._args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        last = max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
        raise TrainingDiverged(
            f"{what} of {state.max_steps}; {f'the last checkpoint is {last}' if last else 'no checkpoint yet'}. "
            f"Lower learning_rate ({self._args.learning_rate:g}), or look for extreme values in the data"
        )


class Announcement(TrainerCallback):
    """Says at the start of a training which layers are matched."""

    def __init__(self, teachers: list[Teacher]):
        self._teachers = teachers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print each loss's pairs of layers."""
        if not state.is_world_process_zero:
            return
        for number, teacher in enumerate(self._teachers, start=1):
            of = f" {number}" if len(self._teachers) > 1 else ""
            for part, pairs in teacher.pairs.items():
                log.print(f"      {part} loss: layers {show_pairs(pairs)} (student→teacher{of}; 0 is the embeddings)")
            if "attention" in teacher.pairs:
                log.print("      attention maps are read, so student and teacher run in eager attention (slower)")
