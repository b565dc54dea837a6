"""What training minimises and how: TrainingArguments with our defaults, and the losses' options on top."""

import copy
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, cast, get_type_hints

import torch
from pydantic import ConfigDict, Field
from transformers import TrainingArguments
from typing_extensions import NotRequired, TypedDict  # typing's own from Python 3.12 on

from distill.common.distributed import check_world_size, runs_on_cpu
from distill.common.hardware import has_bf16
from distill.common.options import checked
from distill.compression.quantization.formats import EmbeddingFormat, Format, QuantizationSettings
from distill.errors import InputError
from distill.losses import AttentionLoss, HiddenLoss, SoftLoss
from distill.tasks.base import is_better_lower
from distill.training.features import LayerMap

Schedule = TypedDict(
    "Schedule",
    {
        "from": Annotated[float, Field(ge=0)],
        "to": Annotated[float, Field(ge=0)],
        "shape": NotRequired[Literal["linear", "cosine"]],
    },
)
"""A value that moves over training, from the first optimizer step to the last."""

Schedule.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]

Weight = Annotated[float, Field(ge=0)] | Schedule


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
        default="group_by_length",
        metadata={
            "help": "How rows are drawn; rows of like length together by default.",
            "choices": TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["choices"],
        },
    )
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between log lines; below 1, a share of all."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between checkpoints; below 1, a share of all."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    learning_rate: Annotated[float, Field(gt=0)] = _inherited("learning_rate")
    num_train_epochs: Annotated[float, Field(gt=0)] = _inherited("num_train_epochs")
    max_steps: Literal[-1] | Annotated[int, Field(ge=1)] = _inherited("max_steps")
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = _inherited("gradient_accumulation_steps")
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = _inherited("label_smoothing_factor")
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = _inherited("neftune_noise_alpha")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = _inherited("seed")
    max_grad_norm: Annotated[float, Field(ge=0)] = _inherited("max_grad_norm")
    class_weights: list[Annotated[float, Field(gt=0)]] | None = field(
        default=None, metadata={"help": "Weight of each class in the hard loss, in the order of the labels."}
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = _inherited("adam_beta1")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = _inherited("adam_beta2")
    adam_epsilon: Annotated[float, Field(gt=0)] = _inherited("adam_epsilon")
    max_tokens_per_batch: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={"help": "Tokens of a training batch per process, padding too, instead of a number of rows."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Matrix products in bfloat16; by default where the hardware has them."}
    )
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = field(
        default=0.15, metadata={"help": "For a masked LM: share of the tokens that are masked, anew in every epoch."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Rows of a batch one after the other without padding; pays where lengths in it differ much."},
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Leave the word embeddings as they are: less memory, shorter steps on a CPU."}
    )
    qat: Literal["int8", "nf4", "fp4", "onnxruntime", "openvino"] | None = field(
        default=None,
        metadata={
            "help": "Train with the weights that a quantize step of this format will leave (int8, nf4 or fp4), or with "
            "the arithmetic of an export to this engine in int8 (onnxruntime or openvino), so that it costs less; what "
            "is saved is the float model, and beside it qat.json with an engine's scales, for export."
        },
    )
    qat_embeddings: EmbeddingFormat = field(
        default="int8", metadata={"help": "qat: what large embeddings will be quantized to: int8, nf4 or none."}
    )
    qat_double_quant: bool = field(
        default=True, metadata={"help": "qat: the scales of 4-bit blocks will be quantized too."}
    )
    qat_activations: bool = field(
        default=False,
        metadata={"help": "qat: 8-bit inputs of the quantized layers too, for engines that compute in int8 on a CPU."},
    )
    qat_delay: Annotated[float, Field(ge=0)] = field(
        default=0.0, metadata={"help": "qat: steps before it sets in; below 1, their share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN out of the logged loss; here such a loss stops the training."}
    )
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "No moving progress bar; by default where stderr is no terminal."}
    )

    def __post_init__(self) -> None:
        for name in _PATHS & {each.name for each in fields(self)}:
            if isinstance(getattr(self, name), str):
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a moving bar fills a log file with its every move
        if runs_on_cpu():
            self.use_cpu = True
        if self.bf16 is None:
            accelerator = None if self.use_cpu else torch.accelerator.current_accelerator(check_available=True)
            if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":  # the launcher's word
                self.fp16 = True
            self.bf16 = not self.fp16 and has_bf16(accelerator.type if accelerator else "cpu")
        best = self.metric_for_best_model
        if best is not None and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = not is_better_lower(best)  # Trainer itself knows `…loss` alone
        super().__post_init__()
        if not (self.bf16 or self.fp16):
            self.mixed_precision = "no"  # else a launcher's word would be stronger than an explicit false
        check_world_size(self.world_size)
        if self.n_gpu > 1:
            self._n_gpu = 1  # else Trainer splits batches with DataParallel, which knows nothing of our losses
        problems = _field_problems(self, _QAT_OPTIONS)
        if self.qat is None:
            options = TrainingConfig.__dataclass_fields__
            changed = [name for name in _QAT_OPTIONS if getattr(self, name) != options[name].default]
            problems += [f"{name}: has no effect without qat; say qat: int8, nf4 or fp4" for name in changed]
        if self.qat_engine is not None:
            problems += self._engine_problems(self.qat_engine)
        if problems:
            raise InputError(*problems)

    @property
    def quantization(self) -> QuantizationSettings | None:
        """What a quantization-aware step trains for, where that is a `quantize` step."""
        if self.qat is None or self.qat_engine is not None:
            return None
        return QuantizationSettings(
            format=cast(Format, self.qat), embeddings=self.qat_embeddings, double_quant=self.qat_double_quant
        )

    @property
    def qat_engine(self) -> str | None:
        """What a quantization-aware step trains for, where that is an engine."""
        return self.qat if self.qat in ("onnxruntime", "openvino") else None

    def _engine_problems(self, engine: str) -> list[str]:
        """What contradicts `qat: onnxruntime` and `qat: openvino`."""
        idle = [name for name, default in (("qat_double_quant", True), ("qat_activations", False))
                if getattr(self, name) != default]  # fmt: skip
        problems = [f"{name}: has no effect with qat: {engine}; leave it out" for name in idle]
        if self.qat_embeddings == "nf4":
            problems.append(f"qat_embeddings: {engine} stores them in int8; say int8, or none for float")
        if self.fsdp or self.deepspeed:
            problems.append(f"qat: {engine} needs whole weights, and FSDP and DeepSpeed split them; leave one out")
        return problems


_PATHS = {"cache_dir", "deepspeed", "fsdp_config", "accelerator_config", "resume_from_checkpoint"}
"""Options that name files, or may; Trainer itself expands `~` in output_dir alone."""

_QAT_OPTIONS = ("qat", "qat_embeddings", "qat_double_quant", "qat_activations", "qat_delay")


@dataclass
class DistillationConfig(TrainingConfig):
    """What a `DistillationTrainer` minimises: the weighted sum of the losses in `distill.losses`.

    The defaults, the squared error of the logits alone and patience (Beyer et al. 2022), did best of what was tried
    (recipes/README.md). A weight of 0 is off. Every weight and the temperature may be a schedule,
    {from: 4, to: 1, shape: linear | cosine}, driven by `global_step / max_steps`.

    Raises:
        InputError: a value of the wrong type or out of range, or all weights 0.
    """

    learning_rate: Annotated[float, Field(gt=0)] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Peak learning rate; by default 2e-4 · 384 / the student's hidden size, in a recipe a quarter of "
            "it where a trained `model` keeps its layers, as after prune."
        },
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = field(
        default=8.0,
        metadata={"help": "Passes over the rows; a student gains from more of them than labels do."},
    )
    temperature: Annotated[float, Field(gt=0)] | Schedule | None = field(
        default=None,
        metadata={"help": "Softens both distributions of the soft loss, 2 if unset; a number or a schedule."},
    )
    alpha: Annotated[float, Field(ge=0, le=1)] | None = field(
        default=None, metadata={"help": "Shorthand for hard_weight: alpha, soft_weight: 1 - alpha."}
    )
    soft_weight: Weight = field(default=1.0, metadata={"help": "Weight of the teacher's predictions."})
    soft_loss: SoftLoss | None = field(
        default=None,
        metadata={
            "help": "Divergence of predictions: mse (of the logits, without a temperature), kl (Hinton), reverse_kl, "
            "js, dkd (decoupled). By default kl where a temperature is given, else mse; scores: squared error."
        },
    )
    dkd_alpha: Annotated[float, Field(ge=0)] = field(
        default=1.0, metadata={"help": "dkd: weight of the target class against the rest."}
    )
    dkd_beta: Annotated[float, Field(ge=0)] = field(
        default=8.0, metadata={"help": "dkd: weight of the classes among the rest."}
    )
    hard_weight: Weight = field(default=0.0, metadata={"help": "Weight of the labels; rows without one are skipped."})
    hidden_weight: Weight = field(default=0.0, metadata={"help": "Weight of the teacher's hidden states."})
    hidden_loss: HiddenLoss = field(
        default="mse",
        metadata={"help": "Distance of hidden states: mse, cosine, or pkd (normalised first states)."},
    )
    layer_map: LayerMap = field(
        default="uniform",
        metadata={"help": "Hidden states to match: uniform, last, first, or [student, teacher] pairs; 0: embeddings."},
    )
    embedding_weight: Weight = field(
        default=0.0, metadata={"help": "Weight of the embedding layer's output (squared error)."}
    )
    attention_weight: Weight = field(
        default=0.0, metadata={"help": "Weight of the attention maps; switches both models to eager attention."}
    )
    attention_loss: AttentionLoss = field(default="mse", metadata={"help": "Distance of attention maps."})
    attention_layer_map: LayerMap = field(default="uniform", metadata={"help": "Blocks whose attention maps match."})
    relation_weight: Weight = field(
        default=0.0, metadata={"help": "Weight of the relations among queries, keys and values (MiniLMv2)."}
    )
    relation_heads: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Relation heads; by default the most up to the teacher's that fit both widths."}
    )
    relation_layer_map: LayerMap = field(
        default_factory=lambda: [(-1, -1)], metadata={"help": "Blocks whose relations match; by default the last."}
    )
    contrastive_weight: Weight = field(
        default=0.0, metadata={"help": "Weight of telling a row's own teacher state from those of other rows."}
    )
    contrastive_temperature: Annotated[float, Field(gt=0)] = field(
        default=0.1, metadata={"help": "Temperature of the contrastive loss's similarities."}
    )
    contrastive_negatives: Annotated[int, Field(ge=1)] = field(
        default=256, metadata={"help": "Training rows whose teacher states are the negatives."}
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = field(
        default=0.0,
        metadata={"help": "The student's dropout while it learns; null leaves what its config says."},
    )
    cache_teacher: Literal["auto", "none", "logits", "hidden", "relations"] = field(
        default="auto",
        metadata={
            "help": "What of the teacher is computed once and kept on disk, logits or also the states that are "
            "compared; auto decides by passes over the rows, size and disk; none runs it in every step."
        },
    )
    cache_top_k: Annotated[int, Field(ge=1)] = field(
        default=64,
        metadata={
            "help": "For a causal LM with cache_teacher: logits: words that are kept of each token; the others share "
            "what mass is left."
        },
    )
    cache_limit_gb: Annotated[float, Field(gt=0)] = field(
        default=10.0, metadata={"help": "Most that all cached teachers may take on disk, in GB."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where teachers are cached; by default `distill` in HF_HOME."}
    )
    teacher_weights: list[Annotated[float, Field(gt=0)]] | None = field(
        default=None, metadata={"help": "Share of each of several teachers; equal by default."}
    )

    def __post_init__(self) -> None:
        inherited = {each.name for each in fields(TrainingConfig)}
        own = [each.name for each in fields(DistillationConfig) if each.name not in inherited]
        problems = _field_problems(self, own)
        if not problems and self.alpha is not None:
            problems += self._apply_alpha(self.alpha)
        if not problems:
            problems += self._choose_soft_loss()
        if not problems and not any(map(is_on, self.loss_weights.values())):
            problems.append(f"{', '.join(f'{part}_weight' for part in PARTS)}: all are 0, so there is nothing to learn")
        if problems:
            raise InputError(*problems)
        super().__post_init__()

    def _choose_soft_loss(self) -> list[str]:
        if self.soft_loss is None:
            self.soft_loss = "mse" if self.temperature is None else "kl"
        if self.soft_loss == "mse":
            return ["temperature: has no effect on soft_loss: mse; leave one of them out"] * (
                self.temperature is not None
            )
        self.temperature = 2.0 if self.temperature is None else self.temperature
        ends = self.temperature if isinstance(self.temperature, dict) else {"from": self.temperature}
        if 0 in (ends["from"], ends.get("to")):
            return ["temperature: both ends of a schedule should be above 0"]
        return []

    def _apply_alpha(self, alpha: float) -> list[str]:
        meant = {"soft_weight": 1 - alpha, "hard_weight": alpha}
        defaults = {name: DistillationConfig.__dataclass_fields__[name].default for name in meant}
        contradicted = [name for name in meant if getattr(self, name) not in (defaults[name], meant[name])]
        self.soft_weight, self.hard_weight = meant["soft_weight"], meant["hard_weight"]
        return [f"{name}: is set by alpha; leave one of them out" for name in contradicted]

    @property
    def loss_weights(self) -> dict[str, float | Schedule]:
        """The weight of each part of the loss."""
        return {part: getattr(self, f"{part}_weight") for part in PARTS}


PARTS = ("soft", "hard", "hidden", "embedding", "attention", "relation", "contrastive")
"""Of the loss; each has a `…_weight`, and `loss/…` in the log."""


def default_learning_rate(width: int, *, trained: bool = False) -> float:
    """2e-4 for a student 384 wide, and inversely with the width (Yang et al. 2022, table 3, for Adam).

    Args:
        width: hidden size of the student.
        trained: whether it predicts well already, as a pruned model does: a quarter then, since larger steps undo more
            in the beginning than they win back (recipes/README.md, shapes).
    """
    return 2e-4 * 384 / width / (4 if trained else 1)


def is_on(weight: float | Schedule) -> bool:
    """Whether a weight is ever above 0."""
    return max(weight["from"], weight["to"]) > 0 if isinstance(weight, dict) else weight > 0


def _field_problems(config: TrainingConfig, names: Iterable[str]) -> list[str]:
    """Values of our own options against their annotations, for those who call from Python."""
    annotations = get_type_hints(type(config), include_extras=True)
    problems = []
    for name in names:
        try:
            setattr(config, name, checked(getattr(config, name), annotations[name]))
        except InputError as error:
            problems.append(f"{name}: {error}")
    return problems
