"""Let blocks of a model share their weights, as ALBERT's do: a few distinct ones, each computed several times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.compression.pruning.layouts import LAYOUTS
from distill.compression.pruning.structure import POSITIONS
from distill.compression.quantization.mixed import calibration_logits, divergence
from distill.errors import InputError
from distill.models.adapters import has_adapters, merged_copy
from distill.models.modes import evaluating
from distill.models.modules import FactorizedLinear, SharedLayer
from distill.models.replacements import Shared, is_quantized, restructure
from distill.models.structure import find_blocks
from distill.models.weights import refuse_not_finite
from distill.tasks.kinds import targets_of

What = Literal["all", "attention", "feed_forward"]
Start = Literal["mean", "first", "middle", "last"]
_STARTS: tuple[Start, ...] = ("mean", "first", "middle", "last")


@dataclass(kw_only=True)
class SharingSettings:
    """How many distinct blocks a model keeps, and what of them is shared. Embeddings and the head stay as they are."""

    groups: Annotated[int, Field(ge=1)] = field(
        metadata={"help": "Distinct blocks that are left; neighbours share, so 2 groups of 6 blocks are 3 and 3."}
    )
    what: What = field(
        default="all",
        metadata={"help": "Whole blocks, norms included, or the linear layers of attention or feed_forward alone."},
    )
    start: Start | Literal["best"] = field(
        default="best",
        metadata={
            "help": "The weights that a group starts with: the mean of its blocks, or one of them (first, middle, "
            "last); best measures all four on calibration rows."
        },
    )

    @property
    def reads_rows(self) -> bool:
        """Whether the model depends on calibration rows."""
        return self.start == "best"


def share_layers(
    model: PreTrainedModel | PeftModel,
    batches: Sequence[Mapping[str, Tensor]] = (),
    *,
    groups: int,
    what: What = "all",
    start: Start | Literal["best"] = "best",
) -> PreTrainedModel:
    """Let neighbouring blocks of a model share their weights, in place, and return it, ready for `save_pretrained`.

    What is shared is stored once. The folder loads after `import distill`; it trains, quantizes and takes adapters as
    any other, and computes as much as before (Lan et al. 2020, section 3.1).

    Args:
        model: a float model; of one with adapters a copy in which they are merged is changed.
        batches: calibration rows: the model's inputs, without labels; only `best` needs them.
        groups: how many distinct blocks are left.
        what: whole blocks with their norms, or the linear layers of `attention` or `feed_forward`.
        start: the weights of a group: the `mean` of its blocks', or those of its `first`, `middle` or `last` one; of
            these the `best`, whose predictions diverge least from the model's.

    Raises:
        InputError: a model whose blocks can't share, or as many groups as there are blocks.
    """
    settings = SharingSettings(groups=groups, what=what, start=start)
    if has_adapters(model):
        model = merged_copy(model)
    shared, _ = share_with(model, batches, settings)
    return shared


def share_with(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], settings: SharingSettings
) -> tuple[PreTrainedModel, dict[Start, float]]:
    """Share layers of a model in place, and tell the divergence of each start that was measured, the best first.

    Args:
        model: a float model without adapters.
        batches: as for `share_layers`.
        settings: what is chosen.

    Raises:
        InputError: as `share_layers`.
    """
    shared = shared_modules(model, settings)
    refuse_not_finite(model, "model")
    if settings.reads_rows and not batches:
        raise InputError("batches: there are none; give calibration rows, or say a start, such as mean")
    found: dict[Start, float] = {}
    if settings.start == "best":
        found = _divergences(model, shared, batches)
        start = next(iter(found))
    else:
        start = settings.start
    for source, others in shared.items():
        model.get_submodule(source).load_state_dict(_started(model, [source, *others], start))
    return put_shared(model, shared), found


def put_shared(model: PreTrainedModel, shared: Mapping[str, Sequence[str]]) -> PreTrainedModel:
    """Let modules of a model compute with the weights of others, in place, and note it in the config.

    Args:
        model: may lie on meta.
        shared: for each module that keeps its weights, those that take them, as `shared_modules` gives them.
    """
    return restructure(model, {name: Shared(source) for source, others in shared.items() for name in others}, {})


def shared_modules(model: PreTrainedModel, settings: SharingSettings) -> dict[str, list[str]]:
    """For each module that keeps its weights, the names of those that will take them.

    Args:
        model: a float model, possibly on meta.
        settings: of which `groups` and `what` count.

    Raises:
        InputError: a quantized model, one whose blocks differ or share already, or too many groups.
    """
    if is_quantized(model.config):
        raise InputError("model: it is quantized, and its weights can't be shared; take the model that was quantized")
    prefix, blocks = find_blocks(model)
    if any(isinstance(module, SharedLayer | FactorizedLinear) for module in blocks.modules()):
        raise InputError(
            "model: its layers are factorized or shared already; share those of the model before that, and factorize "
            "afterwards"
        )
    if not 1 <= settings.groups < len(blocks):
        raise InputError(
            f"groups: {settings.groups}; the model has {len(blocks)} blocks, so say 1 to {len(blocks) - 1}"
        )
    layout = LAYOUTS.get(model.config.model_type)
    if settings.what != "all" and layout is None:
        raise InputError(
            f"what: where attention stands in a block of {model.config.model_type} is not known; say all, which every "
            "family can"
        )
    parts = [""]
    if layout is not None and settings.what != "all":
        parts = [*layout.attention, *POSITIONS, layout.attention_output]
        if settings.what == "feed_forward":
            parts = [*layout.feed_forward, layout.feed_forward_output]
        there = {name for name, _ in blocks[0].named_modules()}
        parts = [each for each in parts if each in there]
    members: dict[int, list[int]] = {}
    for number in range(len(blocks)):
        members.setdefault(number * settings.groups // len(blocks), []).append(number)
    shared = {
        f"{prefix}.{first}.{part}".rstrip("."): [f"{prefix}.{number}.{part}".rstrip(".") for number in others]
        for first, *others in members.values()
        for part in parts
        if others
    }
    problems = [
        f"model: {other} has layers of other sizes than {source}, so they can't share"
        for source, others in shared.items()
        for other in others
        if _differ(model.get_submodule(source), model.get_submodule(other))
    ]
    if problems:
        raise InputError(*problems)
    return shared


def _differ(first: nn.Module, second: nn.Module) -> bool:
    """Whether a weight that both have has another shape in each."""
    shapes = {name: each.shape for name, each in first.state_dict().items()}
    return any(shapes.get(name, each.shape) != each.shape for name, each in second.state_dict().items())


def _started(model: PreTrainedModel, names: Sequence[str], start: Start) -> dict[str, Tensor]:
    """The weights that modules of these names shall share.

    Where one of them lacks a weight (ModernBERT's first block has no norm before its attention), those that have it
    count.
    """
    states: list[dict[str, Tensor]] = [model.get_submodule(name).state_dict() for name in names]
    place = {"first": 0, "middle": len(states) // 2, "last": len(states) - 1}.get(start)
    started = {}
    for key, own in states[0].items():
        if not own.is_floating_point():
            started[key] = own
        elif place is None:
            started[key] = torch.stack([state[key].double() for state in states if key in state]).mean(0).to(own)
        else:
            started[key] = states[place].get(key, own).clone()
    return started


def _divergences(
    model: PreTrainedModel, shared: Mapping[str, Sequence[str]], batches: Sequence[Mapping[str, Tensor]]
) -> dict[Start, float]:
    """How far each start takes the model's predictions, the least first; the model is as before afterwards."""
    before: dict[str, Any] = {
        name: {key: each.clone() for key, each in model.get_submodule(name).state_dict().items()}
        for source, others in shared.items()
        for name in (source, *others)
    }
    targets = targets_of(model)
    found: dict[Start, float] = {}
    with evaluating(model):
        reference = calibration_logits(model, batches)
        for start in _STARTS:
            for source, others in shared.items():
                state = _started(model, [source, *others], start)
                for name in (source, *others):
                    model.get_submodule(name).load_state_dict(state, strict=False)
            found[start] = divergence(targets, reference, calibration_logits(model, batches))
            for name, state in before.items():
                model.get_submodule(name).load_state_dict(state)
    return dict(sorted(found.items(), key=lambda each: each[1]))
