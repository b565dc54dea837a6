"""What a step's model will take, in bytes and milliseconds, before it is trained; neither hangs on weights' values."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.common.console import log
from distill.common.folders import write_atomically
from distill.evaluation.benchmark import benchmark_models, environment
from distill.models.load import from_config, load_processor, size_on_disk
from distill.recipes.plan import Plan, PlannedStep
from distill.verbs.all import VERBS


@dataclass(frozen=True)
class Footprint:
    """What a model takes."""

    mb: float
    """10⁶ bytes of weight files."""
    ms: float | None
    """Median milliseconds of one call, as the recipe's `benchmark:` says; None where it was not measured."""


def problem_of(footprint: Footprint, limits: Mapping[str, float]) -> str | None:
    """Say which limits a model exceeds; None where it keeps them.

    Args:
        footprint: of the model.
        limits: `max_mb`, `max_ms`, or none.
    """
    taken = {"max_mb": (footprint.mb, "MB"), "max_ms": (footprint.ms, "ms")}
    over = [
        f"{value:.2f} {unit} of {limits[name]:g}"
        for name, (value, unit) in taken.items()
        if name in limits and value is not None and value > limits[name]
    ]
    return ", ".join(over) or None


def footprint_of(plan: Plan, name: str, cache: Path, *, timed: bool) -> Footprint | None:
    """Measure the model that a step will make, from one of the same shape with weights drawn at random.

    Steps that train nothing (quantize, export) run on such weights.

    Args:
        plan: of a recipe.
        name: of the step.
        cache: a folder; models of the same shape are measured once.
        timed: whether to measure latency too.

    Returns:
        None for adapters of another model.
    """
    planned = plan.steps[name]
    if planned.plan.is_adapter:
        return None
    shape = [_shape(planned), asdict(plan.recipe.benchmark), environment(), timed]
    file = cache / f"{hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]}.json"
    if file.is_file():
        return Footprint(**json.loads(file.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = _untrained(plan, planned, Path(scratch))
        found = measured(folder, plan, timed=timed)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(asdict(found)))
    return found


def measured(folder: Path, plan: Plan, *, timed: bool) -> Footprint:
    """Measure the model in a folder.

    Args:
        folder: of the model.
        plan: whose recipe says how latency is measured.
        timed: whether to measure latency too.
    """
    mb = size_on_disk(folder) / 1e6
    if not timed:
        return Footprint(mb, None)
    found = benchmark_models({"model": str(folder)}, plan.recipe.benchmark)["model"]
    return Footprint(mb, found.latency_ms.p50)


def _shape(planned: PlannedStep) -> list[Any]:
    """What the shape of a step's model hangs on."""
    config = planned.plan.config.to_dict()
    if _is_described(planned):
        return [config]
    given = {key: value for key, value in planned.step.given.items() if key != "model"}
    return [config, planned.step.run, given, *(_shape(parent) for parent in planned.made_from)]


def _is_described(planned: PlannedStep) -> bool:
    """Whether the planned config says all of a model's shape."""
    return planned.plan.weight_bytes is None


def _sooner(options: Any) -> Any:
    """Options that make a model of the same shape without what only its weights need: GPTQ, choices, a temperature."""
    if getattr(options, "calibrate", False):
        options = replace(options, calibrate=False)
    if getattr(options, "gptq", False):
        return replace(options, gptq=False, calibration_rows=options.calibration_rows if options.bits_budget else None)
    if hasattr(options, "float_layers") and options.format in ("int8", "int4"):
        layers = options.float_layers or []
        return replace(options, float_layers=layers, agreement=None, divergence=None, calibration_rows=8)
    return options


def _untrained(plan: Plan, planned: PlannedStep, scratch: Path) -> Path:
    """The folder of a model of a step's shape, in a folder where all such are made."""
    folder, kind = scratch / planned.step.name, plan.data.task.kind
    if folder.exists():
        return folder
    if _is_described(planned):
        model = from_config(planned.plan.config, kind)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases begin equal, and an export would store them once
                parameter.add_(1e-3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        load_processor(planned.plan.tokenizer_location, kind, plan.data.max_length).save_pretrained(folder)
        return folder
    parents = {parent.step.name: parent for parent in planned.made_from}
    inputs = {}
    for option, model in planned.plan.inputs.items():
        if model.is_step:
            place = str(_untrained(plan, parents[model.reference], scratch))
            model = replace(model, location=place, tokenizer_location=place)
        inputs[option] = model
    options = _sooner(planned.step.options)
    folder.mkdir()
    said, log.quiet = log.quiet, True
    try:
        VERBS[planned.step.run].run(options, replace(planned.plan, inputs=inputs), plan.data, folder, profile=False)
    except BaseException:
        shutil.rmtree(folder)
        raise
    finally:
        log.quiet = said
    return folder
