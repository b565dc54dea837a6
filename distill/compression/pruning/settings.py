"""What can be chosen of pruning, and the sizes that follow from it alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from distill.compression.pruning.importance import Importance
from distill.compression.pruning.structure import BlockSizes, Kind, Sublayer, block_sizes, wanted_units
from distill.errors import InputError

STEP = 32
"""Neurons are left in multiples of this, which matrix kernels like."""

_Share = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=0)]


@dataclass(kw_only=True)
class PruningSettings:
    """Which heads and neurons a model loses. Its embeddings, norms and head stay as they are."""

    heads: _Share | list[_Count] | None = field(
        default=None,
        metadata={"help": "Share of the attention heads to remove, or how many to leave in each block: [12, 8, 6]."},
    )
    neurons: _Share | list[_Count] | None = field(
        default=None,
        metadata={
            "help": "Share of the feed-forward neurons to remove (what is left is a multiple of 32), or how many to "
            "leave in each block."
        },
    )
    intermediate_size: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Neurons to leave in every block, instead of neurons."}
    )
    speedup: Annotated[float, Field(gt=1)] | None = field(
        default=None,
        metadata={
            "help": "How many times as fast the model shall be, measured on this machine: heads, neurons and whole "
            "sublayers are removed where the least importance goes for a millisecond. Instead of the sizes above."
        },
    )
    uniform: bool | None = field(
        default=None,
        metadata={"help": "The same sizes in every block. By default true, and false with speedup."},
    )
    importance: Importance = field(
        default="fisher",
        metadata={
            "help": "What is removed first: what the model's own predictions depend on least (fisher), what moves "
            "them least from the unpruned model's (taylor; the first round is fisher), or small weights (magnitude)."
        },
    )
    rounds: Annotated[int, Field(ge=1)] = field(
        default=1, metadata={"help": "Rounds in which the units go, with importance measured anew in each."}
    )
    reconstruct: bool = field(
        default=True,
        metadata={
            "help": "Refit the output layers of what is left, by least squares on calibration rows; fisher and taylor "
            "then also keep what adds most to a block."
        },
    )

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("heads", "neurons", "intermediate_size")}
        given = [name for name, value in sizes.items() if value is not None]
        problems = []
        if not given and self.speedup is None:
            problems.append("heads, neurons, intermediate_size or speedup: say what to remove")
        if self.speedup is not None:
            problems += [f"{name}: is chosen by speedup; leave one of them out" for name in given]
            if not self.speedup > 1:
                problems.append(f"speedup: {self.speedup}; a model becomes faster with more than 1")
        if self.neurons is not None and self.intermediate_size is not None:
            problems.append("neurons: says the same as intermediate_size; leave one of them out")
        for name in ("heads", "neurons"):
            if isinstance(sizes[name], int | float) and not 0 <= sizes[name] < 1:
                problems.append(f"{name}: {sizes[name]} is no share; say one from 0 to below 1, or a list of counts")
        if self.uniform is False and self.intermediate_size is not None:
            problems.append("uniform: intermediate_size is the same in every block; leave uniform out")
        if self.uniform is not None and any(isinstance(value, list) for value in sizes.values()):
            problems.append("uniform: has no effect where sizes of blocks are listed; leave it out")
        if self.rounds < 1:
            problems.append(f"rounds: {self.rounds}; say at least 1")
        if problems:
            raise InputError(*problems)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is removed."""
        if self.speedup is not None:
            return ("heads", "neurons")
        of_neurons = self.neurons is not None or self.intermediate_size is not None
        kinds: list[tuple[Kind, bool]] = [("heads", self.heads is not None), ("neurons", of_neurons)]
        return tuple(kind for kind, given in kinds if given)

    @property
    def is_uniform(self) -> bool:
        """Whether blocks get the same sizes."""
        return self.speedup is None if self.uniform is None else self.uniform

    @property
    def reads_rows(self) -> bool:
        """Whether the model that is left depends on calibration rows."""
        return self.reconstruct or self.importance != "magnitude"


def planned_sizes(sublayers: Sequence[Sublayer], settings: PruningSettings) -> BlockSizes | None:
    """What the settings alone leave in each block; None where importance or the clock decides.

    Args:
        sublayers: of the whole model, as `prunable_sublayers` lists them.

    Raises:
        InputError: more units than there are, or other blocks.
    """
    if settings.speedup is not None or not settings.is_uniform:
        return None
    now = block_sizes(sublayers)
    wanted = {"heads": settings.heads, "neurons": settings.neurons}
    left: dict[Kind, tuple[int, ...]] = {}
    for kind, counts in (("heads", now.heads), ("neurons", now.neurons)):
        value = wanted[kind]
        if kind == "neurons" and settings.intermediate_size is not None:
            value = [settings.intermediate_size] * len(counts)
        if isinstance(value, list):
            left[kind] = tuple(value)  # type: ignore[index]
        else:
            left[kind] = tuple(units_left(kind, count, value or 0.0) for count in counts)  # type: ignore[index,arg-type]
    sizes = BlockSizes(left["heads"], left["neurons"])
    wanted_units(sublayers, sizes)
    return sizes


def units_left(kind: Kind, units: int, share: float) -> int:
    """How many units a sublayer keeps without a share of them: at least one of those there are.

    Args:
        kind: neurons are left in multiples of 32, where there are as many.
        units: how many there are now.
        share: what goes, from 0 to below 1.
    """
    left = round(units * (1 - share))
    if kind == "neurons" and share > 0 and left >= STEP:
        left -= left % STEP
    return max(left, min(1, units))
