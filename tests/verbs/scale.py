"""A verb that the package does not know, whole in one module: it multiplies the weights of a model's head."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from distill.common.distributed import on_main_process
from distill.common.records import StepRecord
from distill.data.load import Data
from distill.errors import InputError
from distill.models.load import load_classifier, load_processor
from distill.verbs.base import Estimate, Memory, ModelInput, StepPlan, StepResult, Verb


def scale_head(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """Multiply the weights of a BERT's classifier in place, and return the model."""
    with torch.no_grad():
        model.classifier.weight.mul_(factor)
    return model


@dataclass(kw_only=True)
class ScaleOptions:
    """Multiply the weights of a model's head."""

    model: str = field(metadata={"help": "What to scale."})
    factor: Annotated[float, Field(gt=0)] = field(default=2.0, metadata={"help": "What its head is multiplied by."})
    label_map: dict[str, str] | None = field(default=None, metadata={"help": "The model's label names → the task's."})


@dataclass(frozen=True, kw_only=True)
class ScalePlan(StepPlan):
    """The plan of a scaling."""

    num_scaled: int
    """Weights of the head."""


def _plan(options: ScaleOptions, inputs: dict[str, ModelInput], data: Data | None) -> ScalePlan:
    config = inputs["model"].config
    if options.factor == 13:
        raise InputError("factor: 13 brings bad luck; take another")
    return ScalePlan(
        inputs=inputs,
        config=config,
        layers=None,
        layer_pairs={},
        weight_bytes=None,
        is_adapter=False,
        num_scaled=config.num_labels * config.hidden_size,
    )


def scale(options: ScaleOptions, plan: ScalePlan, data: Data, folder: Path, *, profile: bool = False) -> StepResult:
    """Scale the head of its model."""
    decided: dict[str, Any] = {}

    def work() -> None:
        location = plan.source.location
        model = load_classifier(location, data.task, label_map=options.label_map, dtype=torch.float32)
        scale_head(model, options.factor).save_pretrained(folder)
        load_processor(location, data.task.kind, data.max_length).save_pretrained(folder)
        decided["largest"] = float(model.classifier.weight.detach().abs().max())

    on_main_process(work)
    return StepResult(decided=decided)


def _estimate(options: ScaleOptions, plan: ScalePlan, data: Data) -> Estimate:
    return Estimate(plan.num_scaled, 4 * plan.num_scaled, Memory(weights=4 * plan.num_scaled))


def _rows(options: ScaleOptions, data: Data) -> list[Any]:
    return [data.task.label_names, data.max_length]


def _splits(options: ScaleOptions, splits: Iterable[str]) -> set[str]:
    return set()


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} with a head {options['factor']:g} times as large"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    largest = (record.decided or {})["largest"]
    return [f"Head of {named(record.parents[0])} × {record.options['factor']:g}, its largest weight {largest:.3f}"]


SCALE = Verb(
    name="scale",
    options=ScaleOptions,
    plan=_plan,
    run=scale,
    trains=False,
    needs_head=("model",),
    label_map="label_map",
    takes_quantized=lambda _: False,
    problems=lambda options, plan, data: [],
    estimate=_estimate,
    lines=lambda options, plan: [f"{plan.num_scaled} weights × {options.factor:g}"],
    rows=_rows,
    splits=_splits,
    resolved=asdict,
    is_smaller=lambda _, of_parent: False,
    is_compared=False,
    has_variants=False,
    is_plain=lambda _: False,
    relation="finetune",
    tags=lambda _: ["scaled"],
    lineage_tags=("scaling",),
    summary=_summary,
    details=_details,
)
