"""What the machine does fast, and how to let it."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

_LONGEST_EAGER = 128
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_kept: list[bool] = []


def has_bf16(device: str) -> bool:
    """Whether a device (`cpu`, `cuda`, …) does matrix products in bfloat16 in hardware, not by emulation."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_available_cores() -> None:
    """No more threads than the cores that this process may use; a container's quota is not seen by torch."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if _CPU_QUOTA.is_file():
        quota, _, period = _CPU_QUOTA.read_text().strip().partition(" ")
        cores = cores if quota == "max" else min(cores, int(quota) / int(period))
    if torch.get_num_threads() > cores:
        torch.set_num_threads(max(1, round(cores)))


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that are freed, and say whether it does.

    By default it gives each back to the kernel, which must zero its pages again at the next step; the gradient of the
    word embeddings alone is tens of megabytes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    kept = mallopt is not None and mallopt(mmap_max, 0) == 1 and mallopt(trim_threshold, 2**31 - 1) == 1
    _kept.append(kept)
    return kept


def allocator() -> str:
    """What gives this process its memory, for the record of a measurement."""
    preloaded = os.environ.get("LD_PRELOAD")
    name = Path(preloaded.split(":")[0]).name if preloaded else "the C library's"
    return f"{name}, keeping what is freed" if any(_kept) else name


@contextmanager
def fast_attention(models: Sequence[PreTrainedModel], longest: int, device: torch.device) -> Iterator[None]:
    """On the CPU, plain attention for rows of at most `longest` tokens where that is faster.

    torch's fused attention takes twice as long in training for short rows there (recipes/README.md); for long ones it
    saves memory. The models have their own attention again afterwards.
    """
    before = [model.config._attn_implementation for model in models]
    if device.type == "cpu" and longest <= _LONGEST_EAGER:
        for model, attention in zip(models, before, strict=True):
            if attention == "sdpa":
                model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, attention in zip(models, before, strict=True):
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
