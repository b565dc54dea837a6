"""The verb `prune`: remove attention heads and feed-forward neurons from a model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from distill.common.console import log, remark
from distill.common.distributed import on_main_process
from distill.common.records import StepRecord
from distill.compression.pruning.prune import Measured, decide_sizes, is_close, prune_to_sizes
from distill.compression.pruning.settings import STEP, PruningSettings, planned_sizes
from distill.compression.pruning.structure import (
    BlockSizes,
    block_sizes,
    cut_to_sizes,
    prunable_sublayers,
    record_sizes,
)
from distill.data.load import Data
from distill.errors import InputError
from distill.models.labels import set_labels
from distill.models.load import from_config
from distill.models.replacements import is_quantized
from distill.models.weights import on_meta
from distill.verbs.base import Estimate, Memory, ModelInput, StepPlan, StepResult, Verb
from distill.verbs.calibration import loaded_with_rows, rows_measured_on

_SETTINGS = {field.name for field in fields(PruningSettings)}
_ROWS = 512
_SEQUENCE_LENGTH = 128
_OF_THE_CLOCK = ("batch_size", "sequence_length", "dtype")


@dataclass(kw_only=True)
class PruneOptions(PruningSettings):
    """Remove attention heads and feed-forward neurons; a step that trains afterwards wins back what that costs."""

    model: str = field(metadata={"help": "What to prune: a Hub id, a folder, package:…, or an earlier step."})
    calibration_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={"help": f"Training rows that importance and reconstruction are measured on; by default {_ROWS}."},
    )
    batch_size: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "Rows of the calls that speedup is measured with; by default 32."}
    )
    sequence_length: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={"help": f"Tokens of these rows; by default {_SEQUENCE_LENGTH}, or data.max_length if that is less."},
    )
    dtype: Literal["fp32", "bf16"] | None = field(
        default=None, metadata={"help": "What speedup is measured in; by default fp32."}
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.calibration_rows is not None and not self.reads_rows:
            problems.append("calibration_rows: has no effect with importance: magnitude and reconstruct: false")
        if self.speedup is None:
            given = [name for name in _OF_THE_CLOCK if getattr(self, name) is not None]
            problems += [f"{name}: has no effect without speedup, which it measures; leave it out" for name in given]
        if problems:
            raise InputError(*problems)

    @property
    def settings(self) -> PruningSettings:
        """Those of the options that the function of a model takes."""
        return PruningSettings(**{name: getattr(self, name) for name in _SETTINGS})


@dataclass(frozen=True, kw_only=True)
class PrunePlan(StepPlan):
    """The plan of a pruning."""

    sizes: BlockSizes | None
    """What is left in each block; None where importance or the clock decides in the step."""
    num_parameters: int
    """Of the model that is left, at most."""
    num_parameters_before: int


def _plan(options: PruneOptions, inputs: dict[str, ModelInput], data: Data | None) -> PrunePlan:
    """The sizes of blocks where the options alone say them, from a skeleton of the model.

    Raises:
        InputError: a model that can't be cut, or sizes that its blocks can't have.
    """
    config = copy.deepcopy(inputs["model"].config)
    sizes, before, left = None, 0, 0
    if data is not None and not is_quantized(config):  # which is refused, as for other verbs
        set_labels(config, data.task)
        with on_meta():
            skeleton = from_config(config, data.task.kind)
        before = _count(skeleton)
        sublayers = prunable_sublayers(skeleton, options.kinds)
        sizes = planned_sizes(sublayers, options.settings)
        cut_to_sizes(skeleton, sizes or _likely_sizes(skeleton, options))
        record_sizes(skeleton)
        config, left = skeleton.config, before if sizes is None else _count(skeleton)
    return PrunePlan(
        inputs=inputs,
        config=config,
        layers=None,
        layer_pairs={},
        weight_bytes=None,
        is_adapter=False,
        is_bound=sizes is None,
        sizes=sizes,
        num_parameters=left,
        num_parameters_before=before,
    )


def _likely_sizes(skeleton: PreTrainedModel, options: PruneOptions) -> BlockSizes:
    """About what a step will leave that decides itself, so that what comes after it can be planned.

    The last block has less than the others, since blocks will hardly have the same sizes, and what needs that (such as
    a student that is cut from the model) is better refused before anything runs.
    """
    sublayers = prunable_sublayers(skeleton, options.kinds)
    share = None if options.speedup is None else 1 - 1 / options.speedup
    uniform = PruningSettings(heads=share or options.heads, neurons=share or options.neurons)
    sizes = planned_sizes(sublayers, uniform) or block_sizes(sublayers)
    if options.is_uniform:
        return sizes
    *others, last = sizes.neurons
    return replace(sizes, neurons=(*others, max(last - STEP, min(1, last))))


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prune(options: PruneOptions, plan: PrunePlan, data: Data, folder: Path, *, profile: bool = False) -> StepResult:
    """Prune the step's model, on the main process alone.

    Args: as for `RunStep`; `profile` changes nothing, as nothing is trained.
    """
    decided: dict[str, Any] = {}

    def work() -> None:
        settings, computes = options.settings, options.speedup is not None
        model, processor, batches = loaded_with_rows(options, plan, data, rows=_ROWS, computes=computes)
        sizes = plan.sizes
        if sizes is None:
            sizes, speedup = decide_sizes(model, batches, settings, measured=_measured(options, data))
            decided.update(heads=list(sizes.heads), neurons=list(sizes.neurons))
            if speedup is not None:
                decided.update(speedup=round(speedup, 3), threads=torch.get_num_threads())
                log.print(f"      measured {speedup:.2f} × as fast: {_in_words(asdict(sizes))}")
                if not is_close(speedup, settings.speedup or 1):
                    log.print(remark(f"speedup: {settings.speedup:g} was not met; these sizes came nearest"))
        prune_to_sizes(model, batches, sizes, settings).to("cpu").save_pretrained(folder)
        processor.save_pretrained(folder)

    on_main_process(work)
    return StepResult(decided=decided or None)


def _measured(options: PruneOptions, data: Data) -> Measured:
    given = {name: getattr(options, name) for name in _OF_THE_CLOCK if getattr(options, name) is not None}
    return Measured(**{"sequence_length": min(_SEQUENCE_LENGTH, data.max_length), **given})


def _estimate(options: PruneOptions, plan: PrunePlan, data: Data) -> Estimate:
    weights = 4 * plan.num_parameters_before
    copies = 1 + (options.reconstruct or options.importance == "taylor") + (options.speedup is not None)
    return Estimate(plan.num_parameters, 4 * plan.num_parameters, Memory(weights=copies * weights))


def _lines(options: PruneOptions, plan: PrunePlan) -> list[str]:
    if plan.sizes is None:
        if options.speedup is not None:
            return [f"heads and neurons of each block, picked for {options.speedup:g} × the speed on this machine"]
        return ["heads and neurons of each block, picked by their importance"]
    return [_in_words(asdict(plan.sizes))]


def _in_words(sizes: Mapping[str, Sequence[int]]) -> str:
    """Sizes of blocks in words: one number where all are the same."""
    parts = []
    for name in ("heads", "neurons"):
        counts = list(sizes[name])
        same = len(set(counts)) == 1
        parts.append(f"{counts[0]} {name} in every block" if same else f"{', '.join(map(str, counts))} {name}")
    return "; ".join(parts)


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} without some of its attention heads or feed-forward neurons"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    options, decided = record.options, record.decided or {}
    given = [
        f"{name} {options[name]}" for name in ("heads", "neurons", "intermediate_size", "speedup") if options[name]
    ]
    how = f"Pruned ({', '.join(given)}) by {options['importance']} importance in {options['rounds']} round"
    lines = [how + "s" * (options["rounds"] > 1) + ", output layers refitted" * options["reconstruct"]]
    if decided:
        lines.append(f"Left: {_in_words(decided)}")
    if "speedup" in decided:
        lines.append(f"Measured as {decided['speedup']} × as fast with {decided['threads']} threads when it was made")
    return lines


PRUNE = Verb(
    name="prune",
    options=PruneOptions,
    plan=_plan,
    run=prune,
    trains=False,
    needs_head=("model",),
    label_map="label_map",
    takes_quantized=lambda _: False,
    problems=lambda options, plan, data: [],
    estimate=_estimate,
    lines=_lines,
    rows=rows_measured_on,
    splits=lambda options, _: {"train"} if options.reads_rows else set(),
    resolved=asdict,
    is_smaller=lambda _, of_parent: True,
    is_compared=False,
    has_variants=False,
    is_plain=lambda _: False,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=("pruning",),
    summary=_summary,
    details=_details,
)
