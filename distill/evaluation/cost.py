"""What a model costs to run: money for a million predictions, and joules where a counter of the machine can be read."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from distill.common.hardware import wait_for
from distill.common.records import Measurement
from distill.evaluation.options import BenchmarkOptions

_POWERCAP = Path("/sys/class/powercap")
_SECONDS = 1.0  # RAPL's counter moves every millisecond, NVML's every 20 to 100


def cost_per_million(measured: Measurement, options: BenchmarkOptions, price_per_hour: float) -> dict[str, float]:
    """What a million predictions cost on a machine that is busy with nothing else, by the rows of a call.

    Args:
        measured: its latency and throughput, both medians.
        options: what they were measured with; the numbers of rows are the keys, "1" and "32" unless told otherwise.
        price_per_hour: of the machine, in any currency, which is that of the cost.
    """
    seconds = {
        str(options.latency_batch_size): measured.latency_ms.p50 / 1000 / options.latency_batch_size,
        str(options.throughput_batch_size): 1 / measured.throughput_samples_per_second,
    }
    return {rows: round(price_per_hour / 3600 * 1e6 * each, 6) for rows, each in seconds.items()}


def joules_per_row(
    call: Callable[[], object], counter: Callable[[], float], *, rows: int, device: torch.device
) -> float | None:
    """What one row takes of the energy that a counter counts while a call is made again and again, for one second.

    The counter is of the whole chip: what other programs do there meanwhile is counted, too.

    Args:
        call: computes `rows` rows.
        counter: joules so far (see `energy_counter`).
        rows: of a call.
        device: which it computes on; it is waited for.

    Returns:
        Joules; None where the counter stands still, as in some virtual machines.
    """
    wait_for(device)
    start, before, calls = time.perf_counter(), counter(), 0
    while time.perf_counter() - start < _SECONDS:
        call()
        wait_for(device)
        calls += 1
    return (counter() - before) / (calls * rows) or None


def energy_counter(device: torch.device, powercap: Path = _POWERCAP) -> Callable[[], float] | None:
    """The joules that a device has taken so far, if that can be read: RAPL's of the CPUs, NVML's of a GPU.

    RAPL counts all processor packages together, without memory; since Linux 5.10 only root may read it. NVML needs the
    package pynvml (nvidia-ml-py) and a GPU of the Volta generation or newer.

    Args:
        device: a CPU or a CUDA device; of others nothing is read.
        powercap: the folder of Linux's power capping framework.
    """
    if device.type == "cuda":
        return _nvml_counter(torch.get_device_module(device).get_device_properties(device).uuid)
    return _rapl_counter(powercap) if device.type == "cpu" else None


def _rapl_counter(powercap: Path) -> Callable[[], float] | None:
    last: dict[Path, int] = {}
    limits: dict[Path, int] = {}
    with contextlib.suppress(OSError, ValueError):  # no such folder, or not for us to read
        for domain in sorted(powercap.glob("intel-rapl:*")):
            if (domain / "name").read_text().startswith("package"):  # not its parts, nor the whole platform
                limits[domain] = int((domain / "max_energy_range_uj").read_text())
                last[domain] = int((domain / "energy_uj").read_text())
    if not last:
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for domain, before in last.items():
            last[domain] = int((domain / "energy_uj").read_text())
            total += (last[domain] - before) % (limits[domain] + 1)  # it starts again at 0
        return total / 1e6

    return joules


def _nvml_counter(uuid: object) -> Callable[[], float] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")  # indices differ under CUDA_VISIBLE_DEVICES
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
