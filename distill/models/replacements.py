"""Modules of other sizes than a model's config says, and modules that are left out.

They stand on the floor of `models`, since whatever makes a model of a config must make them too; how quantized
modules are built is `compression/replacements.py`'s. A replacement is a frozen dataclass whose fields are what
config.json says of it and whose `put` builds the module; on meta it is empty, to be filled from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distill.common.private_names import draw_weights
from distill.errors import InputError
from distill.models.description import Entry, describe, entries_of, grouped
from distill.models.modules import SharedLayer, empty_factors, factors_of, store_bytes

if TYPE_CHECKING:  # the quantizer is registered while they are being imported
    from transformers import PretrainedConfig, PreTrainedModel


class Replacement(Protocol):
    """The way in which a module is built that stands in place of the one that the config describes."""

    kind: ClassVar[str]

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put the module into a model, on the device that torch makes tensors on just now.

        Args:
            model: is changed.
            name: of the module that it takes the place of.
        """


@dataclass(frozen=True)
class Resized:
    """A linear layer (or `Conv1D`) with other numbers of features, as pruned heads and neurons leave it.

    An attention counts its heads by the width of its query, whose head size stays.
    """

    kind: ClassVar[str] = "resized"

    in_features: int
    out_features: int

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put a linear layer of these sizes into a model, with a bias if there was one.

        Args:
            model: is changed.
            name: of the layer that it takes the place of.
        """
        before: Any = model.get_submodule(name)
        module: nn.Module
        if isinstance(before, Conv1D):
            module = Conv1D(self.out_features, self.in_features)
        else:
            module = nn.Linear(self.in_features, self.out_features, bias=before.bias is not None)
        model.set_submodule(name, module.to(before.weight.dtype))
        count_heads(model.get_submodule(name.rpartition(".")[0]))


@dataclass(frozen=True)
class Removed:
    """A module whose output adds nothing to the residual, or its last bias alone.

    Args:
        attention: whether it is an attention, which gives its weights beside its output.
        bias: the one that stays, by its name inside of the module (`bias`, `out_lin.bias`).
    """

    kind: ClassVar[str] = "removed"

    attention: bool = False
    bias: str | None = None

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put a module that computes nothing into a model.

        Args:
            model: is changed.
            name: of the module that it takes the place of.
        """
        model.set_submodule(name, RemovedModule(model.get_submodule(name), self.attention, self.bias))


@dataclass(frozen=True)
class Factorized:
    """A linear layer (or `Conv1D`) or embedding whose weight is a product of two.

    Args:
        rank: how many columns the first factor has, and rows the second.
    """

    kind: ClassVar[str] = "factorized"

    rank: int

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Put two empty factors into a model, beside the bias if there was one.

        Args:
            model: is changed.
            name: of the layer or embedding that they take the place of.
        """
        before: Any = model.get_submodule(name)
        model.set_submodule(name, empty_factors(before, self.rank).to(before.weight.dtype))


@dataclass(frozen=True)
class Shared:
    """A block, or a layer, that computes with the weights of another one.

    Args:
        of: full name of the other one, as in the class that the model was saved as.
    """

    kind: ClassVar[str] = "shared"

    of: str

    def put(self, model: PreTrainedModel, name: str) -> None:
        """Let every layer with weights that the other one has too compute with those.

        Args:
            model: is changed.
            name: of the block or layer.
        """
        source = resolve_name(self.of, model)
        assert source is not None  # the same family
        module = model.get_submodule(name)
        holders = [inside for inside, each in module.named_modules() if any(True for _ in each.parameters(False))]
        layers = [each for each in holders if not any(each.startswith(f"{other}.") for other in holders)]
        for inside in layers:
            path, _, last = f"{source}.{inside}".rstrip(".").rpartition(".")
            parent = model.get_submodule(path)
            if last in parent._modules and any(True for _ in parent.get_submodule(last).parameters()):
                target = f"{name}.{inside}".rstrip(".")
                model.set_submodule(target, SharedLayer(parent, last, model.get_submodule(target)))


Structural: TypeAlias = Resized | Removed | Factorized | Shared

STRUCTURAL: dict[str, type[Structural]] = {each.kind: each for each in (Resized, Removed, Factorized, Shared)}
"""Kinds whose weights are floats: models that hold no others train, cast and take adapters as plain ones do."""


class RemovedModule(nn.Module):
    """In place of a module that is left out.

    Under the name of every weight it stores one byte without dimensions, a shape that plain transformers refuses to
    load; where a name is merely missing, it draws random weights.

    Args:
        before: the module that is left out; its weights may lie on meta.
        attention: as of `Removed`, `bias` too.
    """

    def __init__(self, before: nn.Module, attention: bool, bias: str | None):
        super().__init__()
        self.attention = attention
        self.bias_name = bias
        self.layer_idx = getattr(before, "layer_idx", None)
        self.out_features = before.nf if isinstance(before, Conv1D) else getattr(before, "out_features", None)
        state = before.state_dict()
        store_bytes(self, [name for name in state if name != bias])
        if bias is not None:
            path, _, last = bias.rpartition(".")
            zeros = torch.zeros(state[bias].shape, dtype=state[bias].dtype)
            self.get_submodule(path).register_parameter(last, nn.Parameter(zeros))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """…×in to …×out, zeros or the bias; beside them None where weights of an attention are expected."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # as transformers 5.21 calls it
        if cache is not None:  # a decoder asks any of its layers how many tokens there were
            one = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(one, one, self.layer_idx)
        width = self.out_features or hidden_states.shape[-1]
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], width)
        if self.bias_name is not None:
            output = output + self.get_parameter(self.bias_name)
        return (output, None) if self.attention else output


def restructure(
    model: PreTrainedModel, replacements: Mapping[str, Structural], weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Put modules of other sizes or factors into a model in place, with their weights, and note in its config how.

    The model stays an ordinary float model; saved, it loads after `import distill`.

    Args:
        replacements: by the full name of the module that each takes the place of.
        weights: by full name, those of the new modules; one that is left out stays as it is, where its shape does.

    Raises:
        InputError: a module that isn't there or of another kind, a weight that is missing or of another shape, sizes
            below 1, or a quantized model.
    """
    problems = [
        problem for name, each in replacements.items() if (problem := _problem(model, name, each, weights)) is not None
    ]
    problems += [
        f"{name}: belongs to no module that is replaced"
        for name in weights
        if not any(name.startswith(f"{replaced}.") for replaced in replacements)
    ]
    if is_quantized(model.config):
        problems = ["model: is quantized, and its layers can't be cut; take the model that was quantized"]
    if problems:
        raise InputError(*problems)
    for name, replacement in replacements.items():
        old, training = dict(model.get_submodule(name).named_parameters()), model.get_submodule(name).training
        with torch.device("meta"):
            replacement.put(model, name)
        _fill(model.get_submodule(name).train(training), old, name, weights)
    _note(model.config, replacements)
    return model


def is_quantized(config: PretrainedConfig) -> bool:
    """Whether a config describes quantized weights, by this package or by another."""
    description = getattr(config, "quantization_config", None)
    if description is None:
        return False
    entries = entries_of(config)
    return not entries or any(entry.kind not in STRUCTURAL for entry in entries)


def structure_of(config: PretrainedConfig) -> list[Entry]:
    """Read from a config the modules of other sizes, and those left out."""
    return [entry for entry in entries_of(config) if entry.kind in STRUCTURAL]


def without_replacements(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a config so that it describes a model of plain modules, none of them quantized."""
    plain = config.to_dict()
    plain.pop("quantization_config", None)
    return type(config).from_dict(plain)


def put_structure(model: PreTrainedModel, structure: list[Entry]) -> PreTrainedModel:
    """Put the modules that another config describes into a new model, drawn as its family draws them, and note them.

    Args:
        model: is changed, and its config.
        structure: as `structure_of` reads it.
    """
    if not structure:
        return model
    for entry in structure:
        replacement = STRUCTURAL[entry.kind](**entry.fields)
        for name in entry.names:
            found = resolve_name(name, model)
            if found is not None:
                replacement.put(model, found)
                draw_weights(model, model.get_submodule(found))
    model.config.quantization_config = describe(structure)
    return model


def resolve_name(name: str, model: PreTrainedModel) -> str | None:
    """Find the name of a module in a model of the same family with another head; None where it lacks the module.

    Args:
        name: in the one model.
        model: the other, with a head or none.
    """
    prefix = model.base_model_prefix
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _problem(model: PreTrainedModel, name: str, replacement: Structural, weights: Mapping[str, Tensor]) -> str | None:
    """What keeps a replacement from being put into a model."""
    try:
        before = model.get_submodule(name)
    except AttributeError:
        return f"{name}: {type(model).__name__} has no such module"
    if isinstance(replacement, Resized):
        if type(before) is not nn.Linear and not isinstance(before, Conv1D):
            return f"{name}: is a {type(before).__name__}, and only linear layers can be resized"
        if min(replacement.in_features, replacement.out_features) < 1:
            return f"{name}: {replacement.in_features} → {replacement.out_features} leaves nothing; say Removed"
        shape = replacement.out_features, replacement.in_features
        given = weights.get(f"{name}.weight", before.weight).shape
        given = given[::-1] if isinstance(before, Conv1D) else given
        if tuple(given) != shape:
            return f"{name}.weight: is {tuple(given)}, and {shape} in the new layer"
        bias = weights.get(f"{name}.bias", before.bias)
        if bias is not None and tuple(bias.shape) != shape[:1]:
            return f"{name}.bias: is {tuple(bias.shape)}, and {shape[:1]} in the new layer"
        return None
    if isinstance(replacement, Factorized):
        return _problem_of_factors(model, name, replacement.rank, weights)
    if isinstance(replacement, Shared):
        missing = resolve_name(replacement.of, model) is None
        return f"{name}: {type(model).__name__} has no {replacement.of}, which it would share" if missing else None
    if any("Norm" in type(module).__name__ for module in before.modules()):
        return f"{name}: holds a norm, so more than what is added to the residual would be lost; name what is before it"
    if replacement.bias is not None and replacement.bias not in before.state_dict():
        return f"{name}: has no bias {replacement.bias!r}"
    return None


def _problem_of_factors(model: PreTrainedModel, name: str, rank: int, weights: Mapping[str, Tensor]) -> str | None:
    """What keeps two factors from taking the place of a module."""
    before: Any = model.get_submodule(name)
    if type(before) not in (nn.Linear, nn.Embedding, Conv1D):
        return f"{name}: is a {type(before).__name__}, and only linear layers and embeddings can be factorized"
    if not 1 <= rank <= min(before.weight.shape):
        return f"{name}: a rank of {rank}; its weight has one of up to {min(before.weight.shape)}"
    output = model.get_output_embeddings()
    if output is not before and getattr(output, "weight", None) is before.weight:
        return f"{name}: the output layer computes with its weight, which two factors don't have"
    for key, empty in factors_of(before, rank).items():
        given = weights.get(f"{name}.{key}")
        if given is None or given.shape != empty.shape:
            is_now = "missing" if given is None else f"{tuple(given.shape)}"
            return f"{name}.{key}: is {is_now}, and {tuple(empty.shape)} in the new module"
    return None


def _fill(module: nn.Module, old: Mapping[str, Tensor], name: str, weights: Mapping[str, Tensor]) -> None:
    """Give an empty module its weights, on the device and in the dtype of the old ones, and as trainable."""
    like = next(iter(old.values()))
    state = {}
    for key, empty in module.state_dict().items():
        if not empty.is_floating_point():  # of what is left out
            state[key] = torch.zeros_like(empty, device=like.device)
        else:
            given = weights[f"{name}.{key}"] if f"{name}.{key}" in weights else old[key]
            state[key] = given.detach().to(like.device, like.dtype, copy=True)
    module.load_state_dict(state, assign=True)
    module.requires_grad_(like.requires_grad)


def _note(config: PretrainedConfig, replacements: Mapping[str, Structural]) -> None:
    """Add replacements to what a config says; the same kind of an earlier one under the same name goes."""
    kept = []
    for entry in structure_of(config):
        names = tuple(name for name in entry.names if name not in replacements or replacements[name].kind != entry.kind)
        kept += [Entry(entry.kind, entry.fields, names)] if names else []
    config.quantization_config = describe([*kept, *grouped(replacements)])


def count_heads(attention: nn.Module) -> None:
    """Set what an attention says of its number of heads, after one of its layers has another width.

    Most families reshape by the size of a head alone; DeBERTa's by their number, GPT-2's cut three parts of one width,
    and grouped queries need to know how many share a key.
    """
    size: Any = getattr(attention, "attention_head_size", None) or getattr(attention, "head_dim", None)
    layers: dict[str, Any] = dict(attention.named_children())
    query = next((layers[name] for name in ("query", "query_proj", "q_proj", "q_lin") if name in layers), None)
    fused = layers.get("c_attn")
    if size is None or (query is None and fused is None):
        return
    width = fused.nf // 3 if fused is not None else query.out_features  # type: ignore[union-attr]
    counted = {"num_attention_heads": width // size, "num_heads": width // size, "n_heads": width // size}
    counted |= {"all_head_size": width, "split_size": width}
    if "k_proj" in layers:
        counted["num_key_value_groups"] = width // layers["k_proj"].out_features
    for name, number in counted.items():
        if name in vars(attention):
            setattr(attention, name, number)
