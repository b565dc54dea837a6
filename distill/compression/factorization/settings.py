"""What can be chosen of a factorization, and the ranks that follow from it alone."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from distill.compression.factorization.ranks import STEP, breaks_even
from distill.compression.factorization.spectra import Method, matrix_of
from distill.compression.quantization.formats import matching, quantizable_modules
from distill.compression.quantization.mixed import size_in_bytes
from distill.errors import InputError, nearest_name
from distill.models.modules import FactorizedEmbedding, FactorizedLinear, factors_of
from distill.models.replacements import is_quantized

Rank = Annotated[int, Field(ge=1)]
Ranks = dict[str, int]
"""By full name of the module."""

_HEADER_OF_A_TENSOR = len('"":{"dtype":"F32","shape":,"data_offsets":[,]},')
_HEADER_OF_A_FILE = 8 + len('{"__metadata__":{"format":"pt"},}') + 8  # its length, and what fills up to 8


@dataclass(kw_only=True)
class FactorizationSettings:
    """Which matrices become products of two, and how narrow these are. Biases, norms and the head stay."""

    modules: Literal["embeddings", "linear", "all"] | list[str] | None = field(
        default=None,
        metadata={
            "help": "The word embeddings (by default), the linear layers of the blocks, all of these, or patterns of "
            "their names."
        },
    )
    rank: Rank | dict[str, Rank] | None = field(
        default=None,
        metadata={
            "help": "Rank of every factor, or by pattern of module names ({encoder.layer.0.*: 64}; a later pattern "
            "wins). Where factors would be larger than the matrix, it stays as it is."
        },
    )
    energy: Annotated[float, Field(gt=0, lt=1)] | None = field(
        default=None,
        metadata={"help": "Instead: the share of a matrix that is kept on average (0.9), for the fewest bytes."},
    )
    size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[kMG]B$")] | None = field(
        default=None,
        metadata={
            "help": "Instead: most bytes of the model's file in float32 (8MB); ranks are spread where they leave out "
            "least for a byte."
        },
    )
    method: Method = field(
        default="activation",
        metadata={
            "help": "What a truncation keeps: layers' outputs on calibration rows (activation), the rows of a weight "
            "that predictions depend on (fisher), or the weights alone (svd)."
        },
    )

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "size") if getattr(self, name) is not None]
        problems = []
        if len(given) != 1:
            problems.append(f"{', '.join(given) or 'rank, energy, size'}: say exactly one of rank, energy and size")
        if isinstance(self.rank, dict) and self.modules is not None:
            problems.append("modules: rank names the modules already; leave it out")
        if self.energy is not None and not 0 < self.energy < 1:
            problems.append(f"energy: {self.energy} is no share; say a number between 0 and 1")
        if problems:
            raise InputError(*problems)

    @property
    def reads_rows(self) -> bool:
        """Whether the factors depend on calibration rows."""
        return self.method != "svd"


def factorizable_modules(model: PreTrainedModel, settings: FactorizationSettings) -> dict[str, int]:
    """The modules that are to be factorized, and for each the largest rank at which that makes it smaller.

    Args:
        model: a float model, possibly on meta.
        settings: of which `modules` counts, and `rank` where it names them.

    Raises:
        InputError: a quantized model, embeddings that the output layer shares, or patterns that match nothing.
    """
    if is_quantized(model.config):
        raise InputError("model: it is quantized, and its weights can't be factorized; take the model before that")
    known: dict[str, Any] = {
        name: module
        for name, module in quantizable_modules(model).items()
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), FactorizedLinear | FactorizedEmbedding)
    }
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = list(settings.rank) if isinstance(settings.rank, dict) else settings.modules or "embeddings"
    if isinstance(wanted, str):
        large = {name for name, module in known.items() if isinstance(module, nn.Embedding)}
        linear = [name for name in known if name not in large]
        embeddings = [name for name in large if known[name] is words]
        chosen = {"embeddings": embeddings, "linear": linear, "all": embeddings + linear}[wanted]
    else:
        found = {pattern: matching(pattern, known, model.base_model_prefix) for pattern in wanted}
        key = "rank" if isinstance(settings.rank, dict) else "modules"
        missing = [
            f"{key}: {pattern!r} matches no linear layer of the blocks and no large embedding that is whole; "
            f"{nearest_name(pattern, known)}"
            for pattern, names in found.items()
            if not names
        ]
        if missing:
            raise InputError(*missing)
        chosen = [name for name in known if any(name in names for names in found.values())]
    tied = [name for name in chosen if getattr(output, "weight", None) is known[name].weight]
    if tied:
        raise InputError(
            f"modules: the output layer computes with the weight of {tied[0]}, which two factors don't have; say "
            "modules: linear"
        )
    if not chosen:
        raise InputError(f"modules: {type(model).__name__} has no {wanted} left to factorize")
    return {name: breaks_even(matrix_of(known[name]).shape) for name in chosen}


def planned_ranks(model: PreTrainedModel, settings: FactorizationSettings) -> Ranks | None:
    """The rank of each module that the settings alone say; None where weights and rows decide.

    Modules whose factors would be larger than they are are left out.

    Args:
        model: a float model, possibly on meta.
        settings: what is chosen.

    Raises:
        InputError: ranks that make nothing smaller, a size that can't be met or needs no choice; else as
            `factorizable_modules`.
    """
    most = factorizable_modules(model, settings)
    if settings.rank is None:
        _check_size(model, settings, most)
        return None
    ranks: Ranks = {}
    for pattern, rank in (settings.rank if isinstance(settings.rank, dict) else {"*": settings.rank}).items():
        ranks |= dict.fromkeys(matching(pattern, most, model.base_model_prefix), rank)
    smaller = {name: ranks[name] for name in most if ranks[name] <= most[name]}
    if not smaller:
        raise InputError(
            f"rank: the factors would be larger than the matrices; say {max(most.values())} at most, or other modules"
        )
    return smaller


def likely_ranks(model: PreTrainedModel, settings: FactorizationSettings) -> Ranks:
    """About what weights and rows will decide: half of the largest ranks that make the modules smaller."""
    return {name: max(1, most // 2) for name, most in factorizable_modules(model, settings).items() if most}


def bytes_beside(model: PreTrainedModel, names: Sequence[str]) -> int:
    """At most the bytes of a model's file in float32 besides the matrices of these modules, or their factors.

    Args:
        model: a float model, possibly on meta.
        names: of the modules.
    """
    matrices = {f"{name}.weight" for name in names}
    stored, parameters = model.state_dict(), dict(model.named_parameters())
    state = parameters | {name: each for name, each in model.named_buffers() if name in stored}
    tensors = {name: each for name, each in state.items() if name not in matrices}
    digits = 2 * len(str(sum(4 * each.numel() for each in state.values())))
    named = {name: list(each.shape) for name, each in state.items()}
    for name in names:
        factors = factors_of(model.get_submodule(name), max(1, min(state[f"{name}.weight"].shape)))
        named |= {f"{name}.{key}": list(each.shape) for key, each in factors.items()}
    header = sum(
        len(json.dumps(name)) + len(json.dumps(shape)) + _HEADER_OF_A_TENSOR + digits for name, shape in named.items()
    )
    return sum(4 * each.numel() for each in tensors.values()) + header + _HEADER_OF_A_FILE + len(names)


def _check_size(model: PreTrainedModel, settings: FactorizationSettings, most: Mapping[str, int]) -> None:
    """Refuse a size that the smallest ranks exceed, or that the whole model has already."""
    if settings.size is None:
        return
    wanted = size_in_bytes(settings.size)
    shapes = {name: matrix_of(model.get_submodule(name)).shape for name in most}
    smallest = bytes_beside(model, list(most)) + sum(
        4 * min(STEP, most[name]) * sum(shape) if most[name] else 4 * shape.numel() for name, shape in shapes.items()
    )
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    if wanted < smallest:
        raise InputError(
            f"size: {settings.size} is too little; with ranks of {STEP} the model takes "
            f"{math.ceil(smallest / 1e3) / 1e3} MB"
        )
    if wanted >= whole:
        raise InputError(f"size: the model takes {whole / 1e6:.2f} MB as it is, so nothing is to be factorized")
