"""Size, memory, FLOPs, latency and throughput of models, measured side by side."""

import copy
import functools
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from distill.common.console import progress
from distill.common.hardware import accelerator_name, compute_device
from distill.common.records import Latency, Measurement
from distill.compression.quantization.layers import Int8Linear
from distill.compression.quantization.quantize import weight_memory
from distill.errors import InputError
from distill.evaluation.cost import energy_counter, joules_per_row
from distill.evaluation.loading import engine_of, load_timed, skeleton_of
from distill.evaluation.options import BenchmarkOptions
from distill.export.runtime import ExportedModel
from distill.models.load import longest_input, size_on_disk
from distill.models.replacements import is_quantized
from distill.models.timing import random_inputs, seconds_of


def benchmark_models(
    locations: Mapping[str, str], options: BenchmarkOptions, *, made_from: Mapping[str, str] | None = None
) -> dict[str, Measurement]:
    """Measure models in alternating rounds, so that a busy moment of the machine hits all of them.

    Args:
        locations: for each name a folder or Hub id; an export's engine computes it, with as many threads as torch has.
        options: batch sizes, tokens of a row, and rounds.
        made_from: for models made from another one here, its name. What could be faster on a CPU than the quantized
            ones and the exports among them is then measured too, under the names of `variants_of`.

    Raises:
        InputError: a model is too short for `sequence_length`, or its weights are not those of its config.
    """
    device = compute_device()
    models = {name: load_timed(location).to(device).eval() for name, location in locations.items()}
    if device.type == "cpu":
        models |= _variants(models, made_from or {})
    refuse_too_short({name: model.config for name, model in models.items()}, options)
    length = options.sequence_length
    short = {name: random_inputs(m, options.latency_batch_size, length, m.device) for name, m in models.items()}
    long = {name: random_inputs(m, options.throughput_batch_size, length, m.device) for name, m in models.items()}
    latencies: dict[str, list[float]] = {name: [] for name in models}
    throughputs: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for round_number in progress(range(options.rounds + 1), "Benchmarking"):
            for name, model in models.items():
                latency = [seconds_of(functools.partial(model, **short[name]), model.device) for _ in range(8)]
                throughput = seconds_of(functools.partial(model, **long[name]), model.device)
                if round_number > 0:  # the first one warms up
                    latencies[name] += latency
                    throughputs[name].append(options.throughput_batch_size / throughput)
    joules = _joules(models, long, options.throughput_batch_size, device)
    results = {}
    for name, model in models.items():
        skeleton = skeleton_of(model)
        engine, threads = engine_of(model)
        folder = Path(locations[name]) if name in locations else None
        results[name] = Measurement(
            name=name,
            num_parameters=sum(p.numel() for p in skeleton.parameters()) + _in_adapters(model),
            size_on_disk_bytes=size_on_disk(folder) if folder and folder.is_dir() else None,
            memory_bytes=None if isinstance(model, ExportedModel) else weight_memory(model),
            flops_per_sample=_count_flops(skeleton, long[name]),
            latency_ms=Latency(*(round(float(np.percentile(latencies[name], q)) * 1000, 3) for q in (50, 95))),
            throughput_samples_per_second=round(float(np.median(throughputs[name])), 2),
            throughput_spread={"min": round(min(throughputs[name]), 2), "max": round(max(throughputs[name]), 2)},
            device=model.device.type,
            engine=engine,
            threads=threads,
            joules_per_sample=joules[name],
        )
    return results


def _joules(
    models: Mapping[str, PreTrainedModel],
    inputs: Mapping[str, dict[str, torch.Tensor]],
    rows: int,
    device: torch.device,
) -> dict[str, float | None]:
    """Joules of a row of each model; None where they can't be read."""
    counter = energy_counter(device)
    if counter is None:
        return dict.fromkeys(models)
    with torch.inference_mode():
        calls = {name: functools.partial(model, **inputs[name]) for name, model in models.items()}
        return {name: joules_per_row(call, counter, rows=rows, device=device) for name, call in calls.items()}


def refuse_too_short(configs: Mapping[str, PretrainedConfig], options: BenchmarkOptions) -> None:
    """Raise an error if a model takes fewer tokens than are measured.

    Args:
        configs: of the models, by name.
        options: the benchmark's, with `sequence_length` in tokens.

    Raises:
        InputError: with the shortest model's name.
    """
    limits = {name: longest for name, config in configs.items() if (longest := longest_input(config)) is not None}
    shortest = min(limits, key=lambda name: limits[name], default=None)
    if shortest is not None and limits[shortest] < options.sequence_length:
        longest = limits[shortest]
        raise InputError(
            f"benchmark.sequence_length: {options.sequence_length}, but {shortest} takes at most {longest} tokens; "
            f"say {longest}"
        )


def variants_of(name: str, parent: str) -> list[str]:
    """Name what could be faster on a CPU than a quantized or exported model: its parent's plain weights, and itself
    without outliers.

    Args:
        name: of that model.
        parent: of the model that it was made from.
    """
    return [f"{parent} in bf16", f"{name} with threshold 0"]


def _variants(
    models: Mapping[str, PreTrainedModel | ExportedModel], made_from: Mapping[str, str]
) -> dict[str, PreTrainedModel]:
    found: dict[str, PreTrainedModel] = {}
    for name, model in models.items():
        parent = models.get(made_from.get(name, ""))
        if not isinstance(parent, nn.Module) or not (isinstance(model, ExportedModel) or is_quantized(model.config)):
            continue
        in_bf16, without_outliers = variants_of(name, made_from[name])
        if parent.dtype == torch.float32 and in_bf16 not in found:
            found[in_bf16] = copy.deepcopy(parent).to(torch.bfloat16)
        modules = [] if isinstance(model, ExportedModel) else model.modules()
        if any(isinstance(module, Int8Linear) and module.threshold for module in modules):
            found[without_outliers] = copy.deepcopy(model)
            for module in found[without_outliers].modules():
                if isinstance(module, Int8Linear):
                    module.threshold = 0.0
    return found


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that a measurement depends on."""
    packages = ("torch", "transformers", "datasets", "accelerate", "bitsandbytes", "peft")
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": accelerator_name(),
    }


def remarks_on(model: Measurement, parent: Measurement, variants: Sequence[Measurement]) -> list[str]:
    """Say where a model is no gain over the one it was made from, or over its variants (see `variants_of`).

    Args:
        model: a measured one.
        parent: the model that it was made from.
        variants: all that were measured beside them.
    """
    in_bf16, without_outliers = variants_of(model.name, parent.name)
    others = [parent]
    for variant in variants:
        is_itself = math.isclose(variant.memory_bytes or 0, model.memory_bytes or math.inf, rel_tol=0.01)
        if variant.name == without_outliers or (variant.name == in_bf16 and not is_itself):
            others.append(variant)
    return [remark for other in others for remark in slower_or_not_smaller(model, other)]


def slower_or_not_smaller(model: Measurement, parent: Measurement) -> list[str]:
    """Say where a model made from another is no gain; timings within 5 % of each other count as equal.

    Args:
        model: a measured one.
        parent: the model that it was made from.
    """
    sentences = []
    size, parent_size = model.size_on_disk_bytes, parent.size_on_disk_bytes
    if size and parent_size and size >= parent_size:
        sizes = f"{size / 1e6:.1f} MB against {parent_size / 1e6:.1f} MB"
        sentences.append(f"{model.name} is not smaller than {parent.name}: {sizes}.")
    where = f"than {parent.name} on {model.device}"
    slower = model.latency_ms.p50 / parent.latency_ms.p50
    if slower > 1.05:
        latencies = f"{model.latency_ms.p50:.1f} ms against {parent.latency_ms.p50:.1f} ms"
        sentences.append(f"{model.name} is slower {where}: {latencies} ({slower:.2f}×).")
    throughput, parent_throughput = (m.throughput_samples_per_second for m in (model, parent))
    if throughput < parent_throughput / 1.05:
        rates = f"{throughput:.1f} against {parent_throughput:.1f} rows/s ({throughput / parent_throughput:.2f}×)"
        sentences.append(f"{model.name} has less throughput {where}: {rates}.")
    return sentences


def _in_adapters(model: PreTrainedModel | ExportedModel) -> int:
    if isinstance(model, ExportedModel):
        return 0
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)


def _count_flops(skeleton: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> int | None:
    one = {
        name: torch.zeros_like(values[:1], device="meta") for name, values in inputs.items() if name != "attention_mask"
    }
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.inference_mode():
            skeleton.eval()(**one)
    except (RuntimeError, NotImplementedError):  # a forward that looks at values can't run on meta
        return None
    return counter.get_total_flops()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
