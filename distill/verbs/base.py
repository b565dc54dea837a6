"""What a verb of a recipe is, and what each leaves to be told of its run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PretrainedConfig

from distill.data.load import Data, Truncated
from distill.tasks.base import TaskKind


@dataclass(frozen=True)
class StepResult:
    """What a step tells of its run; it goes into step.json."""

    train_seconds: float | None = None
    samples_per_second: float | None = None
    """Training rows per second, all processes together."""
    world_size: int | None = None
    device: str | None = None
    effective_batch_size: int | None = None
    """Rows of an optimizer step, all processes together; null where batches are made by their tokens."""
    learning_rate: float | None = None
    """The highest; by default it follows from the student's width."""
    log: list[dict[str, float]] = field(default_factory=list)
    """Trainer's log lines."""
    truncated: Truncated | None = None
    """How many rows of each split the model's tokenizer cuts; null where none was read, and for images."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """All that is asked of a verb; one that leaves something out can't be created."""

    name: str
    """What `run:` says in a recipe."""
    options: type
    """The dataclass of its options."""
    run: Callable[..., StepResult]
    """Makes one model folder, from `(options, inputs, data, folder, *, profile)`.

    Of these, `options` are an instance of the class above; `inputs` say for each option that names a model where
    `from_pretrained` finds it; `folder` is the run folder and may hold `checkpoints/` of a run that was cut off;
    `profile` asks for a `StepProfile` of the training in the folder.
    """

    needs_head: bool
    """Whether its `model` must have a head trained for the task; where it needn't, a missing one is drawn."""
    complete: Callable[[Any, PretrainedConfig, TaskKind | None], None]
    """Write into the config of a step's model what its options alone decide, once labels are in it.

    Takes `(options, config, kind)`, with None as the kind where the data can't be read; raises `InputError` where no
    such model can be made.
    """
    rows: Callable[[Any, Data], Any]
    """What the fingerprint of a step says of the data, as JSON, from `(options, data)`."""
    splits: Callable[[Any, Iterable[str]], set[str]]
    """Those of the splits whose rows change the model, from `(options, splits)`; none where only their labels and
    `max_length` do."""
    resolved: Callable[[Any], dict[str, Any]]
    """The options with their defaults."""
    relation: Literal["finetune", "quantized"]
    """What a card's `base_model_relation` says of its models, unless they are adapters."""
    tags: Callable[[Mapping[str, Any]], list[str]]
    """Tags of a card beside the verb's name, from the step's options as step.json holds them."""
    lineage_tags: tuple[str, ...]
    """Tags of the card of every model that it makes, and of those made from such a model."""
    summary: Callable[[Mapping[str, Any], Sequence[str]], str]
    """The words of a card on how a model was made, from the options and from the parents as the card names them."""
    details: Callable[[Mapping[str, Any]], list[str]]
    """The lines of a card on the options that only this verb has."""

    @property
    def module(self) -> str:
        """The module whose code makes its models, by its name inside the package."""
        return self.run.__module__.removeprefix("distill.")
