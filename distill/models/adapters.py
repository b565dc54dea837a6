"""LoRA adapters (PEFT): made from a recipe's options, found in a model folder."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from pydantic import ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import TypedDict  # typing's own from Python 3.12 on

from distill.errors import InputError, in_one_line, nearest_name
from distill.models.replacements import is_quantized
from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS

_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoraOptions(TypedDict, total=False):
    """The `lora:` block of a step (Hu et al. 2021): rank, scale, and the layers that get an adapter."""

    r: Annotated[int, Field(ge=1)]
    alpha: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: str | list[str]
    modules_to_save: list[str]


LoraOptions.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


def lora_config(options: LoraOptions, kind: TaskKind) -> LoraConfig:
    """Make PEFT's config: unless options say otherwise rank 8, twice the rank as alpha, all linear layers but the head.

    The head of a classifier is trained and saved as a whole.

    Args:
        options: the `lora:` block of a step.
        kind: of the task, which says which layers are the head.
    """
    rank, targets = options.get("r", 8), options.get("target_modules", "all-linear")
    its = KINDS[kind]
    heads = None if its.heads is None else list(its.heads)
    return LoraConfig(
        r=rank,
        lora_alpha=options.get("alpha", 2 * rank),
        lora_dropout=options.get("dropout", 0.0),
        target_modules=targets,
        # PEFT trains DistilBERT's pre_classifier with its classifier, as the names end alike.
        exclude_modules=[*(heads or []), "pre_classifier"] if targets == "all-linear" else None,
        modules_to_save=options.get("modules_to_save", heads),
        task_type=None if its.peft_task is None else TaskType(its.peft_task),
    )


def with_adapters(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put new LoRA adapters into a model, drawn from torch's global generator.

    Args:
        model: may lie on meta.
        config: its `target_modules` are names, or one pattern (a regular expression for whole names; all-linear).

    Raises:
        InputError: a target, or a module to save, that is none of the model's modules or gets no adapter.
    """
    problems = _unmatched(model, config)
    if problems:
        raise InputError(*problems)
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # its own checks: no layer is left, or one of a kind that it has no adapter for
        raise InputError(f"lora: {in_one_line(error)}") from None


def _unmatched(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """What of a config's names and pattern matches no module, which PEFT would pass over, or tell otherwise."""
    modules = dict(model.named_modules())
    linear = {name: None for name, module in modules.items() if isinstance(module, nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in linear})

    def unknown(option: str, targets: Iterable[str]) -> list[str]:
        return [
            f"lora.{option}: no module {target!r}; {nearest_name(target, known)}"
            for target in targets
            if not any(name == target or name.endswith(f".{target}") for name in modules)
        ]

    targets = getattr(config, "target_modules", None)
    known_heads = {name for kind in KINDS.values() for name in kind.heads or ()}  # some of which any model lacks
    problems = unknown("modules_to_save", set(getattr(config, "modules_to_save", None) or []) - known_heads)
    if isinstance(targets, str) and targets.lower() != "all-linear":
        try:
            if not any(re.fullmatch(targets, name) for name in modules):
                problems.append(
                    f"lora.target_modules: the pattern {targets!r} matches no module; a text is a regular expression "
                    f"for whole names, such as {next(iter(linear), 'none')}; for the last part of a name say a list "
                    f"([{targets if targets in known else ', '.join(known[:2])}]), or all-linear"
                )
        except re.error as error:
            problems.append(f"lora.target_modules: {targets!r} is no regular expression ({error})")
    elif targets is not None and not isinstance(targets, str):
        problems += unknown("target_modules", sorted(targets))
        if not targets:
            problems.append("lora.target_modules: names no module; leave it out for all linear layers")
    return problems


def on_another_base(model: PeftModel, change: Callable[[PreTrainedModel], PreTrainedModel]) -> PeftModel:
    """Change the model beneath adapters, and put the same adapters on what comes out.

    Args:
        model: with its adapters, which are taken off.
        change: makes another model of the one beneath, with modules of the same names.

    Raises:
        InputError: adapters that can't be taken off, as prompts can't.
    """
    if has_prompts(model):
        raise InputError("model: its prompts are no adapters of layers; quantize the model beneath them")
    weights = {name: get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config}
    configs, active = dict(model.peft_config), model.active_adapter
    changed = change(model.unload())
    first, *others = configs
    adapted = get_peft_model(changed, configs[first], adapter_name=first)
    for name in others:
        adapted.add_adapter(name, configs[name])
    for name, tensors in weights.items():
        set_peft_model_state_dict(adapted, tensors, adapter_name=name)
    adapted.set_adapter(active)
    return adapted.train(model.training)


@contextmanager
def in_float32(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Keep norms, biases and heads in float32 while adapters are trained, as in QLoRA (Dettmers et al. 2023).

    AdamW's small steps would be lost in a head of bfloat16. Afterwards every parameter has its own dtype again, so that
    the model is what its folder will be loaded as.
    """
    before = {
        parameter: parameter.dtype
        for parameter in model.parameters()
        if parameter.dtype in (torch.bfloat16, torch.float16) and not isinstance(parameter, Params4bit | Int8Params)
    }
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


def with_stored_adapters(model: PreTrainedModel, folder: Path, *, merge: bool = False) -> PreTrainedModel:
    """Put the adapters of a folder, and the head that is stored beside them, into a model.

    Args:
        model: the one that the adapters belong to.
        folder: which holds them.
        merge: add them to its weights instead.

    Raises:
        InputError: prompts, or adapters of another model.
    """
    try:
        adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:  # a method that is not known, or other shapes
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: its adapters are not those of {model.name_or_path} ({reason})") from error
    if adapted.active_peft_config.is_prompt_learning:
        raise InputError(f"{folder}: holds prompts, which are no adapters of layers; they can't be read here")
    with safetensors.safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        stored = set(file.keys())
    unmatched = sorted(stored ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
    if unmatched:
        raise InputError(
            f"{folder}: its adapters are not those of {model.name_or_path} (without a match: {unmatched[0]})"
        )
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def stored_beside_adapters(folder: Path) -> dict[str, list[int]]:
    """List the names (in the model beneath) and shapes of the whole weights in an adapters' file: a head, as a rule."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return {}
    with safetensors.safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if ".lora_" not in name]  # noqa: SIM118 (no mapping)
        return {name.removeprefix("base_model.model."): file.get_slice(name).get_shape() for name in names}


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Add the adapters of a model to its weights, and return the plain model."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def has_adapters(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model is PEFT's, or has adapters in its own layers, as one loaded from an adapter's folder has."""
    return isinstance(model, PeftModel) or any(isinstance(layer, _ADAPTED) for layer in model.modules())


def merged_copy(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Copy a model, and add its active adapters to the copy's weights; the given one stays as it is.

    Raises:
        InputError: adapters that no weights can hold (prompts), or quantized weights, which would round them away.
    """
    if isinstance(model, PeftModel) and has_prompts(model):
        raise InputError("teacher: its prompts are no adapters of layers; take the model beneath them")
    if is_quantized(model.config):
        raise InputError("teacher: its adapters belong to quantized weights; take the float model that was quantized")
    copied = copy.deepcopy(model)
    if isinstance(copied, PeftModel):
        return copied.merge_and_unload()
    for name, layer in [named for named in copied.named_modules() if isinstance(named[1], _ADAPTED)]:
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            copied.set_submodule(name, layer.get_base_layer())
        else:  # trained as a whole
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            copied.set_submodule(name, plain)
    return copied


def has_prompts(model: PeftModel) -> bool:
    """Tell whether a model's adapters are prompts: tokens before those of a row."""
    return any(config.is_prompt_learning for config in model.peft_config.values())


def adapter_states(model: PreTrainedModel | PeftModel) -> list[str]:
    """Describe the adapters of each layer beyond their weights: which are active, and how they are scaled."""
    return [
        f"{name} {layer.active_adapters} {layer.disable_adapters} {getattr(layer, 'scaling', None)}"
        for name, layer in model.named_modules()
        if isinstance(layer, _ADAPTED)
    ]


def base_of(folder: Path | str) -> str | None:
    """Name the model that a folder's adapters belong to; None for a folder that holds no adapters, or a Hub id."""
    return _config_of(folder).get("base_model_name_or_path")


def task_of(folder: Path | str) -> str | None:
    """Name what the model of an adapters' folder predicts, in PEFT's words (`SEQ_CLS`); None where it is not said."""
    return _config_of(folder).get("task_type")


def _config_of(folder: Path | str) -> dict[str, Any]:
    file = Path(folder) / ADAPTER_CONFIG
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
