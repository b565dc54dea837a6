"""How each kind of module is built that plain transformers can't describe: by its saved `kind`, a dataclass.

A new kind is a frozen dataclass with a line in `REPLACEMENTS`; one whose weights are floats belongs to
`models/replacements.py`, where whatever makes models of a config finds it. Its module stores a tensor under the name of
every weight that it takes the place of, of a shape that plain transformers refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from distill.models.description import entries_of
from distill.models.replacements import STRUCTURAL

if TYPE_CHECKING:  # the quantizer is registered while they are being imported
    from transformers import PretrainedConfig, PreTrainedModel

Format = Literal["int8", "nf4", "fp4"]


@dataclass(frozen=True)
class Int8:
    """A linear layer or embedding in int8.

    Args:
        threshold: of `Int8Linear`.
    """

    kind: ClassVar[str] = "int8"

    threshold: float | None = None

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put it there."""
        _put_quantized(model, name, self)


@dataclass(frozen=True)
class FourBit:
    """What the 4-bit formats share.

    Args:
        double_quant: whether the block scales are quantized too.
        block_size: weights that share a scale.
        compute_dtype: what weights are expanded to.
    """

    kind: ClassVar[Literal["nf4", "fp4"]]

    double_quant: bool = True
    block_size: int = 64
    compute_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put it there."""
        _put_quantized(model, name, self)


@dataclass(frozen=True)
class Nf4(FourBit):
    """A linear layer or embedding in nf4."""

    kind = "nf4"


@dataclass(frozen=True)
class Fp4(FourBit):
    """A linear layer in fp4."""

    kind = "fp4"


@dataclass(frozen=True)
class Tied:
    """An output layer that computes with the quantized word embeddings."""

    kind: ClassVar[str] = "tied"

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put it there; the embeddings stand in their place already."""
        from distill.compression.quantization.modules import tie_output  # it imports bitsandbytes

        tie_output(model, name)


QUANTIZED: dict[str, type[Int8] | type[Nf4] | type[Fp4]] = {each.kind: each for each in (Int8, Nf4, Fp4)}
REPLACEMENTS: dict[str, Any] = {**STRUCTURAL, **QUANTIZED, Tied.kind: Tied}


def quantized_as(format: str, settings: Any) -> Int8 | Nf4 | Fp4:
    """How a module is built in a format.

    Args:
        settings: `QuantizationSettings`, or any object that has the fields of the format's dataclass.
    """
    chosen = QUANTIZED[format]
    return chosen(**{field.name: getattr(settings, field.name) for field in fields(chosen)})


def formats_of(config: PretrainedConfig) -> tuple[dict[str, Format], dict[str, Any]]:
    """The format of each quantized module that a config describes, by name, and the fields that say how."""
    formats: dict[str, Format] = {}
    given: dict[str, Any] = {}
    for entry in entries_of(config):
        if entry.kind in QUANTIZED:
            formats |= {name: cast(Format, entry.kind) for name in entry.names}
            given |= entry.fields
    return formats, given


def _put_quantized(model: PreTrainedModel, name: str, replacement: Int8 | FourBit) -> None:
    from distill.compression.quantization.modules import empty_module  # it imports bitsandbytes

    module: Any = model.get_submodule(name)
    quantized = empty_module(module, replacement, module.weight.dtype)
    model.set_submodule(name, quantized.requires_grad_(False))
