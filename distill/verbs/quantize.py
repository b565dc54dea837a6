"""The verb `quantize`: store a model's weights in fewer bits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from distill.common.console import log
from distill.common.distributed import on_main_process
from distill.common.hardware import compute_device
from distill.compression.quantization.formats import Format, choose_formats
from distill.compression.quantization.gptq import compensate
from distill.compression.quantization.mixed import (
    budget_in_bytes,
    calibration_logits,
    choose_mix,
    write_sensitivity,
)
from distill.compression.quantization.quantize import apply_formats
from distill.data.load import Data
from distill.data.tokenized import Processor
from distill.evaluation.evaluate import input_batches
from distill.models.description import Entry, describe
from distill.models.load import from_config, load_classifier, load_processor
from distill.models.replacements import structure_of
from distill.tasks.base import TaskKind
from distill.tasks.kinds import targets_of
from distill.verbs.base import StepResult, Verb
from distill.verbs.options import QuantizeOptions


def quantize(
    options: QuantizeOptions, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Quantize `inputs["model"]`; on the main process alone. It trains nothing, so there is nothing to profile."""

    def work() -> None:
        model = load_classifier(inputs["model"], data.task, label_map=options.label_map, dtype=torch.float32)
        processor = load_processor(inputs["model"], data.task.kind, data.max_length)
        model.to(compute_device() if options.reads_rows else "cpu")
        if options.bits_budget is None:
            formats = choose_formats(model, options)
        else:
            formats = _pick_formats(model, options, _calibration(data, processor, options, rows=256), folder)
        if options.gptq:
            compensate(model, formats, options, _calibration(data, processor, options, rows=512, tokens=65536))
        apply_formats(model.to("cpu"), formats, options).save_pretrained(folder)
        processor.save_pretrained(folder)

    on_main_process(work)
    return StepResult()


def _calibration(
    data: Data, processor: Processor, options: QuantizeOptions, *, rows: int, tokens: int | None = None
) -> list[dict[str, Tensor]]:
    """The model inputs of a random part of the training rows, in batches of like length.

    Args:
        rows: how many, where the options don't say.
        tokens: as many rows instead as hold these, where rows are texts.
    """
    found = data.tokenized("train", processor).shuffle(seed=0, keep_in_memory=True)
    if tokens is not None and "length" in found.column_names:
        rows = int(np.searchsorted(np.cumsum(found["length"]), tokens)) + 1
    found = found.select(range(min(options.calibration_rows or rows, len(found))))
    log.print(f"      measuring on {len(found):,} training rows")
    return [batch for _, batch in input_batches(found, processor, batch_size=64)]


def _pick_formats(
    model: PreTrainedModel, options: QuantizeOptions, batches: list[dict[str, Tensor]], folder: Path
) -> dict[str, Format]:
    """The formats that keep closest to the model within its budget; what was measured goes into the folder."""
    budget = budget_in_bytes(options.bits_budget or 0, model, options)
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
    return {name: format for name, format in mixes[0].formats.items() if format != "none"}  # type: ignore[misc]


def _complete(options: QuantizeOptions, config: PretrainedConfig, kind: TaskKind | None) -> None:
    if kind is not None:
        with torch.device("meta"):
            skeleton = from_config(config, kind)
        options.planned_size(skeleton)  # its patterns match modules, and its budget can be kept
    if options.format != "bf16":
        made = Entry(options.format or "mixed", {}, ())  # which modules is known when their weights are
        config.quantization_config = describe([*structure_of(config), made])


def _rows(options: QuantizeOptions, data: Data) -> list[Any]:
    return [data.task.label_names, data.max_length, *([data.train_fingerprint] if options.reads_rows else [])]


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} {_formats(options)}"


def _details(options: Mapping[str, Any]) -> list[str]:
    formats = _formats(options)
    return [formats[0].upper() + formats[1:]] if formats else []


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
    run=quantize,
    needs_head=True,
    complete=_complete,
    rows=_rows,
    splits=lambda options, _: {"train", "unlabelled"} if options.reads_rows else set(),
    resolved=asdict,
    relation="quantized",
    tags=lambda options: [options["format"] or "mixed-precision"],
    lineage_tags=(),
    summary=_summary,
    details=_details,
)
