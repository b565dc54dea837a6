"""The verb `export`: write a model for an inference engine, ONNX Runtime or OpenVINO."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from distill.common.console import log, remark
from distill.common.distributed import on_main_process
from distill.common.records import StepRecord
from distill.compression.quantization.grids import simulated_grids
from distill.data.load import Data
from distill.errors import InputError
from distill.export.export import export_model
from distill.export.int8 import quantizable_embeddings, quantizable_layers
from distill.export.problems import export_problems, missing_packages
from distill.export.record import LIBRARIES, Engine, Format
from distill.export.size import export_size
from distill.export.web import web_problems
from distill.models.labels import set_labels
from distill.models.load import from_config, load_classifier, load_processor, size_on_disk
from distill.models.replacements import is_quantized
from distill.models.weights import on_meta
from distill.verbs.base import Estimate, Memory, ModelInput, StepPlan, StepResult, Verb
from distill.verbs.calibration import calibration_batches
from distill.verbs.temperature import CALIBRATED, calibrate, calibration_problems, scored_of

_ROWS = 256
_BITS = ("int8", "int4")
_OF_BITS = ("embeddings", "calibration_rows", "float_layers", "agreement", "divergence")
_STORED = {
    "int8": "in int8, a scale for each row",
    "int4": "in 4 bit, a scale for each 32 numbers",
    "same": "as they were",
}
_LIMITS = ("agreement", "divergence")
_COPIES = 4
"""Of the weights in float32 at once: the model, the copy that is traced, its graph, and what the engine loads."""


@dataclass(kw_only=True)
class ExportOptions:
    """Write a model for an inference engine; the end of a chain, as no other step starts from it."""

    model: str = field(metadata={"help": "What to export: a Hub id, a folder, package:…, or an earlier step."})
    engine: Engine = field(default="onnxruntime", metadata={"help": "What will compute it: onnxruntime or openvino."})
    format: Format = field(
        default="fp32",
        metadata={
            "help": "fp32, fp16; int8: the linear layers of the blocks, with scales of activations that are fixed on "
            "calibration rows; int4: their weights alone, rounded on such rows."
        },
    )
    embeddings: Literal["int8", "int4", "same"] | None = field(
        default=None,
        metadata={"help": "Of int8 and int4: embeddings in 8 bit (the default), in 4, or the same as they are."},
    )
    calibration_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": f"Of int8 and int4: training rows that are measured on; by default {_ROWS}."}
    )
    float_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of int8 and int4: names of the layers that stay in float; by default as few as agreement and "
            "divergence allow, those that hurt most."
        },
    )
    agreement: Annotated[float, Field(gt=0, le=1)] | None = field(
        default=None,
        metadata={
            "help": "Of int8, int4: least share of the calibration rows' predictions that stay; by default 0.99."
        },
    )
    divergence: Annotated[float, Field(gt=0)] | None = field(
        default=None,
        metadata={
            "help": "Of int8, int4: most of the mean KL from the model's predictions, in nats; by default 0.0015."
        },
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Divide the logits by a temperature that is fitted on half of the validation rows, in the head's "
            "weights: usable probabilities, the same labels. Not for fp16."
        },
    )
    web: bool = field(
        default=False, metadata={"help": "transformers.js has to read it too, in browsers; for onnxruntime."}
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        given = [name for name in _OF_BITS if getattr(self, name) is not None]
        problems = []
        if self.format not in _BITS:
            problems += [f"{name}: has no effect without format: int8 or int4; leave it out" for name in given]
        elif self.float_layers is not None:
            none = "has no effect beside float_layers, which says what stays in float; leave it out"
            problems += [f"{name}: {none}" for name in given if name in _LIMITS]
        if self.calibrate and self.format == "fp16":
            problems.append("calibrate: a head rounded to 16 bit can't be scaled without changing labels; say fp32")
        if problems:
            raise InputError(*problems)


@dataclass(frozen=True, kw_only=True)
class ExportPlan(StepPlan):
    """The plan of an export."""

    layer_names: tuple[str, ...]
    """Of the layers that int8 or int4 are for; none in another format."""
    least_bytes: int
    """Of its weights, with all these layers in that format."""
    num_parameters: int


def _plan(options: ExportOptions, inputs: dict[str, ModelInput], data: Data | None) -> ExportPlan:
    """Its size from a skeleton of the model: the bytes that bound it where the step chooses layers.

    Raises:
        InputError: a model that no engine takes, or names of layers that it has not.
    """
    config = copy.deepcopy(inputs["model"].config)
    names: list[str] = []
    least = most = num_parameters = 0
    if data is not None and not is_quantized(config):  # which is refused, as for other verbs
        set_labels(config, data.task)
        with on_meta():
            skeleton = from_config(config, data.task.kind)
        kept = options.float_layers
        problems = export_problems(skeleton, options.engine, options.format, float_layers=kept or (), runs=False)
        if options.web:
            processor = load_processor(inputs["model"].tokenizer_location, data.task.kind)
            problems += web_problems(skeleton, processor, options.engine)
        if problems:
            raise InputError(*problems)
        num_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        tables: list[str] = []
        stored: Literal["int8", "int4"] = "int8"
        if options.format in _BITS:
            names = quantizable_layers(skeleton)
            stored = "int4" if options.embeddings == "int4" else "int8"
            tables = [] if options.embeddings == "same" else quantizable_embeddings(skeleton)
        chosen = [name for name in names if name not in (kept or ())]
        least = export_size(skeleton, options.format, layers=chosen, embeddings=tables, stored=stored)
        most = least if kept is not None else export_size(skeleton, options.format, embeddings=tables, stored=stored)
    return ExportPlan(
        inputs=inputs,
        config=config,
        layers=None,
        layer_pairs={},
        weight_bytes=most,
        is_adapter=False,
        is_export=True,
        is_bound=least < most,
        layer_names=tuple(names),
        least_bytes=least,
        num_parameters=num_parameters,
    )


def export(options: ExportOptions, plan: ExportPlan, data: Data, folder: Path, *, profile: bool = False) -> StepResult:
    """Export the step's model, on the main process alone.

    Args: as for `RunStep`; `profile` changes nothing, as nothing is trained.
    """
    decided: dict[str, Any] = {}

    def work() -> None:
        location = plan.source.location
        model = load_classifier(location, data.task, label_map=options.label_map, dtype=torch.float32)
        processor = load_processor(location, data.task.kind, data.max_length)
        if options.calibrate:
            decided.update(calibrate(model, processor, data))
        batches = []
        if options.format in _BITS:
            batches = calibration_batches(data, processor, rows=options.calibration_rows or _ROWS)
        given = {name: getattr(options, name) for name in (*_LIMITS, "embeddings", "float_layers")}
        given = {name: value for name, value in given.items() if value is not None}
        grids = simulated_grids(Path(location)) if options.format == "int8" else None
        if grids is not None and given:
            log.print(remark(f"{', '.join(given)}: given, so the scales that the model was trained with are left"))
            grids = None
        record = export_model(
            model,
            processor,
            folder,
            engine=options.engine,
            format=options.format,
            batches=batches,
            grids=grids,
            web=options.web,
            **given,
        )
        decided.update(weight_bytes=size_on_disk(folder), largest_difference=record.largest_difference)
        if options.format in _BITS:
            told = ("float_layers", "calibration_rows", "agreement", "divergence")
            decided.update({name: getattr(record, name) for name in told})
            count = f"{len(record.quantized_layers)} of {len(plan.layer_names)} layers in {options.format}"
            log.print(f"      {count}: {_kept(decided)}")

    on_main_process(work)
    return StepResult(decided=decided or None)


def _problems(options: ExportOptions, plan: ExportPlan, data: Data | None) -> list[str]:
    return missing_packages(options.engine) + (calibration_problems(data) if options.calibrate else [])


def _estimate(options: ExportOptions, plan: ExportPlan, data: Data) -> Estimate:
    weights = plan.weight_bytes or 0
    return Estimate(plan.num_parameters, weights, Memory(weights=_COPIES * 4 * plan.num_parameters))


def _lines(options: ExportOptions, plan: ExportPlan) -> list[str]:
    return [_layers(options, plan), *[CALIBRATED] * options.calibrate]


def _layers(options: ExportOptions, plan: ExportPlan) -> str:
    count, told = len(plan.layer_names), f"{options.format} for {options.engine}"
    if not count:
        return told
    if options.float_layers is not None:
        return f"{told}, {count - len(set(options.float_layers))} of {count} layers in {options.format}"
    return f"{told}, as many of {count} layers as keep its predictions: {plan.least_bytes / 1e6:.1f} MB with all"


def _rows(options: ExportOptions, data: Data) -> list[Any]:
    rows = [data.train_fingerprint] * (options.format in _BITS) + [data.fingerprint] * options.calibrate
    return [data.task.label_names, data.max_length, *rows]


def _splits(options: ExportOptions, names: Iterable[str]) -> set[str]:
    return ({"train"} if options.format in _BITS else set()) | (scored_of(names) if options.calibrate else set())


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} exported for {options['engine']} in {options['format']}"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    options, decided = record.options, record.decided or {}
    lines = [f"Exported from {named(record.parents[0])} for {options['engine']} in {options['format']}"]
    if options["format"] in _BITS:
        fixed = "Static scales of activations from" if options["format"] == "int8" else "Weights in 4 bit, rounded on"
        lines += [
            f"{fixed} {decided['calibration_rows']} training rows, on which it keeps {_kept(decided)}",
            f"Embeddings {_STORED[options['embeddings'] or 'int8']}; heads in float",
        ]
        if decided["float_layers"]:
            lines.append(f"Layers of its blocks that stay in float: {', '.join(decided['float_layers'])}")
    return lines


def _kept(decided: Mapping[str, Any]) -> str:
    return f"{decided['agreement']:.2%} of the float model's predictions, divergence {decided['divergence']:.2g}"


EXPORT = Verb(
    name="export",
    options=ExportOptions,
    plan=_plan,
    run=export,
    trains=False,
    needs_head=("model",),
    label_map="label_map",
    takes_quantized=lambda _: False,
    problems=_problems,
    estimate=_estimate,
    lines=_lines,
    rows=_rows,
    splits=_splits,
    resolved=asdict,
    is_smaller=lambda _, of_parent: True,
    is_compared=False,
    has_variants=True,
    is_plain=lambda _: False,
    relation="quantized",
    tags=lambda options: [LIBRARIES[options["engine"]], options["format"]],
    lineage_tags=(),
    summary=_summary,
    details=_details,
)
