"""`DistillationTrainer`: transformers' Trainer with a teacher, and with losses that add up exactly."""

import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import transformers
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill import losses
from distill.errors import InputError
from distill.processes import check_world_size

LayerMap = Literal["uniform"] | list[tuple[int, int]]

_PROJECTIONS_FILE = "projections.safetensors"


def _inherited(name: str) -> Any:
    """An option of transformers with its default and help, for a narrower annotation."""
    return copy.copy(TrainingArguments.__dataclass_fields__[name])


@dataclass
class TrainingConfig(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for fine-tuning small encoders.

    Without an accelerator `use_cpu` is set: two CPU processes that don't know it train alone, each for itself.

    Raises:
        InputError: the launcher started more processes than torch.distributed sees.
    """

    per_device_train_batch_size: Annotated[int, Field(ge=1)] = field(
        default=32, metadata={"help": "Rows of a training batch per process."}
    )
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = field(
        default=64, metadata={"help": "Rows of an evaluation batch per process."}
    )
    warmup_steps: Annotated[float, Field(ge=0)] = field(
        default=0.1, metadata={"help": "Warm-up steps; below 1, their share of all steps."}
    )
    weight_decay: Annotated[float, Field(ge=0)] = field(
        default=0.01, metadata={"help": "AdamW's weight decay (not on biases and norms)."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "How rows are drawn; rows of like length together by default."}
    )
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between log lines; below 1, a share of all."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between checkpoints; below 1, a share of all."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    learning_rate: Annotated[float, Field(gt=0)] = _inherited("learning_rate")
    num_train_epochs: Annotated[float, Field(gt=0)] = _inherited("num_train_epochs")
    max_steps: Literal[-1] | Annotated[int, Field(ge=1)] = _inherited("max_steps")
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = _inherited("gradient_accumulation_steps")
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = _inherited("label_smoothing_factor")
    max_grad_norm: Annotated[float, Field(ge=0)] = _inherited("max_grad_norm")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = _inherited("adam_beta1")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = _inherited("adam_beta2")
    adam_epsilon: Annotated[float, Field(gt=0)] = _inherited("adam_epsilon")
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "No moving progress bar; by default where stderr is no terminal."}
    )

    def __post_init__(self) -> None:
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a moving bar fills a log file with its every move
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        check_world_size(self.world_size)


@dataclass
class DistillationConfig(TrainingConfig):
    """What a `DistillationTrainer` minimises: soft_weight·soft + hard_weight·hard + hidden_weight·hidden."""

    temperature: Annotated[float, Field(gt=0)] = field(
        default=2.0, metadata={"help": "Softens both distributions of the soft loss."}
    )
    soft_weight: Annotated[float, Field(ge=0)] = field(
        default=0.5, metadata={"help": "Weight of the teacher's predictions; 0 is off."}
    )
    hard_weight: Annotated[float, Field(ge=0)] = field(
        default=0.5, metadata={"help": "Weight of the labels; 0 is off."}
    )
    hidden_weight: Annotated[float, Field(ge=0)] = field(
        default=1.0, metadata={"help": "Weight of the teacher's hidden states; 0 is off."}
    )
    layer_map: LayerMap = field(
        default="uniform",
        metadata={"help": "[student, teacher] pairs of hidden states to match; 0 is the embeddings."},
    )


class DistillationTrainer(transformers.Trainer):
    """Trains `model` against `teacher`; everything else is `transformers.Trainer`.

    Loss and gradients depend only on the rows of an optimizer step, not on how accumulation, processes or padding
    split them: each loss is summed and divided by the whole step's count of rows or tokens.

    Args:
        model: the student.
        teacher: its logits and hidden states are the target; kept in eval mode, frozen, and out of every checkpoint.
            None trains on labels alone (fine-tuning), with a plain `TrainingConfig`.
        args: a `DistillationConfig`.

    Raises:
        InputError: weights that need a teacher without one, or a layer map out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        args: TrainingConfig | None = None,
        **trainer_arguments: Any,
    ):
        args = DistillationConfig(output_dir="distilled") if args is None else args
        self.student = model
        self.weights = _loss_weights(args)
        if teacher is None and (self.weights["soft"] or self.weights["hidden"]):
            raise InputError("teacher: missing; without one, set soft_weight and hidden_weight to 0")
        self.layer_pairs: list[tuple[int, int]] = []
        trained: nn.Module = model
        if teacher is not None and self.weights["hidden"]:
            self.layer_pairs = resolve_layer_map(
                args.layer_map, model.config.num_hidden_layers, teacher.config.num_hidden_layers
            )
            if model.config.hidden_size != teacher.config.hidden_size:
                transformers.set_seed(args.seed)
                trained = _ProjectedStudent(model, teacher.config.hidden_size, self.layer_pairs)
        self.teacher = teacher
        super().__init__(model=trained, args=args, **trainer_arguments)
        # Our losses are divided by the whole step's counts, so Trainer must not divide by the accumulation steps too.
        # (What it finds out by itself is wrong for BERT: a forward with **kwargs that returns a plain mean.)
        self.model_accepts_loss_kwargs = True
        self.label_names = args.label_names or ["labels"]
        if teacher is not None:
            self.teacher = teacher.to(self.accelerator.device).requires_grad_(False)
        self._part_sums: dict[str, dict[str, Tensor]] = {"loss": {}, "eval_loss": {}}
        self._part_counts = {"loss": 0, "eval_loss": 0}  # optimizer steps, and evaluated rows, since the last log

    # --- the loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted loss of one micro-batch: its share of the whole step's loss.

        Args:
            num_items_in_batch: rows and tokens of the whole step (int64, shape 2); of this batch by default.
        """
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        rows, tokens = num_items_in_batch.unbind()
        outputs = model(**accepted_inputs(self.student, inputs), output_hidden_states=bool(self.layer_pairs))
        parts: dict[str, Tensor] = {}
        if self.weights["hard"]:
            parts["hard"] = losses.hard_loss(outputs.logits, inputs["labels"], self.args.label_smoothing_factor, rows)
        if self.teacher is not None:
            targets = self._teacher_outputs(self.teacher, inputs)
            if self.weights["soft"]:
                parts["soft"] = losses.soft_loss(outputs.logits, targets.logits, self.args.temperature, rows)
            if self.layer_pairs:
                parts["hidden"] = losses.hidden_loss(
                    [outputs.hidden_states[student] for student, _ in self.layer_pairs],
                    [targets.hidden_states[teacher] for _, teacher in self.layer_pairs],
                    inputs["attention_mask"],
                    tokens,
                )
        if model.training:
            # The counts are of all processes, and DDP takes the mean of their gradients.
            parts = {name: part * self.accelerator.num_processes for name, part in parts.items()}
            self._add_parts("loss", parts, weight=1)
        else:
            self._add_parts("eval_loss", parts, weight=len(outputs.logits))
            self._part_counts["eval_loss"] += len(outputs.logits)
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _teacher_outputs(self, teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
        teacher.eval()  # whatever was called on it since
        with torch.no_grad():  # not inference_mode: the student's backward keeps these tensors
            return teacher(**accepted_inputs(teacher, inputs), output_hidden_states=bool(self.layer_pairs))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, and its rows and tokens over all processes."""
        self._part_counts["loss"] += 1
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        rows = torch.tensor(sum(len(batch["input_ids"]) for batch in batch_samples))
        tokens = sum((batch["attention_mask"].sum() for batch in batch_samples), start=torch.tensor(0))
        return torch.stack([rows.to(device), tokens.to(device)])

    _signature_columns: list[str] | None

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            models = [self.student] if self.teacher is None else [self.student, self.teacher]
            inputs = {name for model in models for name in inspect.signature(model.forward).parameters}
            self._signature_columns = [*inputs, "label", "label_ids", *self.label_names, self.args.length_column_name]

    # --- the log ----------------------------------------------------------------------------------------------------

    def _add_parts(self, kind: str, parts: dict[str, Tensor], *, weight: int) -> None:
        sums = self._part_sums[kind]
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.detach() * weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss (`loss/soft`, …), averaged like the loss itself: over steps, or evaluated rows."""
        for kind in [kind for kind in ("loss", "eval_loss") if kind in logs and self._part_sums[kind]]:
            sums = self._part_sums[kind]
            count = torch.tensor(float(self._part_counts[kind]), device=self.args.device)
            *totals, count = self.accelerator.reduce(torch.stack([*sums.values(), count]), reduction="sum").tolist()
            logs |= {f"{kind}/{name}": total / count for name, total in zip(sums, totals, strict=True)}
            self._part_sums[kind], self._part_counts[kind] = {}, 0
        super().log(logs, start_time)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the student alone, in plain form, no pickled arguments; a checkpoint has the projections beside it."""
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, _ProjectedStudent):
            state = model.state_dict() if state_dict is None else state_dict
            state_dict = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
        self.student.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if not self.args.should_save:
            return
        if isinstance(model, _ProjectedStudent) and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            projections = {k: v for k, v in state.items() if k.startswith("projections.")}
            safetensors.torch.save_file(projections, folder / _PROJECTIONS_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self.student if model is None else model)
        if isinstance(self.model, _ProjectedStudent):
            projections = safetensors.torch.load_file(Path(resume_from_checkpoint) / _PROJECTIONS_FILE)
            self.model.load_state_dict(projections, strict=False)

    def _load_best_model(self) -> None:
        if isinstance(self.model, _ProjectedStudent):  # Trainer would look for the wrapper's names and find none
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def resolve_layer_map(layer_map: LayerMap, num_student_layers: int, num_teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs (student, teacher) of hidden states; 0 is the embeddings, n the output of block n.

    `uniform` pairs student block m with teacher block m·L/S, the end of the m-th of S equal parts (TinyBERT,
    Jiao et al. 2020, section 4.1).

    Raises:
        InputError: a pair out of range.
    """
    if layer_map == "uniform":
        ratio = num_teacher_layers / num_student_layers
        return [(block, round(block * ratio)) for block in range(1, num_student_layers + 1)]
    outside = [
        list(pair)
        for pair in layer_map
        if not (0 <= pair[0] <= num_student_layers and 0 <= pair[1] <= num_teacher_layers)
    ]
    if outside or not layer_map:
        raise InputError(
            f"layer_map: {outside or 'no pair'} is out of range; pairs are [student 0 to {num_student_layers}, "
            f"teacher 0 to {num_teacher_layers}], 0 being the embeddings"
        )
    return [(student, teacher) for student, teacher in layer_map]


class _ProjectedStudent(nn.Module):
    """A student and one linear projection per matched layer to the teacher's width, in one forward for DDP."""

    def __init__(self, student: PreTrainedModel, teacher_width: int, layer_pairs: list[tuple[int, int]]):
        super().__init__()
        self.student = student
        self.config = student.config
        width = student.config.hidden_size
        self.projections = nn.ModuleDict(
            {str(layer): nn.Linear(width, teacher_width, bias=False) for layer, _ in layer_pairs}
        )

    def forward(self, **inputs: Any) -> Any:
        outputs = self.student(**inputs)
        if outputs.hidden_states is not None:
            outputs["hidden_states"] = tuple(
                self.projections[str(layer)](hidden) if str(layer) in self.projections else hidden
                for layer, hidden in enumerate(outputs.hidden_states)
            )
        return outputs


def _loss_weights(args: TrainingConfig) -> dict[str, float]:
    if not isinstance(args, DistillationConfig):
        return {"soft": 0.0, "hard": 1.0, "hidden": 0.0}
    weights = {"soft": args.soft_weight, "hard": args.hard_weight, "hidden": args.hidden_weight}
    if not any(weights.values()):
        raise InputError("soft_weight, hard_weight, hidden_weight: all are 0, so there is nothing to learn from")
    return weights


def accepted_inputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that the model takes, labels aside (DistilBERT has no `token_type_ids`, but swallows them)."""
    parameters = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in parameters and name != "labels"}
