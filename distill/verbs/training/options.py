"""The options that the verbs which train share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from distill.compression.student import StudentArch, Width
from distill.models.adapters import LoraOptions
from distill.training.config import TrainingConfig


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

    @property
    def width(self) -> Width:
        """The sizes that the options give the student."""
        return Width(self.hidden_size, self.num_attention_heads, self.intermediate_size)

    @property
    def leaves_adapter(self) -> bool:
        """Whether the step leaves an adapter, and not a whole model."""
        return self.lora is not None and not self.merge


class TrainingOptions(StudentOptions, TrainingConfig):
    """What all verbs that train take.

    No dataclass of its own: its fields would stand above a `DistillationConfig`'s beside it, with other defaults.
    """


def holds_adapter(options: Mapping[str, Any]) -> bool:
    """Whether a run folder holds an adapter, from the options as its step.json holds them."""
    return options.get("lora") is not None and not options.get("merge")
