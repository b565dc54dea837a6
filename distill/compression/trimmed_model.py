"""A model with fewer tokens: its embeddings, output layers, and the ids in its configs."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from distill.errors import InputError
from distill.models.processors import POSITIONS_AFTER_PADDING
from distill.models.replacements import put_structure, structure_of

_LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens")


def trim_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model with the embeddings, output layers and ids of these tokens alone; the given one stays as it is.

    Args:
        model: may lie on meta.
        kept: ids in ascending order; each gets its place in this list as its new id.

    Raises:
        InputError: a weight whose shape follows neither the config nor its vocabulary.
    """
    config = trim_config(model.config, kept)
    with torch.device("meta") if model.device.type == "meta" else nullcontext():  # a plan asks for sizes
        trimmed = put_structure(type(model)(config), structure_of(config))
    try:
        weights = _with_rows(model.state_dict(), trimmed.state_dict(), kept, model.config.vocab_size)
        trimmed.load_state_dict(weights, assign=True)  # in their own types, which tables outside of them don't share
    except RuntimeError as error:
        raise InputError(f"model: its weights are not those of its config, so it cannot be trimmed ({error})") from None
    trimmed.tie_weights()
    if model.can_generate():
        trimmed.generation_config = _with_new_ids(model.generation_config, kept, model.config.vocab_size)
    return trimmed.to(model.device).train(model.training)


def trim_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A model's config for these tokens alone, the ids in it renumbered; the given one stays as it is.

    Args:
        kept: ids in ascending order; each gets its place in this list as its new id.
    """
    trimmed = _with_new_ids(config, kept, config.vocab_size)
    trimmed.vocab_size = len(kept)
    return trimmed


def ids_of_config(model: PreTrainedModel) -> set[int]:
    """The ids that a model's configs name; where positions count from the padding's id, all before it too."""
    named: set[int] = set()
    for config in (model.config, *([model.generation_config] if model.can_generate() else ())):
        for name, value in vars(config).items():
            if name.endswith("_token_id"):
                named |= {number for number in (value if isinstance(value, list) else [value]) if number is not None}
    if model.config.model_type in POSITIONS_AFTER_PADDING:
        named |= set(range(model.config.pad_token_id))
    return named


def _with_new_ids(
    config: PretrainedConfig | GenerationConfig, kept: Sequence[int], rows: int
) -> PretrainedConfig | GenerationConfig:
    """A config whose tokens have their new ids; those that are gone are named no longer.

    Args:
        rows: of the embeddings before; other numbers, such as −1, are no ids and stay.
    """
    new = {old: number for number, old in enumerate(kept)}

    def renumbered(value: int) -> int | None:
        return new.get(value) if 0 <= value < rows else value

    changed = copy.deepcopy(config)
    for name, value in vars(config).items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(changed, name, renumbered(value))
        elif (name.endswith("_token_id") or name in _LISTS_OF_IDS) and isinstance(value, list):
            setattr(changed, name, [number for each in value if (number := renumbered(each)) is not None])
    return changed


def _with_rows(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], kept: Sequence[int], rows: int
) -> dict[str, Tensor]:
    """Weights in which what has an entry a token has those of the kept ones: where the trimmed model's is shorter.

    Args:
        wanted: the weights of a model with the trimmed config.
        rows: of the embeddings before.
    """
    chosen = torch.tensor(kept)
    trimmed = {}
    for name, weight in weights.items():
        shape = wanted[name].shape if name in wanted else weight.shape
        for axis, (before, after) in enumerate(zip(weight.shape, shape, strict=False)):
            if (before, after) == (rows, len(kept)):
                weight = weight.index_select(axis, chosen.to(weight.device))
        trimmed[name] = weight.clone()
    return trimmed
