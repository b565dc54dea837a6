"""What the machine does fast, and how to let it."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distill.common.distributed import runs_on_cpu

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

# Of malloc.h: the parameter, its value while freed memory is kept, and afterwards: what glibc's own moving thresholds
# (mallopt(3)) come to in a process that has freed large blocks. A value once set no longer moves.
_MALLOPT = {
    "mmap_max": (-4, 0, 65536),
    "trim_threshold": (-1, 2**31 - 1, 64 * 2**20),
    "mmap_threshold": (-3, 32 * 2**20, 32 * 2**20),
}


def compute_device() -> torch.device:
    """The accelerator of this process (CUDA, XPU, MPS, …), or the CPU where there is none or the launcher said so."""
    accelerator = None if runs_on_cpu() else torch.accelerator.current_accelerator()
    return accelerator or torch.device("cpu")


def accelerator_name() -> str | None:
    """What the accelerator calls itself; None on a CPU."""
    device = compute_device()
    if device.type == "cpu":
        return None
    if device.type == "mps":  # the one without names
        return f"{platform.processor()} (mps)"
    return torch.get_device_module(device).get_device_name()


def wait_for(device: torch.device) -> None:
    """Return when all that a device was asked to compute is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def has_bf16(device: str) -> bool:
    """Whether a device (`cpu`, `cuda`, …) does matrix products in bfloat16 in hardware, not by emulation."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def available_cores() -> Iterator[None]:
    """No more threads than the cores that this process may use; a container's quota is not seen by torch."""
    before = torch.get_num_threads()
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if _CPU_QUOTA.is_file():
        quota, _, period = _CPU_QUOTA.read_text().strip().partition(" ")
        cores = cores if quota == "max" else min(cores, int(quota) / int(period))
    if before <= cores:
        yield
        return
    torch.set_num_threads(max(1, round(cores)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep large blocks that are freed, and give them back at the end.

    By default it gives each back to the kernel, which must zero its pages again at the next step; the gradient of the
    word embeddings alone is tens of megabytes. Thresholds that the environment sets stay as they are.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    for parameter, during, _ in _MALLOPT.values():
        libc.mallopt(parameter, during)
    try:
        yield
    finally:
        for parameter, _, after in _MALLOPT.values():
            libc.mallopt(parameter, after)
        libc.malloc_trim(0)


def allocator() -> str:
    """What gives this process its memory, for the record of a measurement."""
    preloaded = os.environ.get("LD_PRELOAD")
    name = Path(preloaded.split(":")[0]).name if preloaded else "the C library's"
    return name if _glibc() is None else f"{name}, in training keeping what is freed"


def _glibc() -> Any:
    """The C library where freed memory can be kept; None where it has no such settings (musl), and where the
    environment makes them."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    in_environ = [name for name in _MALLOPT if f"MALLOC_{name.upper()}_" in os.environ or f"malloc.{name}=" in tunables]
    if in_environ or not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return None if getattr(library, "mallopt", None) is None else library
