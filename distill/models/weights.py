"""The weight files of a model folder, and whether their weights are those of its config."""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed

from distill.common.private_names import set_sharding_config, sharding_config
from distill.errors import InputError
from distill.models.adapters import stored_beside_adapters
from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS

logger = logging.getLogger(__name__)

# What DataParallel, torch.compile, FSDP and activation checkpointing put into names, wherever it stands.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What sentence-transformers (0.auto_model.), PEFT and training frameworks put before them.
_ROOT = re.compile(r"^(?:\d+|auto_model|base_model|model)\.")
_MOST_ROOTS = 4
# Buffers that old checkpoints lack, or hold and newer models compute.
_COMPUTED = re.compile(
    r"(?:position_ids|token_type_ids|relative_position_index|num_batches_tracked|inv_freq|masked_bias)$"
    r"|\.(?:attn|attention)\.bias$"
)
_SHOWN = 3


@dataclass(frozen=True)
class Fit:
    """The comparison of stored weights with a model: where all is empty, every weight is stored in its shape."""

    lacking: tuple[str, ...] = ()
    """Weights of the model that are not stored, heads and poolers aside."""
    reshaped: tuple[tuple[str, Sequence[int], Sequence[int]], ...] = ()
    """Weights with another shape: name, stored shape, the model's shape; heads aside."""
    without_place: tuple[str, ...] = ()
    """Stored weights of blocks that the model does not have."""
    unread: tuple[str, ...] = ()
    """All stored weights that the model has no place for, such as another head's."""
    new_head: tuple[str, ...] = ()
    """Weights of the head that are not stored."""
    new_pooler: tuple[str, ...] = ()
    """Weights of a pooler that are not stored."""
    reshaped_head: tuple[tuple[str, Sequence[int], Sequence[int]], ...] = ()
    """Weights of the head that are stored in another shape."""

    @property
    def problem(self) -> str | None:
        """What keeps the weights from being those of the model, its head aside; None where nothing does."""
        parts = []
        if self.reshaped:
            shapes = [
                f"{name} is {_shape(stored)}, and {_shape(wanted)} in it" for name, stored, wanted in self.reshaped
            ]
            parts.append(_listed(shapes, "; "))
        if self.lacking:
            instead = f"; {self.unread[0]} is of another model or wrapper" if self.unread else ""
            parts.append(f"lacking: {_listed(self.lacking)}{instead}")
        if self.without_place:
            parts.append(f"stored without a place in it: {_listed(self.without_place)}")
        if not parts:
            return None
        return (
            f"its weights are not those of its config.json ({'; '.join(parts)}); take the config that belongs to them"
        )

    @property
    def untrained(self) -> tuple[str, ...]:
        """The weights of head and pooler that would be new."""
        return (*self.new_head, *self.new_pooler, *(name for name, _, _ in self.reshaped_head))

    @property
    def notes(self) -> list[str]:
        """Notes on a head or pooler that would be new, beside one that is not stored at all."""
        notes = []
        if self.reshaped_head:
            shapes = [f"{name} {_shape(stored)} → {_shape(wanted)}" for name, stored, wanted in self.reshaped_head]
            notes.append(f"its head has another shape and is drawn anew ({_listed(shapes)})")
        if self.new_pooler:
            notes.append(f"its pooler is not stored and is drawn anew ({_listed(self.new_pooler)})")
        return notes


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a model folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [path for path in [folder / "model.safetensors"] if path.is_file()]


def stored_shapes(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Read every stored weight as a tensor on meta, from the files' headers alone.

    Raises:
        InputError: a file that is cut off or no safetensors.
    """
    found = {}
    for path in files:
        with reading(str(path.parent)), safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                view = file.get_slice(name)
                dtype = torch.float32 if view.get_dtype().startswith(("F", "BF")) else torch.uint8
                found[name] = torch.empty(view.get_shape(), dtype=dtype, device="meta")
    return found


def plain_names(
    stored: Mapping[str, torch.Tensor], model_class: type[PreTrainedModel], config: PretrainedConfig
) -> dict[str, str]:
    """Find the name in the model of each stored weight: its own, or the one without a known prefix of a wrapper.

    Args:
        stored: tensors on meta.
        model_class: of the model.
        config: of the model.
    """
    unchanged = {name: name for name in stored}
    candidates = [unchanged]
    renamed = {name: _WRAPPERS.sub("", name) for name in stored}
    for _ in range(_MOST_ROOTS + 1):
        if len(set(renamed.values())) == len(renamed) and renamed not in candidates:
            candidates.append(renamed)
        renamed = {name: _ROOT.sub("", new) for name, new in renamed.items()}

    def lacking(names: Mapping[str, str]) -> int:
        fit = fit_of(stored, model_class, config, names)
        return len(fit.lacking) + len(fit.untrained)

    return min(candidates, key=lacking)  # of equals the first


def fit_of(
    stored: Mapping[str, torch.Tensor],
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    names: Mapping[str, str],
) -> Fit:
    """Compare stored weights with a model by loading them on meta: transformers' own renaming applies.

    Args:
        stored: tensors on meta, by stored name.
        model_class: of the model.
        config: of the model.
        names: the name in the model by each stored one.
    """
    with quiet_loading(), unsharded():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict={names[name]: tensor for name, tensor in stored.items()},
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return _judged(info, model)


def load_weights(
    location: str, model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, Fit]:
    """Load a model with its stored weights, and compare these with it; what is not stored is drawn anew.

    A known prefix of their names is left out, and that is said.

    Args:
        location: a folder, or a Hub id.
        model_class: of the model.
        config: of the model.
        dtype: of the weights; `auto` is the stored one.

    Raises:
        InputError: files that are not there or broken.
    """
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    files = weight_files(Path(location))
    names: dict[str, str] = {}
    if files and readable_on_meta(config):
        names = plain_names(stored_shapes(files), model_class, config)
        note = prefix_note(names)
        if note is not None:
            logger.warning("%s: %s", location, note)
    with reading(location), quiet_loading():
        if all(name == new for name, new in names.items()):
            model, info = model_class.from_pretrained(location, trust_remote_code=False, **options)
        else:
            read = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
            state = {names[name]: tensor for name, tensor in read.items()}
            model, info = model_class.from_pretrained(None, state_dict=state, **options)
            model.name_or_path = location
    return model, _judged(info, model)


def fit_problems(fit: Fit, kind: TaskKind, *, new_head: bool) -> list[str]:
    """List what is wrong with stored weights.

    Args:
        fit: of the weights and the model.
        kind: of the task that the model is for.
        new_head: whether the head may be new; where it may not, a pooler that nothing reads still may.
    """
    if fit.problem is not None:
        return [fit.problem]
    untrained = fit.untrained if KINDS[kind].targets.per_row else fit.new_head
    if new_head or (not untrained and not fit.reshaped_head):
        return []
    if fit.reshaped_head:
        return [replace(fit, reshaped=fit.reshaped_head).problem or ""]
    return [no_head_message(sorted(untrained))]


def with_head_of_adapters(fit: Fit, folder: Path) -> Fit:
    """Leave out of a base's fit the weights that are stored beside its adapters.

    Args:
        fit: of the base.
        folder: which holds the adapters.
    """
    beside_adapters = stored_beside_adapters(folder)
    return replace(
        fit,
        new_head=tuple(name for name in fit.new_head if name not in beside_adapters),
        new_pooler=tuple(name for name in fit.new_pooler if name not in beside_adapters),
        reshaped_head=tuple(each for each in fit.reshaped_head if each[0] not in beside_adapters),
    )


def no_head_message(missing: list[str]) -> str:
    """Write the message on a model without a trained head."""
    return f"has no trained head for this task ({', '.join(missing[:3])} missing); fine-tune it first (run: finetune)"


def prefix_note(names: Mapping[str, str]) -> str | None:
    """Write the note on weights that are read under other names than their own; None where none is."""
    name = next((name for name, new in names.items() if new != name), None)
    return None if name is None else f"its weights' names are read without a wrapper's prefix ({name} as {names[name]})"


def readable_on_meta(config: PretrainedConfig) -> bool:
    """Tell whether a model's weights can be looked at without loading them: not if another package quantized them."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return True
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(method).startswith("distill")


def refuse_not_finite(model: nn.Module, where: str) -> None:
    """Raise an error for a model with weights that are NaN or infinite.

    Args:
        model: any module.
        where: the model, for the message.

    Raises:
        InputError: with the names of such weights.
    """
    broken = [
        name
        for name, weight in model.state_dict().items()
        if torch.is_tensor(weight) and weight.is_floating_point() and not weight.isfinite().all()
    ]
    if broken:
        raise InputError(f"{where}: holds weights that are NaN or infinite ({_listed(broken)}); make or save it anew")


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Build models on meta, to look at names and shapes."""
    with unsharded(), torch.device("meta"):
        yield


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Turn off ZeRO-3, which would shard weights that are not there."""
    sharding = sharding_config()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_sharding_config(sharding)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' loading report: what it would say of missing weights is checked here."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def reading(location: str) -> Iterator[None]:
    """Turn errors in reading weights into an `InputError`."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # none there, other shapes, or broken files
        raise InputError(f"{location}: its weights cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def _judged(info: Mapping[str, Any], model: PreTrainedModel) -> Fit:
    """What transformers' loading information says of a model."""
    other = sorted(info["mismatched_keys"])
    missing = sorted(set(info["missing_keys"]) - {name for name, _, _ in other})
    missing = [name for name in missing if not _COMPUTED.search(name)]
    pooler = [name for name in missing if ".pooler." in name]
    head = [name for name in missing if _in_head(name, model) and name not in pooler]
    return Fit(
        lacking=tuple(name for name in missing if name not in head and name not in pooler),
        reshaped=tuple(each for each in other if not _in_head(each[0], model)),
        without_place=tuple(_without_place(sorted(info["unexpected_keys"]), model)),
        unread=tuple(sorted(info["unexpected_keys"])),
        new_head=tuple(head),
        new_pooler=tuple(pooler),
        reshaped_head=tuple(each for each in other if _in_head(each[0], model)),
    )


def _in_head(name: str, model: PreTrainedModel) -> bool:
    return model.base_model is not model and not name.startswith(f"{model.base_model_prefix}.")


def _without_place(unexpected: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Those of the stored names that stand inside the model's lists of blocks: layers that the config leaves out."""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    prefix = f"{model.base_model_prefix}."
    numbered = re.compile(rf"(?:{'|'.join(map(re.escape, lists))})\d+\.") if lists else None
    return [
        name
        for name in unexpected
        if numbered and not _COMPUTED.search(name) and (numbered.match(name) or numbered.match(prefix + name))
    ]


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _listed(parts: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return separator.join(parts[:_SHOWN]) + more
