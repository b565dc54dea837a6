"""Which module of a model goes to which format, and what that weighs."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compression.quantization.layers import scales_size
from distill.compression.quantization.modules import DTYPES
from distill.compression.replacements import Format
from distill.errors import InputError, near_name
from distill.models.modules import FactorizedEmbedding
from distill.models.structure import depth_of, find_blocks

FormatOrBf16 = Literal["int8", "nf4", "fp4", "bf16"]
EmbeddingFormat = Literal["int8", "nf4", "none"]
ComputeDtype = Literal["bf16", "fp32", "fp16"]
RestDtype = Literal["bf16", "fp32"]
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

# Smaller tables, such as token types, win nothing that shows.
_LEAST_WEIGHTS_OF_AN_EMBEDDING = 50_000


@dataclass(kw_only=True)
class QuantizationSettings:
    """What a model is quantized to. Layer norms, biases and heads (pooler included) never are."""

    format: FormatOrBf16 | None = field(
        default=None,
        metadata={
            "help": "Format of the linear layers in the blocks; needed unless bits_budget picks. bf16 rounds every "
            "weight of the model to bfloat16 and leaves a plain one."
        },
    )
    embeddings: EmbeddingFormat | None = field(
        default=None,
        metadata={
            "help": "Format of the word embeddings, and of position embeddings large enough to matter: int8 (a scale "
            "per row), nf4, none. By default int8, or what bits_budget picks."
        },
    )
    double_quant: bool = field(default=True, metadata={"help": "Quantize the scales of 4-bit blocks too."})
    block_size: BlockSize = field(default=64, metadata={"help": "Weights that share a scale in the 4-bit formats."})
    compute_dtype: ComputeDtype = field(
        default="bf16", metadata={"help": "What 4-bit weights are expanded to for matrix products."}
    )
    rest_dtype: RestDtype = field(default="bf16", metadata={"help": "Of everything that is not quantized."})
    threshold: Annotated[float, Field(ge=0)] | None = field(
        default=None,
        metadata={
            "help": "int8: inputs from this size on are multiplied unquantized (LLM.int8), 0 for none. By default 0 on "
            "a CPU, where it is slower than float32, and 6 on a GPU."
        },
    )
    skip: list[str] = field(
        default_factory=list,
        metadata={"help": "Patterns of module names (encoder.layer.0.*) that are left in rest_dtype."},
    )
    overrides: dict[str, Literal["int8", "nf4", "fp4", "none"]] = field(
        default_factory=dict,
        metadata={"help": "Formats by pattern of module names, {encoder.layer.0.*: int8}; a later pattern wins."},
    )


def choose_formats(model: PreTrainedModel, settings: QuantizationSettings) -> dict[str, Format]:
    """The format of every module that will be quantized, by its full name; none in bf16.

    Patterns are fnmatch's, over full names with or without the base model's prefix (`bert.`).

    Args:
        model: a float model, possibly on meta.

    Raises:
        InputError: no format, a pattern that matches nothing, fp4 for an embedding, settings that bf16 leaves no
            place for, or nothing to quantize.
    """
    if settings.format is None or settings.format not in get_args(FormatOrBf16):
        raise InputError(f"format: {settings.format or 'missing'}; say {', '.join(get_args(FormatOrBf16))}")
    if settings.format == "bf16":
        defaults = QuantizationSettings(format="bf16")
        idle = [name for name, value in vars(defaults).items() if getattr(settings, name) != value]
        if idle:
            raise InputError(*(f"{name}: has no effect with format: bf16; leave it out" for name in idle))
        return {}
    modules = quantizable_modules(model)
    embedding_format = settings.embeddings or "int8"
    chosen: dict[str, str] = {
        name: embedding_format if isinstance(module, nn.Embedding) else settings.format
        for name, module in modules.items()
    }
    chosen |= fixed_formats(model, settings)
    kept: dict[str, Format] = {name: format for name, format in chosen.items() if format != "none"}  # type: ignore[misc]
    if not kept:
        raise InputError("skip: leaves nothing to quantize")
    return kept


def fixed_formats(model: PreTrainedModel, settings: QuantizationSettings) -> dict[str, str]:
    """What `overrides` and `skip` say of single modules, by name; `none` for those left as they are.

    Args:
        model: a float model, possibly on meta.

    Raises:
        InputError: a pattern that matches nothing, or fp4 for an embedding; else as `quantizable_modules`.
    """
    modules = quantizable_modules(model)
    patterns = [("overrides", pattern, format) for pattern, format in settings.overrides.items()]
    patterns += [("skip", pattern, "none") for pattern in settings.skip]
    fixed: dict[str, str] = {}
    problems = []
    for key, pattern, format in patterns:
        matched = matching(pattern, modules, model.base_model_prefix)
        if not matched:
            problems.append(f"{key}: {pattern!r} matches no quantizable module; {_nearest(pattern, modules)}")
        for name in matched:
            if format == "fp4" and isinstance(modules[name], nn.Embedding):
                problems.append(f"{key}: {pattern!r} gives fp4 to the embedding {name}; say int8, nf4 or none")
            fixed[name] = format
    if problems:
        raise InputError(*problems)
    return fixed


def quantizable_modules(model: PreTrainedModel) -> dict[str, Any]:
    """Large embeddings, and the linear layers inside the blocks (GPT-2's `Conv1D` too), by name.

    Of factorized ones it is the factors; the projection of factorized word embeddings counts as a layer.

    Raises:
        InputError: no linear layers there, or blocks that can't be found.
    """
    if depth_of(model.config) == 0:
        raise InputError(f"{type(model).__name__}: has no transformer blocks, whose layers could be quantized")
    blocks, _ = find_blocks(model)
    word_embedding: Any = model.get_input_embeddings()
    projection = None
    if isinstance(word_embedding, FactorizedEmbedding):
        word_embedding, projection = word_embedding.table, word_embedding.projection
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        large = isinstance(module, nn.Embedding) and module.weight.numel() >= _LEAST_WEIGHTS_OF_AN_EMBEDDING
        inside = name.startswith(f"{blocks}.") or module is projection
        linear = inside and (type(module) is nn.Linear or isinstance(module, Conv1D))
        words = module is word_embedding and isinstance(module, nn.Embedding)  # an image model's are convolutions
        if words or large or linear:
            modules[name] = module
    if all(isinstance(module, nn.Embedding) for module in modules.values()):
        raise InputError(f"{type(model).__name__}: no linear layers in its blocks, so there is nothing to quantize")
    return modules


# --- bytes ----------------------------------------------------------------------------------------------------------


def module_size(module: Any, format: str, settings: QuantizationSettings) -> int:
    """Bytes of a linear layer's or embedding's weights (no bias) in a format, scales counted.

    Args:
        module: in float, possibly on meta.
        format: int8, nf4 or fp4; `none` is the rest's dtype.
        settings: of which the block size, double quantization and the rest's dtype count.
    """
    count = module.weight.numel()
    rows, width = module.weight.shape
    if format == "none":
        return count * DTYPES[settings.rest_dtype].itemsize
    if isinstance(module, nn.Embedding):
        if format == "int8":
            return count + 2 * rows
        blocks = rows * math.ceil(width / settings.block_size)
        return rows * math.ceil(width / 2) + scales_size(blocks, settings.double_quant)
    if format == "int8":
        return count + 4 * (width if isinstance(module, Conv1D) else rows)
    return math.ceil(count / 2) + scales_size(math.ceil(count / settings.block_size), settings.double_quant)


def model_size(model: PreTrainedModel, formats: Mapping[str, str], settings: QuantizationSettings) -> int:
    """Bytes of all the weights that a float model will have once its modules are quantized to these formats.

    Args:
        model: possibly on meta.
        formats: by name of module, `none` among them; modules that are not named count in the rest's dtype.
        settings: as for `module_size`.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in formats}
    quantized = {id(module.weight) for module in modules.values()}
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in quantized)
    size = sum(module_size(module, formats[name], settings) for name, module in modules.items())
    return size + rest * DTYPES[settings.rest_dtype].itemsize


# --- patterns -------------------------------------------------------------------------------------------------------


def matching(pattern: str, names: Iterable[str], prefix: str) -> list[str]:
    """Those of some names of modules that a pattern of fnmatch's matches, with or without the base model's prefix.

    Args:
        pattern: such as `encoder.layer.0.*`.
        names: full names.
        prefix: of the base model, such as `bert`.
    """
    return [
        name
        for name in names
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removeprefix(f"{prefix}."), pattern)
    ]


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The quantizable modules that are named most like a pattern."""
    names = list(names)
    near = near_name(pattern.replace("*", ""), names, similarity=0.3)
    return f"the nearest is {near!r}" if near else f"there are {', '.join(names[:4])}, …"
