"""`DistillationTrainer`: transformers' Trainer with teachers, and with losses that add up exactly."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import DataCollatorForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput, get_last_checkpoint

from distill.common.credentials import UnsavedToken
from distill.common.distributed import forget_other_precision
from distill.common.private_names import forget_prepared
from distill.data.batches import Reader, row_lengths, with_columns
from distill.errors import InputError
from distill.models.adapters import with_adapters
from distill.models.modes import modes_kept
from distill.tasks.kinds import targets_of
from distill.training import checkpoints
from distill.training.arguments import check_class_weights, check_given, own_arguments
from distill.training.cache_plan import CachePlan
from distill.training.callbacks import Announcement
from distill.training.conditions import QuantizationAwareness, RunConditions, determinism, using_cache, verbosity_of
from distill.training.config import DistillationConfig, is_on
from distill.training.features import ProjectedStudent, tokens_of_image
from distill.training.objective import Objective, evaluated_in_parts
from distill.training.rows import TrainingRows, length_loader, made_as_read, pooled_negatives
from distill.training.teachers import AnyTeacher, LayerPairs, Teacher, match_teachers, projected_student

_LOGITS_AT_ONCE = 2**24
"""Of a language model that is evaluated: 64 MB in float32."""


class DistillationTrainer(transformers.Trainer):
    """Trains `model` against `teacher`; everything else is `transformers.Trainer`.

    Loss and gradients depend only on the rows of an optimizer step, not on how accumulation, processes or padding
    split them: each loss is summed and divided by the whole step's count of rows, tokens or labels, in evaluations too.

    What the task is follows from the model: a sequence classifier with one output learns scores, one whose problem type
    is multi-label learns sets of labels, any other learns classes. Rows without a label (−100, or NaN) count in every
    loss but the hard one.

    But for the student's weights, all that it is given is as it was once a training or an evaluation has ended, however
    it ended: the models' modes, attention, hooks and devices (the student's own aside, which stays on the trainer's),
    the arguments, and the process's threads and memory.

    Args:
        model: the student.
        teacher: its predictions and representations are the target; in eval mode while it predicts, never trained, and
            in no checkpoint. A PEFT model predicts with its active adapters. Several teachers share the weights
            (`teacher_weights`). "data" stands for predictions in the rows' column `teacher_logits` or
            `teacher_probabilities` (for the soft loss). None trains on labels alone (fine-tuning), with a plain
            `TrainingConfig`.
        args: a `DistillationConfig`; of plain `TrainingArguments` every value is kept. The trainer has its own copy.
        peft_config: train adapters (PEFT) of the model alone, and save these; a model that has some will do too.
        layer_pairs: what was planned for each teacher with `arguments.layer_pairs`; by default found by `args`.
        trainer_arguments: the others of `transformers.Trainer`, but for `model_init` and `compute_loss_func`.

    Raises:
        InputError: what is no model, no data set or no arguments; weights that need a teacher without one, a layer map
            out of range, or models that don't fit.
        TrainingDiverged: while training, a loss that is NaN or infinite; the last checkpoint is from before.
    """

    def __init__(
        self,
        model: PreTrainedModel = None,  # type: ignore[assignment]  # told in one message
        teacher: AnyTeacher | Sequence[AnyTeacher] | None = None,
        args: TrainingArguments | None = None,
        peft_config: PeftConfig | None = None,
        layer_pairs: Sequence[LayerPairs | None] | None = None,
        **trainer_arguments: Any,
    ):
        alone = isinstance(teacher, str | nn.Module)
        teachers: list[Any] = [teacher] if alone else list(teacher or [])  # type: ignore[arg-type]
        check_given(model, teachers, args, trainer_arguments)
        args = own_arguments(args, model.config, with_teacher=bool(teachers))
        if args.hub_token is not None:
            args.hub_token = UnsavedToken(args.hub_token)
        if peft_config is not None:
            transformers.set_seed(args.seed)  # adapters are drawn here
            model = with_adapters(model, peft_config)
        self.student = model
        self.targets = targets_of(model)
        check_class_weights(args, model)
        self.weights = args.loss_weights if isinstance(args, DistillationConfig) else {"hard": 1.0}
        self.teachers: list[Teacher] = []
        tokenizer = trainer_arguments.get("processing_class")
        if isinstance(args, DistillationConfig):
            columns = getattr(trainer_arguments.get("train_dataset"), "column_names", None) or []
            words = len(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None
            self.teachers = match_teachers(model, teachers, args, columns=columns, vocabulary=words, pairs=layer_pairs)
            transformers.set_seed(args.seed)  # projections are drawn here
        self.quantization = QuantizationAwareness(model, args, lambda: self._rows_at_hand("calibration"))
        uses_logits = is_on(self.weights["hard"]) or is_on(self.weights.get("soft", 0))
        trained: nn.Module = model
        if self.teachers:
            has_optimizer = (trainer_arguments.get("optimizers") or (None,))[0] is not None
            trained = projected_student(model, self.teachers, uses_logits=uses_logits, has_optimizer=has_optimizer)
        image_tokens = self._image_tokens()  # draws, in train mode
        collates_otherwise = trainer_arguments.get("data_collator") is not None
        if self.targets.per_token and tokenizer is not None and not collates_otherwise:
            trainer_arguments["data_collator"] = DataCollatorForTokenClassification(tokenizer)
        self._use_cache = getattr(model.config, "use_cache", None)
        with modes_kept([model]), verbosity_of(args), determinism(args.full_determinism):
            forget_other_precision(args.mixed_precision)
            super().__init__(
                model=trained,
                args=args,
                callbacks=[Announcement(self.teachers), *(trainer_arguments.pop("callbacks", None) or [])],
                **trainer_arguments,
            )
        self._conditions = RunConditions(trained, model, self.teachers, args=args, device=self.accelerator.device)
        if self._use_cache is not None:  # Trainer has switched it off for good, in what is saved too
            model.config.use_cache = self._use_cache
        # Our losses are divided by the whole step's counts, so Trainer must not divide by the accumulation steps too.
        # (What it finds out by itself is wrong for BERT: a forward with **kwargs that returns a plain mean.)
        self.model_accepts_loss_kwargs = True
        self.label_names = list(self.targets.label_columns)
        self.rows = TrainingRows(
            self.teachers,
            args,
            self.targets,
            image_tokens=image_tokens,
            collates_otherwise=collates_otherwise,
            accelerator=self.accelerator,
        )
        if self.rows.fillers:
            self.data_collator = with_columns(self.data_collator, self.rows.fillers)  # type: ignore[has-type]
        self.rows.check(self.train_dataset, self.processing_class, hard=is_on(self.weights["hard"]))
        self.objective = Objective(model, self.teachers, args, self.weights, self.accelerator, self.targets)
        self._reduce_logits: Callable[[Tensor, Tensor], Tensor] | None = None
        for each in self.teachers:
            if each.student_wants.pooled:
                with self._conditions.running():
                    each.negatives = pooled_negatives(each, *self._rows_at_hand("negatives"), self.args)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> TrainOutput:
        """Trainer's, also after an evaluation; with teachers cached, and on a CPU with its attention and memory.

        Raises:
            InputError: a checkpoint whose training dealt rows to optimizer steps otherwise.
        """
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        checkpoint = os.path.expanduser(last) if last else None
        if checkpoint is not None:
            checkpoints.refuse_other_batches(Path(checkpoint), self.args)
        if self.model_wrapped is self.model:
            # An evaluation has marked the model as prepared, and Accelerate would leave out DDP: processes that share
            # no gradients, each training alone (seen with transformers 5.23, accelerate 1.15).
            self._conditions.forget_prepared_forward()
            forget_prepared(self.model, self.accelerator)
        try:
            with self.training_conditions():
                self.cache_teachers()
                self.objective.read_weights()
                shards = self.is_fsdp_enabled or self.is_deepspeed_enabled
                if self.args.world_size > 1 and not shards and self.args.ddp_find_unused_parameters is None:
                    self.accelerator.ddp_handler.find_unused_parameters = self._has_idle_weights()
                return super().train(checkpoint or resume_from_checkpoint, *arguments, **options)
        finally:
            self.rows.release_caches()

    @contextmanager
    def training_conditions(self) -> Iterator[None]:
        """Attention, dropout, packing, fake weights and memory as they are in `train`."""
        lengths = row_lengths(self.train_dataset, self.args.length_column_name)
        longest = sys.maxsize if lengths is None else int(lengths.max())
        with self._conditions.training(longest), self.quantization.training():
            yield

    def hyperparameter_search(self, *arguments: Any, **options: Any) -> Any:
        """Refused: a trial is a trainer of its own.

        Raises:
            InputError: always.
        """
        raise InputError("hyperparameter_search: it is matched once; make a DistillationTrainer, with a new student")

    def _image_tokens(self) -> int:
        """States of an image that losses compare."""
        return tokens_of_image(self.student, [each.student_wants for each in self.teachers])

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """The rows in their order, so that predictions stand beside them; Trainer would group them by length too."""
        if eval_dataset is None or self.args.world_size > 1:  # Accelerate deals in order
            return None
        return SequentialSampler(eval_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Trainer's, but images have no length to be grouped by."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        return RandomSampler(rows) if made_as_read(rows) else super()._get_train_sampler(rows)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Trainer's, but what rows are made of as they are read stays."""
        return dataset if made_as_read(dataset) else super()._remove_unused_columns(dataset, description)

    def _has_idle_weights(self) -> bool:
        """Whether the loss leaves some weight out (a pooler, upper layers), so that DDP must look for it each step."""
        batch = self._prepare_inputs(self.batch_reader()([0], 0))
        self.model.eval()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model, batch)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return any(gradient is None for gradient in torch.autograd.grad(loss, trained, allow_unused=True))

    def begin_quantized_step(self) -> None:
        """Quantize weights anew from here on; with `qat_delay` only once it is over."""
        if self.quantization.is_on:
            self.quantization.begin_step(self.state, self.accelerator.gather)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of like length (see `LengthBatches`), with what is cached of the teachers."""
        lengths = self.rows.lengths(self.train_dataset)
        if lengths is None:
            return super().get_train_dataloader()
        return length_loader(self.batch_reader(), lengths, self.args, self._train_batch_size)

    def batch_reader(self) -> Callable[[list[int], int], dict[str, Any]]:
        """Makes the training batch of the rows with these numbers in an epoch, with what is cached of the teachers."""
        return self.rows.with_cached(self._reader(self.train_dataset, "training"))

    def _reader(self, dataset: Any, what_for: str) -> Reader:
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, what_for)
        return self.rows.reader(dataset, self.data_collator, self.processing_class)

    def _teacher_reader(self, dataset: Any, what_for: str) -> Callable[[list[int]], dict[str, Tensor]]:
        """Makes the batch, on the device, that teachers see of the rows with these numbers."""
        read = self._reader(dataset, what_for)
        return lambda numbers: self.rows.completed(self._prepare_inputs(read(numbers)))

    def _rows_at_hand(self, what_for: str) -> tuple[int, Callable[[list[int]], dict[str, Tensor]]]:
        """How many rows there are of the training, or else of the evaluation, and what makes batches of them."""
        rows: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        return len(rows), self._teacher_reader(rows, what_for)

    def planned_caches(self) -> list[tuple[Teacher, CachePlan]]:
        """Each teacher that is a model, with what `train` will cache of it, or why it will not.

        Raises:
            InputError: `cache_teacher` asks for what can't be.
        """
        return self.rows.planned_caches(self.train_dataset, self._train_batch_size)

    def cache_teachers(self) -> None:
        """Compute what is planned, or find it; `train` does so by itself."""
        rows = self.train_dataset
        self.rows.cache_teachers(rows, self.planned_caches(), lambda: self._teacher_reader(rows, "teacher"))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The weighted loss of one micro-batch: its share of the whole step's loss.

        Args:
            num_items_in_batch: what the whole step counts (see `parts.count`); this batch by default.
        """
        inputs = self.rows.completed(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        loss, logits = self.objective.loss_of(model, inputs, num_items_in_batch, self.state, all_logits=return_outputs)
        return (loss, self.targets.named(logits)) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Trainer's, but a language model's batch a few rows at a time, of whose logits only what
        `preprocess_logits_for_metrics` makes of them is kept: B×T×V of them may be gigabytes."""
        in_parts = self.targets.over_vocabulary and all(name in inputs for name in self.label_names)
        reduce = self._reduce_logits
        if not in_parts or not (prediction_loss_only or reduce):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = self.rows.completed(self._prepare_inputs(inputs))
        size = max(1, _LOGITS_AT_ONCE // (batch["input_ids"].shape[1] * self.student.config.vocab_size))
        evaluate = super().prediction_step
        return evaluated_in_parts(
            lambda part: evaluate(model, part, prediction_loss_only, ignore_keys), batch, size,
            None if prediction_loss_only else reduce,
        )  # fmt: skip

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Trainer's, named in a profile."""
        with record_function("training step"):
            return super().training_step(*arguments, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, and its rows, tokens and labels over all processes."""
        # One by one: only while a batch is the newest does the loader know whether it is the last.
        with record_function("data"):
            batches = [self.rows.completed(batch) for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = self._get_num_items_in_batch(batches, device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self.objective.begin_step()
        self.begin_quantized_step()
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        return self.rows.counts(batch_samples, device)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # type: ignore[has-type]
            self._signature_columns = self.rows.columns(self.student)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss (`loss/soft`, …) as means over steps, like the loss itself."""
        if "loss" in logs:
            logs.update(self.objective.means_for_log(self.state))
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Trainer's; what it changes around it is put back."""
        with self._conditions.running():
            return super().evaluate(*arguments, **options)

    def predict(self, *arguments: Any, **options: Any) -> PredictionOutput:
        """Trainer's, predictions in the order of the rows; what it changes around it is put back."""
        with self._conditions.running():
            return super().predict(*arguments, **options)

    def save_model(self, *arguments: Any, **options: Any) -> None:
        """Trainer's; also after another trainer has been made."""
        with self._conditions.accelerate.restored():
            super().save_model(*arguments, **options)

    def evaluation_loop(
        self, dataloader: Any, description: str, *arguments: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> EvalLoopOutput:
        """Trainer's, with the loss and its parts as sums over all rows divided by what they count.

        With `qat` the student is evaluated as quantizing it now would leave it.
        """
        self.objective.begin_evaluation()
        reduce: Any = self.preprocess_logits_for_metrics  # type: ignore[has-type]
        if self.targets.over_vocabulary and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Where weights are gathered in each forward, all processes must run as many.
            self._reduce_logits, self.preprocess_logits_for_metrics = reduce, None
        try:
            with self.quantization.applied():  # of its own: the weights have moved since the last step began
                output = super().evaluation_loop(
                    dataloader, description, *arguments, metric_key_prefix=metric_key_prefix, **options
                )
        finally:
            self._reduce_logits, self.preprocess_logits_for_metrics = None, reduce
        self.objective.correct_metrics(output.metrics, f"{metric_key_prefix}_loss", self.state)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, but weights that are not finite never replace a good checkpoint."""
        self.objective.refuse_not_finite(self.model, self.state)
        self.quantization.move_ranges(self.state, self.accelerator.gather)
        if self.args.should_save:
            checkpoints.note_batches(Path(self._get_output_dir(trial=trial)), self.state.global_step, self.args)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the student alone, nothing pickled; in a checkpoint with its projections and ranges of activations."""
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        writes, ranges = self.args.should_save, self.quantization.state
        with using_cache(self.student.config, self._use_cache):
            checkpoints.save_student(folder, model, self.student, state_dict, ranges=ranges, is_main_process=writes)
        if writes:
            self.quantization.save(folder)
        if writes and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._trainer_loads:
            super()._load_from_checkpoint(resume_from_checkpoint, self.student if model is None else model)
        else:
            checkpoints.load_student(resume_from_checkpoint, self.student)
        self.quantization.load(Path(resume_from_checkpoint))
        checkpoints.load_projections(Path(resume_from_checkpoint), self.model)

    def _load_best_model(self) -> None:
        # Of a wrapped student Trainer would look for the wrapper's names, and find none.
        if self._trainer_loads and not isinstance(self.model, ProjectedStudent):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    @property
    def _trainer_loads(self) -> bool:
        """Whether Trainer's own way to read a checkpoint is the right one."""
        return isinstance(self.student, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled
