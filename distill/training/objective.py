"""What a training minimizes: the weighted losses of its batches, added up exactly over steps and evaluations."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import nested_concat
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.data.batches import COUNTED_ROWS
from distill.errors import TrainingDiverged
from distill.models.structure import input_names
from distill.tasks.outputs import head_at_mask, logits_of, plain_model
from distill.tasks.targets import Targets
from distill.training.config import DistillationConfig, Schedule, TrainingConfig, is_on
from distill.training.parts import parts_of_batch
from distill.training.teachers import Teacher


class Objective:
    """The weighted loss of each batch, and its parts summed over steps and evaluations.

    Args:
        student: the model that is trained, without what is wrapped around it.
        teachers: what it is compared with.
        args: the trainer's arguments.
        weights: of each loss, by its name; looked up for every batch, but for which are on (see `read_weights`).
        accelerator: adds up over all processes.
        targets: of the student.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teachers: Sequence[Teacher],
        args: TrainingConfig,
        weights: Mapping[str, float | Schedule],
        accelerator: Accelerator,
        targets: Targets,
    ):
        self._student, self._teachers, self._args = student, teachers, args
        self._targets = targets
        self._weights, self._accelerator = weights, accelerator
        self._logged, self._evaluated = Sums(), Sums()
        self._finite = FiniteLosses(args)
        self._inputs = frozenset(input_names(student))
        self._is_quantized = getattr(plain_model(student), "is_quantized", False)
        self._temperature = args.temperature if isinstance(args, DistillationConfig) else None
        self.read_weights()
        for teacher in teachers:
            teacher.autocast = accelerator.autocast

    def loss_of(
        self, model: nn.Module, inputs: dict[str, Tensor], counts: Tensor, state: TrainerState, *, all_logits: bool
    ) -> tuple[Tensor, Tensor]:
        """The share of a batch in the loss of its whole step, and the student's logits (as `logits_of` gives them).

        Args:
            model: the student as it is wrapped for the training.
            inputs: the batch, completed.
            counts: of the whole step (shape 6), see `count`.
            state: how far the training has come.
            all_logits: also those of a masked language model's tokens that no loss reads.

        Raises:
            TrainingDiverged: a loss of a training on a CPU is NaN or infinite.
        """
        mask = None
        if self._targets.masks_inputs and model.training and not all_logits:
            mask = self._targets.batch_targets(inputs, inputs[COUNTED_ROWS]).mask
        predicting = nullcontext() if mask is None else head_at_mask(self._student, mask)
        with record_function("student forward"), self._arithmetic_of_student(), predicting:
            if self._teachers:
                outputs = model(**inputs)
            else:
                read = {name: value for name, value in inputs.items() if name in self._inputs}
                outputs = {"logits": logits_of(model(**read))}
        progress = progress_of(state)
        with record_function("losses"):
            parts = parts_of_batch(
                self._args,
                self._teachers,
                self._targets,
                outputs,
                inputs,
                on=self._on,
                training=model.training,
                temperature=None if self._temperature is None else value_at(self._temperature, progress),
            )
        weights = {name: value_at(self._weights[name], progress) for name in parts}
        losses = {name: part.total / part.divisor(counts) for name, part in parts.items()}
        if model.training:
            self._finite.look_at(losses, state)
            # The counts are of all processes, and DDP takes the mean of their gradients.
            losses = {name: loss * self._accelerator.num_processes for name, loss in losses.items()}
            self._logged.add({name: (loss, loss * weights[name]) for name, loss in losses.items()})
        else:
            self._evaluated.add({name: (part.total, counts[part.counted]) for name, part in parts.items()})
        weighted = [weights[name] * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum() if weighted else outputs["logits"].sum() * 0, outputs["logits"]

    def _arithmetic_of_student(self) -> AbstractContextManager:
        """A quantized student computes in bfloat16, whatever its adapters and its head are trained in."""
        return torch.autocast(self._args.device.type, torch.bfloat16) if self._is_quantized else nullcontext()

    def read_weights(self) -> None:
        """Find the losses whose weights are ever above 0, from here on."""
        self._on = frozenset(name for name, weight in self._weights.items() if is_on(weight))

    def begin_step(self) -> None:
        """Count an optimizer step, of which the batches follow."""
        self._logged.steps += 1

    def means_for_log(self, state: TrainerState) -> dict[str, float]:
        """The parts of the loss (`loss/soft`, …) as means over the steps since the last call.

        Where a weight follows a schedule, `weight/…` is its mean, weighted by the part; parts times weights are then
        always the loss.

        Raises:
            InputError: a teacher has predicted NaN or infinite values.
            TrainingDiverged: a loss was NaN or infinite.
        """
        if not self._logged.totals:
            return {}
        for teacher in self._teachers:
            teacher.refuse_not_finite()
        self._finite.stop_if_not_finite(state)
        totals = self._logged.reduced(self._accelerator)
        steps = self._logged.steps * self._accelerator.num_processes
        means = {}
        for name, (part, weighted) in totals.items():
            means[f"loss/{name}"] = part / steps
            if isinstance(self._weights[name], dict):
                mean = weighted / part if part else value_at(self._weights[name], progress_of(state))
                means[f"weight/{name}"] = mean
        self._logged = Sums()
        return means

    def begin_evaluation(self) -> None:
        """Forget the sums of the evaluation before, and look at the weights again."""
        self._evaluated = Sums()
        self.read_weights()

    def correct_metrics(self, metrics: dict[str, float], key: str, state: TrainerState) -> None:
        """Put the exact loss of the evaluation in place of Trainer's, and its parts beside it.

        Args:
            metrics: of the evaluation; without the loss where there was nothing to compare with.
            key: of the loss among them.
        """
        if not self._evaluated.totals:
            metrics.pop(key, None)  # neither labels nor stored predictions
        elif key in metrics:
            parts, progress = self._evaluated.ratios(self._accelerator), progress_of(state)
            metrics[key] = sum(value_at(self._weights[name], progress) * parts[name] for name in parts)
            metrics.update({f"{key}/{name}": part for name, part in parts.items()})

    def refuse_not_finite(self, model: nn.Module, state: TrainerState) -> None:
        """Keep what is not finite out of a checkpoint.

        Args:
            model: all that is trained, projections too.
            state: the Trainer's, after the step.

        Raises:
            TrainingDiverged: a loss since the training began, or a weight of the model, is NaN or infinite.
        """
        self._finite.stop_if_not_finite(state)
        if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
            self._finite.stop(f"a weight was NaN or infinite at step {state.global_step}", state)


def value_at(value: float | Schedule, progress: float) -> float:
    """A constant, or a schedule's value.

    Args:
        progress: optimizer steps done over all steps, 0 to 1.
    """
    if not isinstance(value, dict):
        return value
    if value.get("shape", "linear") == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return value["from"] + (value["to"] - value["from"]) * progress


def progress_of(state: TrainerState) -> float:
    """Optimizer steps done over all steps; known right after a resume."""
    return state.global_step / state.max_steps if state.max_steps > 0 else 0.0


def evaluated_in_parts(
    evaluate: Callable[[dict[str, Tensor]], tuple[Any, Any, Any]],
    batch: Mapping[str, Tensor],
    size: int,
    reduce: Callable[[Tensor, Tensor], Tensor] | None,
) -> tuple[Tensor, Any, Any]:
    """The mean loss of a batch's parts, their reduced logits, and its labels; of both None without `reduce`.

    Args:
        evaluate: gives loss, logits and labels of some rows.
        size: rows of a part.
        reduce: makes of logits and labels what is kept.
    """
    losses, reduced = [], []
    for start in range(0, len(batch["input_ids"]), size):
        loss, logits, labels = evaluate({name: values[start : start + size] for name, values in batch.items()})
        losses.append(loss)
        if reduce is not None:
            reduced.append(reduce(logits, labels))
    mean = torch.stack(losses).mean()  # the exact one is known at the end, see `Objective.correct_metrics`
    return (mean, None, None) if reduce is None else (mean, functools.reduce(nested_concat, reduced), batch["labels"])


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

    def ratios(self, accelerator: Any) -> dict[str, float]:
        """The first sum of each pair, over all processes, divided by the second; 0 where that is 0."""
        return {name: first / second if second else 0.0 for name, (first, second) in self.reduced(accelerator).items()}


class FiniteLosses:
    """Stops a training whose losses are no longer finite."""

    def __init__(self, args: TrainingConfig):
        self._args = args
        self._first_bad_step: dict[str, Tensor] = {}

    def look_at(self, losses: Mapping[str, Tensor], state: TrainerState) -> None:
        """Remember the first step at which a part was not finite, on its device: to ask each step would wait for it.

        Args:
            losses: scalars of one batch, by the part's name.
            state: the Trainer's, before the step is counted.

        Raises:
            TrainingDiverged: on a CPU, where nothing has to be waited for.
        """
        step = state.global_step + 1
        for name, loss in losses.items():
            first = self._first_bad_step.get(name, torch.zeros((), dtype=torch.int64, device=loss.device))
            self._first_bad_step[name] = torch.where((first == 0) & ~loss.detach().isfinite(), step, first)
        if self._args.device.type == "cpu":
            self.stop_if_not_finite(state)

    def stop_if_not_finite(self, state: TrainerState) -> None:
        """Say the first part and step that were not finite.

        Raises:
            TrainingDiverged: there was one.
        """
        steps = {name: int(first) for name, first in self._first_bad_step.items() if first > 0}
        if steps:
            name = min(steps, key=lambda part: steps[part])
            self.stop(f"the {name} loss was NaN or infinite at step {steps[name]}", state)

    def stop(self, what: str, state: TrainerState) -> None:
        """Stop the training with an error that names the last checkpoint.

        Args:
            what: the beginning of the message: what was not finite, and at which step.
            state: the Trainer's.

        Raises:
            TrainingDiverged: always.
        """
        folders = Path(self._args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        last = max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
        raise TrainingDiverged(
            f"{what} of {state.max_steps}; {f'the last checkpoint is {last}' if last else 'no checkpoint yet'}. "
            f"Lower learning_rate ({self._args.learning_rate:g}), or look for extreme values in the data"
        )
