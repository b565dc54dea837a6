"""The verbs of a recipe: each one's options, and what follows from them alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PretrainedConfig, PreTrainedModel

from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.mixed import budget_in_bytes, check_budget
from distill.compression.quantization.quantize import quantized_size
from distill.compression.student import StudentArch, Width, choose_layers
from distill.errors import InputError
from distill.models.adapters import LoraOptions
from distill.models.structure import depth_of
from distill.training.config import DistillationConfig, TrainingConfig
from distill.training.teachers import FROM_DATA


@dataclass
class StudentOptions:
    """How a student is made from the model it starts from."""

    student_arch: StudentArch = field(
        default="same", metadata={"help": "Architecture of the student: its source's, or DistilBERT's (from a BERT)."}
    )
    num_layers: int | None = field(
        default=None,
        metadata={
            "help": "Layers of the student. By default all; half of the teacher's for a distill step without model."
        },
    )
    layers: Literal["uniform"] | list[int] = field(
        default="uniform", metadata={"help": "0-based source layers that seed the student's; uniform spreads them."}
    )
    hidden_size: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Width of the student where it is another: it is then freshly initialised."}
    )
    num_attention_heads: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Heads of the student where they are others: it is then freshly initialised."}
    )
    intermediate_size: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={"help": "Neurons of the student's feed-forward layers; those of its source that weigh most stay."},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Start from the config of `model` alone, with new weights."}
    )
    lora: LoraOptions | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters alone: {r: 8, alpha: 16, dropout: 0, target_modules: all-linear}; the run "
            "folder then holds the adapter. Needed where `model` is quantized."
        },
    )
    merge: bool = field(
        default=False, metadata={"help": "With lora: add the adapters to the weights, and save the whole model."}
    )


@dataclass
class FinetuneOptions(StudentOptions, TrainingConfig):
    """Train a model on labels alone: a teacher, or the same student without a teacher."""

    model: str = field(
        kw_only=True, metadata={"help": "What to train: a Hub id, a folder, package:…, or an earlier step."}
    )


@dataclass
class DistillOptions(StudentOptions, DistillationConfig):
    """Train a student against a teacher."""

    teacher: str | list[str] = field(
        kw_only=True,
        metadata={
            "help": "The fine-tuned teacher, or several: a Hub id, a folder, package:…, an earlier step; data stands "
            "for predictions in the rows (data.teacher_logits, data.teacher_probabilities)."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "What the student starts from; by default layers of the teacher."}
    )
    teacher_label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The teacher's label names → the task's, where they differ."}
    )


@dataclass(kw_only=True)
class QuantizeOptions(QuantizationSettings):
    """Quantize a model with bitsandbytes, embeddings included."""

    model: str = field(metadata={"help": "What to quantize: a Hub id, a folder, package:…, or an earlier step."})
    bits_budget: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?[kMG]B$")] | None = field(
        default=None,
        metadata={
            "help": "Instead of format: pick one for every module by measuring what each costs, within this many bits "
            "per quantizable weight on average (5.2), or bytes of the whole model (15.3MB). Measured with plain "
            "rounding, whatever gptq says."
        },
    )
    gptq: bool = field(
        default=False,
        metadata={
            "help": "Round 4-bit weights so that their errors cancel out on calibration rows: as many bytes, and less "
            "of a change."
        },
    )
    calibration_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={
            "help": "Training rows that bits_budget (by default 256) and gptq (as many as hold 65,536 tokens; 512 "
            "images) measure on."
        },
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        if self.bits_budget is not None and self.format is not None:
            raise InputError("format: is picked by bits_budget; leave one of them out (overrides fix single modules)")
        in_four_bits = {self.format, *self.overrides.values()} & {"nf4", "fp4"} or self.bits_budget is not None
        if self.gptq and not in_four_bits:
            raise InputError("gptq: is for weights in 4 bit; say format: nf4, or leave it out")
        if self.calibration_rows is not None and not self.reads_rows:
            raise InputError("calibration_rows: has no effect without bits_budget or gptq; leave it out")

    @property
    def reads_rows(self) -> bool:
        """Whether the model depends on training rows."""
        return self.gptq or self.bits_budget is not None

    def planned_size(self, model: PreTrainedModel) -> int:
        """Bytes of weights that the step will leave, from a float model that may lie on meta.

        Raises:
            InputError: patterns that match nothing, or a budget that is too small.
        """
        if self.bits_budget is None:
            return quantized_size(model, self)
        return check_budget(model, self, budget_in_bytes(self.bits_budget, model, self))


Options = FinetuneOptions | DistillOptions | QuantizeOptions


def referenced_models(given: Mapping[str, Any]) -> dict[str, str]:
    """The models that a step's options name: `teacher`, `teacher 2`, …, `model`."""
    models = {
        "teacher" if number == 1 else f"teacher {number}": reference
        for number, reference in enumerate((each for each in teachers_of(given) if each != FROM_DATA), start=1)
    }
    return models | ({"model": given["model"]} if given.get("model") is not None else {})


def is_teacher(option: str) -> bool:
    """Whether a key of `referenced_models` names a teacher."""
    return option.startswith("teacher")


def teachers_of(given: Mapping[str, Any]) -> list[str]:
    """The teachers that a step's options name, predictions in the rows (`data`) among them."""
    teacher = given.get("teacher") or []
    return [teacher] if isinstance(teacher, str) else list(teacher)


def is_adapter(options: Options) -> bool:
    """Whether a step leaves an adapter, and not a whole model."""
    return isinstance(options, StudentOptions) and options.lora is not None and not options.merge


def holds_adapter(options: Mapping[str, Any]) -> bool:
    """Whether a run folder holds an adapter, from the options as its step.json holds them."""
    return options.get("lora") is not None and not options.get("merge")


def chosen_layers(options: StudentOptions, num_source_layers: int) -> list[int]:
    """The 0-based source layers of a step's student.

    Raises:
        InputError: out of range.
    """
    num_layers = options.num_layers
    if num_layers is None and options.layers == "uniform" and isinstance(options, DistillOptions) and not options.model:
        num_layers = max(1, num_source_layers // 2)
    if num_source_layers == 0 and num_layers is None and options.layers == "uniform":
        return []  # a convolutional network
    return choose_layers(options.layers, num_layers, num_source_layers)


def width_of_student(options: StudentOptions) -> Width:
    """The sizes that a step's options give its student."""
    return Width(options.hidden_size, options.num_attention_heads, options.intermediate_size)


def cuts_student(options: StudentOptions, source: PretrainedConfig) -> bool:
    """Whether a step's student is another than the model it starts from."""
    layers = chosen_layers(options, depth_of(source))
    other = options.student_arch != "same" or width_of_student(options).differs_from(source)
    return other or layers != list(range(depth_of(source)))
