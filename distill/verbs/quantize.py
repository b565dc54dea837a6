"""The verb `quantize`: store a model's weights in fewer bits."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from distill.common.console import log
from distill.common.distributed import on_main_process
from distill.common.hardware import compute_device
from distill.common.records import StepRecord
from distill.compression.quantization.formats import Format, QuantizationSettings, choose_formats, model_size
from distill.compression.quantization.gptq import compensate
from distill.compression.quantization.mixed import (
    Mix,
    budget_in_bytes,
    calibration_logits,
    check_budget,
    choose_mix,
    write_sensitivity,
)
from distill.compression.quantization.quantize import apply_formats
from distill.compression.replacements import quantized_as
from distill.data.load import Data
from distill.errors import InputError
from distill.models.description import describe, grouped
from distill.models.labels import set_labels
from distill.models.load import from_config, load_classifier, load_processor
from distill.models.replacements import structure_of
from distill.tasks.kinds import targets_of
from distill.verbs.base import Estimate, Memory, ModelInput, StepPlan, StepResult, Verb
from distill.verbs.calibration import calibration_batches
from distill.verbs.temperature import CALIBRATED, calibrate, calibration_problems, scored_of

_SETTINGS = {field.name for field in fields(QuantizationSettings)}


@dataclass(kw_only=True)
class QuantizeOptions(QuantizationSettings):
    """Quantize a model with bitsandbytes, embeddings included."""

    model: str = field(metadata={"help": "What to quantize: a Hub id, a folder, package:…, or an earlier step."})
    bits_budget: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?[kMG]B$")] | None = field(
        default=None,
        metadata={
            "help": "Instead of format: pick one for every module by measuring what each costs, within this many bits "
            "per quantizable weight on average (5.2), or bytes of the whole model (15.3MB). Measured with plain "
            "rounding, whatever gptq says."
        },
    )
    gptq: bool = field(
        default=False,
        metadata={
            "help": "Round 4-bit weights so that their errors cancel out on calibration rows: as many bytes, and less "
            "of a change."
        },
    )
    calibration_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={
            "help": "Training rows that bits_budget (by default 256) and gptq (as many as hold 65,536 tokens; 512 "
            "images) measure on."
        },
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Divide the logits by a temperature that is fitted on half of the validation rows, in the head's "
            "weights: usable probabilities, the same labels. Needs rest_dtype: fp32."
        },
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        if self.bits_budget is not None and self.format is not None:
            raise InputError("format: is picked by bits_budget; leave one of them out (overrides fix single modules)")
        in_four_bits = {self.format, *self.overrides.values()} & {"nf4", "fp4"} or self.bits_budget is not None
        if self.gptq and not in_four_bits:
            raise InputError("gptq: is for weights in 4 bit; say format: nf4, or leave it out")
        if self.calibration_rows is not None and not self.reads_rows:
            raise InputError("calibration_rows: has no effect without bits_budget or gptq; leave it out")
        if self.calibrate and (self.format == "bf16" or self.rest_dtype != "fp32"):
            raise InputError(
                "calibrate: a head rounded to 16 bit can't be scaled without changing labels; "
                + (
                    "bf16 leaves no other, so leave one out"
                    if self.format == "bf16"
                    else "say rest_dtype: fp32 beside it"
                )
            )

    @property
    def reads_rows(self) -> bool:
        """Whether the model depends on training rows."""
        return self.gptq or self.bits_budget is not None


@dataclass(frozen=True, kw_only=True)
class QuantizePlan(StepPlan):
    """The plan of a quantization."""

    formats: dict[str, Format] | None
    """Of every module that will be quantized, by its full name; None where the step picks them within the budget."""
    budget: int | None
    """Bytes of the whole model that the picked formats may take; None without a budget."""
    num_parameters: int


def _plan(options: QuantizeOptions, inputs: dict[str, ModelInput], data: Data | None) -> QuantizePlan:
    """The formats where the options say them, from a skeleton of the model; else the bytes that bound the step's pick.

    Raises:
        InputError: patterns that match nothing, or a budget that can't be kept.
    """
    config = copy.deepcopy(inputs["model"].config)
    formats: dict[str, Format] | None = None
    budget, weight_bytes, num_parameters = None, None, 0
    if data is not None:
        set_labels(config, data.task)
        with torch.device("meta"):
            skeleton = from_config(config, data.task.kind)
        num_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        settings = QuantizationSettings(**{name: getattr(options, name) for name in _SETTINGS})
        if options.bits_budget is None:
            formats = choose_formats(skeleton, options)
            weight_bytes = model_size(skeleton, formats, options)
            likely = formats
        else:
            budget = budget_in_bytes(options.bits_budget, skeleton, options)
            weight_bytes = check_budget(skeleton, options, budget)
            settings.format = "nf4"  # as most that a budget picks
            likely = choose_formats(skeleton, settings)
        if likely:
            replaced = {name: quantized_as(each, settings) for name, each in likely.items()}
            config.quantization_config = describe([*structure_of(config), *grouped(replaced)])
    return QuantizePlan(
        inputs=inputs,
        config=config,
        layers=None,
        layer_pairs={},
        weight_bytes=weight_bytes,
        is_adapter=False,
        is_bound=options.bits_budget is not None,
        formats=formats,
        budget=budget,
        num_parameters=num_parameters,
    )


def quantize(
    options: QuantizeOptions, plan: QuantizePlan, data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Quantize the step's model, on the main process alone.

    Args: as for `RunStep`; `profile` changes nothing, as nothing is trained.
    """
    decided: dict[str, Any] = {}

    def work() -> None:
        location = plan.source.location
        model = load_classifier(location, data.task, label_map=options.label_map, dtype=torch.float32)
        processor = load_processor(location, data.task.kind, data.max_length)
        model.to(compute_device() if options.reads_rows else "cpu")
        formats = plan.formats
        if formats is None:
            mix = _pick_mix(
                model, options, plan, calibration_batches(data, processor, rows=options.calibration_rows or 256), folder
            )
            decided.update(formats=mix.formats, weight_bytes=mix.size)
            formats = {name: each for name, each in mix.formats.items() if each != "none"}  # type: ignore[misc]
        if options.gptq:
            rows = options.calibration_rows
            batches = calibration_batches(data, processor, rows=rows or 512, tokens=None if rows else 65536)
            compensate(model, formats, options, batches)
        quantized = apply_formats(model.to("cpu"), formats, options)
        if options.calibrate:
            decided.update(calibrate(quantized, processor, data))
        quantized.save_pretrained(folder)
        processor.save_pretrained(folder)

    on_main_process(work)
    return StepResult(decided=decided or None)


def _pick_mix(
    model: PreTrainedModel,
    options: QuantizeOptions,
    plan: QuantizePlan,
    batches: list[dict[str, Tensor]],
    folder: Path,
) -> Mix:
    """The formats that keep closest to the model within its budget; what was measured goes into the folder."""
    budget = plan.budget or 0
    mixes, measured = choose_mix(
        model,
        options,
        budget,
        predict=lambda model: calibration_logits(model, batches),
        targets=targets_of(model),
    )
    write_sensitivity(folder, budget, mixes, measured)
    for mix in mixes:
        log.print(f"      {mix.name}: {mix.size / 1e6:.2f} MB, divergence {mix.divergence:.3g}")
    return mixes[0]


def _estimate(options: QuantizeOptions, plan: QuantizePlan, data: Data) -> Estimate:
    weights = plan.weight_bytes or 0
    return Estimate(plan.num_parameters, weights, Memory(weights=4 * plan.num_parameters + weights))


def _lines(options: QuantizeOptions, plan: QuantizePlan) -> list[str]:
    if plan.formats is None:
        return [f"a format for each module, picked within {(plan.budget or 0) / 1e6:.2f} MB"]
    counts = Counter(plan.formats.values())
    told = [f"{count} module{'s' * (count > 1)} in {each}" for each, count in counts.items()]
    lines = [", ".join(told) or "all weights in bf16"]
    return lines + [CALIBRATED] * options.calibrate


def _rows(options: QuantizeOptions, data: Data) -> list[Any]:
    rows = [data.train_fingerprint] if options.reads_rows else []
    return [data.task.label_names, data.max_length, *rows, *([data.fingerprint] if options.calibrate else [])]


def _splits(options: QuantizeOptions, names: Iterable[str]) -> set[str]:
    trained = {"train", "unlabelled"} if options.reads_rows else set()
    return trained | (scored_of(names) if options.calibrate else set())


def _is_plain(options: QuantizeOptions) -> bool:
    return not (options.reads_rows or options.overrides or options.skip)


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} {_formats(options)}"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    formats = _formats(record.options)
    found, temperature = record.decided or {}, (record.decided or {}).get("temperature")
    said = (
        [f"probabilities by a temperature of {temperature:.2f}, fitted on {found['temperature_rows']} validation rows"]
        if temperature
        else []
    )
    return [each[0].upper() + each[1:] for each in (formats, *said) if each]


def _formats(options: Mapping[str, Any]) -> str:
    """What the model is made of; nothing where step.json is from before there were mixes."""
    if "bits_budget" not in options:
        return ""
    if options["format"] == "bf16":
        return "rounded to bfloat16"
    if options["format"] is None:
        parts = [f"the formats that keep closest to it within {options['bits_budget']} (`sensitivity.json`)"]
    else:
        parts = [f"linear layers in {options['format']}", f"embeddings in {options['embeddings'] or 'int8'}"]
    parts += ["some modules otherwise (`config.json`)"] * bool(options["skip"] or options["overrides"])
    parts += ["4-bit weights rounded by GPTQ"] * options.get("gptq", False)
    return "quantized with bitsandbytes: " + ", ".join(parts)


QUANTIZE = Verb(
    name="quantize",
    options=QuantizeOptions,
    plan=_plan,
    run=quantize,
    trains=False,
    needs_head=("model",),
    label_map="label_map",
    takes_quantized=lambda _: False,
    problems=lambda options, plan, data: calibration_problems(data) if options.calibrate else [],
    estimate=_estimate,
    lines=_lines,
    rows=_rows,
    splits=_splits,
    resolved=asdict,
    is_smaller=lambda _, of_parent: True,
    is_compared=False,
    has_variants=True,
    is_plain=_is_plain,
    relation="quantized",
    tags=lambda options: [options["format"] or "mixed-precision"],
    lineage_tags=(),
    summary=_summary,
    details=_details,
)
