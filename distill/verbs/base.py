"""The interface of a verb: its options, the plan of a step, what a step returns, and the words on cards."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

from transformers import PretrainedConfig

from distill.common.records import StepRecord, StepResult
from distill.data.load import Data, Truncated
from distill.models.structure import LayerPairs

OtherTokens: TypeAlias = dict[str, dict[str, int]]
"""Of each teacher with other tokens than the student: the training `rows`, and those `left_out` of losses that compare
token with token."""


class Options(Protocol):
    """What the options of all verbs have in common; each verb's are a dataclass of its own."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def model(self) -> str | None:
        """What the step starts from: a Hub id, a folder, package:…, or an earlier step."""


@dataclass(frozen=True)
class ModelInput:
    """A model that a step starts from, or learns from."""

    reference: str
    """As the user wrote it: a step's name, or a model."""
    config: PretrainedConfig
    location: str
    """Where `from_pretrained` will find it."""
    tokenizer_location: str
    fingerprint: str
    is_step: bool = False
    has_head: bool = True
    """Whether it has a head trained for the task."""
    weight_bytes: int | None = None
    """Of a quantized model; None of one in float32."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All that is decided of a step before it runs: `check` tells it, the step is handed it, step.json records it.

    A verb that decides more has a class of its own on top of this one.
    """

    inputs: dict[str, ModelInput]
    """For each option that names a model (`teacher`, `teacher 2`, …, `model`), that model."""
    config: PretrainedConfig
    """Of the model that the step makes."""
    layers: tuple[int, ...] | None
    """0-based source layers that its blocks are taken from; None where no layers are chosen."""
    layer_pairs: dict[str, LayerPairs]
    """For each teacher the layers that losses match."""
    weight_bytes: int | None
    """Of a model that is quantized or exported, at most where the step decides it; None of one in float32."""
    is_adapter: bool
    """Whether the step leaves an adapter, and not a whole model."""
    is_export: bool = False
    """Whether the step leaves an export for an inference engine, from which no other step starts."""
    is_bound: bool = False
    """Whether the step itself decides sizes that hang on weights or the clock: `config` is then a likely one, and
    steps after it are planned anew from what it made."""

    @property
    def source(self) -> ModelInput:
        """The model that the weights come from."""
        return source_of(self.inputs)

    @property
    def tokenizer_location(self) -> str:
        """Where a tokenizer (or image processor) lies that reads as the step's will, before the step has run."""
        return self.source.tokenizer_location


def source_of(inputs: Mapping[str, ModelInput]) -> ModelInput:
    """The model that a step's weights come from: its `model`, else its first teacher."""
    return inputs["model"] if "model" in inputs else next(iter(inputs.values()))


@dataclass(frozen=True)
class Memory:
    """Bytes that a step holds at once; the teachers' own activations, which are short-lived, are left out."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    teachers: int = 0
    activations: int = 0
    """What the forward of the longest batch keeps for its backward."""

    @property
    def peak(self) -> int:
        """All together."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in asdict(self).items() if size)
        return f"{self.peak / 1e6:.1f} MB of memory at the peak ({parts})"


@dataclass(frozen=True)
class Estimate:
    """What one step will need."""

    num_parameters: int
    weight_bytes: int
    """Of the model that the step makes."""
    memory: Memory
    batch: str | None = None
    """The rows of an optimizer step, and how processes share them."""
    optimizer_steps: int | None = None
    seconds: float | None = None
    """Of its training, from batches timed on this machine."""
    cache_bytes: int = 0
    """Of its teachers' outputs, on disk."""
    truncated: Truncated | None = None
    """How many rows of each split the model's tokenizer cuts; null where none is read, and for images."""
    other_tokens: OtherTokens | None = None
    """What losses leave out; null where student and teachers read the same tokens, or none compares them."""


def describe_left_out(other_tokens: OtherTokens | None) -> list[str]:
    """How many rows losses leave out since a teacher reads them as other tokens, in words."""
    return [
        f"losses that compare token with token leave out {each['left_out']:,} of {each['rows']:,} training rows, which "
        f"{teacher} reads as other tokens"
        for teacher, each in (other_tokens or {}).items()
        if each["left_out"]
    ]


O = TypeVar("O", bound=Options)  # noqa: E741
P = TypeVar("P", bound=StepPlan)
O_contra = TypeVar("O_contra", bound=Options, contravariant=True)
P_contra = TypeVar("P_contra", bound=StepPlan, contravariant=True)
P_co = TypeVar("P_co", bound=StepPlan, covariant=True)


class MakePlan(Protocol[O_contra, P_co]):
    """Decides all of a step that can be decided before it runs."""

    def __call__(self, options: O_contra, inputs: dict[str, ModelInput], data: Data | None, /) -> P_co:
        """Plan one step.

        Args:
            options: of the step.
            inputs: the models that the options name.
            data: of the recipe; None where it can't be read, and then no label and no size is known.

        Raises:
            InputError: with every reason why no such model can be made, each beginning with its option.
        """


class RunStep(Protocol[O_contra, P_contra]):
    """Makes one model folder."""

    def __call__(self, options: O_contra, plan: P_contra, data: Data, folder: Path, /, *, profile: bool) -> StepResult:
        """Run one step.

        Args:
            options: of the step.
            plan: what `plan` decided; nothing of it is decided again.
            data: the rows.
            folder: the run folder; it may hold `checkpoints/` of a training that was cut off.
            profile: whether to leave a `StepProfile` of the training in the folder.
        """


@dataclass(frozen=True, kw_only=True)
class Verb(Generic[O, P]):
    """All that is asked of a verb; one that leaves something out can't be created."""

    name: str
    """What `run:` says in a recipe."""
    options: type[O]
    """The dataclass of its options."""
    plan: MakePlan[O, P]
    """What a step will make."""
    run: RunStep[O, P]
    """Makes one model folder, as it was planned."""

    # --- before it runs ---
    trains: bool
    """Whether its steps train: their options are a `TrainingConfig`, and their folders hold checkpoints meanwhile."""
    needs_head: tuple[str, ...]
    """The options whose models must have a head trained for the task; others get one, drawn anew if it is missing."""
    label_map: str | None
    """The option that maps label names of such a model from outside to the task's."""
    takes_quantized: Callable[[O], bool]
    """Whether a step of these options may start from a quantized model."""
    problems: Callable[[O, P, Data | None], list[str]]
    """What a step would stop at hours later, each beginning with its option where one is to blame; only asked of steps
    that will run. Data is None where it can't be read."""
    estimate: Callable[[O, P, Data], Estimate]
    """Size, memory and time of a step."""
    lines: Callable[[O, P], list[str]]
    """What is told of a plan before the step runs."""
    rows: Callable[[O, Data], Any]
    """What the fingerprint of a step says of the data, as JSON."""
    splits: Callable[[O, Iterable[str]], set[str]]
    """Those of the splits whose rows change the model; none where only their labels and `max_length` do."""
    resolved: Callable[[O], dict[str, Any]]
    """The options with their defaults."""

    # --- in a report ---
    is_smaller: Callable[[int, int], bool]
    """Whether a model should be smaller and quicker than the one it was made from, by the parameters of both."""
    is_compared: bool
    """Whether the first of its models is held against every other trained one on the same rows."""
    has_variants: bool
    """Whether its model is timed against its parent's plain weights too, which could be quicker on a CPU."""
    is_plain: Callable[[O], bool]
    """Whether a step only stores the weights of its `model` otherwise, so that what others win back is told against
    it."""

    # --- on a card ---
    relation: Literal["finetune", "quantized"]
    """What a card's `base_model_relation` says of its models, unless they are adapters."""
    tags: Callable[[Mapping[str, Any]], list[str]]
    """Tags of a card beside the verb's name, from the step's options as step.json holds them."""
    lineage_tags: tuple[str, ...]
    """Tags of the card of every model that it makes, and of those made from such a model."""
    summary: Callable[[Mapping[str, Any], Sequence[str]], str]
    """The words of a card on how a model was made, from the options and from the parents as the card names them."""
    details: Callable[[StepRecord, Callable[[str], str]], list[str]]
    """The lines of a card on how a model was made, from its record and the names that a card gives to models."""

    @property
    def module(self) -> str:
        """The module whose code makes its models; one of this package by its name inside."""
        return self.run.__module__.removeprefix("distill.")  # type: ignore[attr-defined]
