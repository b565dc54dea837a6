"""The verb `share`: let blocks of a model share their weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill.common.console import log
from distill.common.distributed import on_main_process
from distill.common.records import StepRecord
from distill.compression.share import SharingSettings, put_shared, share_with, shared_modules
from distill.data.load import Data
from distill.errors import InputError
from distill.models.labels import set_labels
from distill.models.load import from_config
from distill.models.replacements import is_quantized
from distill.models.structure import depth_of
from distill.models.weights import on_meta
from distill.verbs.base import Estimate, Memory, ModelInput, StepPlan, StepResult, Verb
from distill.verbs.calibration import loaded_with_rows, rows_measured_on

_SETTINGS = {field.name for field in fields(SharingSettings)}
_ROWS = 256
_WORDS = {"all": "blocks", "attention": "attention layers", "feed_forward": "feed-forward networks"}


@dataclass(kw_only=True)
class ShareOptions(SharingSettings):
    """Let neighbouring blocks share their weights: fewer bytes, as much to compute."""

    model: str = field(metadata={"help": "What to change: a Hub id, a folder, package:…, or an earlier step."})
    calibration_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": f"Training rows that starts are measured on; by default {_ROWS}."}
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        if self.calibration_rows is not None and not self.reads_rows:
            raise InputError(f"calibration_rows: has no effect with start: {self.start}; leave it out")

    @property
    def settings(self) -> SharingSettings:
        """Those of the options that the function of a model takes."""
        return SharingSettings(**{name: getattr(self, name) for name in _SETTINGS})


@dataclass(frozen=True, kw_only=True)
class SharePlan(StepPlan):
    """The plan of a sharing."""

    blocks: int
    """Of the model."""
    num_parameters: int
    num_parameters_before: int


def _plan(options: ShareOptions, inputs: dict[str, ModelInput], data: Data | None) -> SharePlan:
    """What is shared, which follows from the options and a skeleton of the model.

    Raises:
        InputError: a model whose blocks can't share, or too many groups.
    """
    config = copy.deepcopy(inputs["model"].config)
    before, left = 0, 0
    if data is not None and not is_quantized(config):  # which is refused, as for other verbs
        set_labels(config, data.task)
        with on_meta():
            skeleton = from_config(config, data.task.kind)
        before = sum(parameter.numel() for parameter in skeleton.parameters())
        put_shared(skeleton, shared_modules(skeleton, options.settings))
        config, left = skeleton.config, sum(parameter.numel() for parameter in skeleton.parameters())
    return SharePlan(
        inputs=inputs,
        config=config,
        layers=None,
        layer_pairs={},
        weight_bytes=None,
        is_adapter=False,
        blocks=depth_of(config),
        num_parameters=left,
        num_parameters_before=before,
    )


def share(options: ShareOptions, plan: SharePlan, data: Data, folder: Path, *, profile: bool = False) -> StepResult:
    """Let blocks of the step's model share their weights, on the main process alone.

    Args: as for `RunStep`; `profile` changes nothing, as nothing is trained.
    """
    decided: dict[str, Any] = {}

    def work() -> None:
        model, processor, batches = loaded_with_rows(options, plan, data, rows=_ROWS)
        shared, divergences = share_with(model, batches, options.settings)
        if divergences:
            decided.update(start=next(iter(divergences)), divergences=divergences)
            log.print("      " + ", ".join(f"{start}: divergence {each:.3g}" for start, each in divergences.items()))
        shared.to("cpu").save_pretrained(folder)
        processor.save_pretrained(folder)

    on_main_process(work)
    return StepResult(decided=decided or None)


def _estimate(options: ShareOptions, plan: SharePlan, data: Data) -> Estimate:
    weights = 4 * plan.num_parameters_before
    return Estimate(plan.num_parameters, 4 * plan.num_parameters, Memory(weights=(1 + options.reads_rows) * weights))


def _lines(options: ShareOptions, plan: SharePlan) -> list[str]:
    return [f"{options.groups} distinct {_WORDS[options.what]} for {plan.blocks} blocks"]


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} with {_WORDS[options['what']]} that share their weights"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    options, start = record.options, (record.decided or {}).get("start", record.options["start"])
    of_blocks = "the mean of the blocks that share" if start == "mean" else f"the {start} of the blocks that share"
    return [f"Distinct {_WORDS[options['what']]}: {options['groups']}, started from {of_blocks}"]


SHARE = Verb(
    name="share",
    options=ShareOptions,
    plan=_plan,
    run=share,
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
    is_smaller=lambda _, of_parent: False,  # on disk it is; it computes as much as before
    is_compared=False,
    has_variants=False,
    is_plain=lambda _: False,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=("weight-sharing",),
    summary=_summary,
    details=_details,
)
