"""What the machine does fast, and how to let it."""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

_LONGEST_EAGER = 128


def has_bf16() -> bool:
    """Whether matrix products in bfloat16 are done in hardware, not emulated."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that are freed, and say whether it does.

    By default it gives each back to the kernel, which must zero its pages again at the next step; the gradient of the
    word embeddings alone is tens of megabytes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return mallopt is not None and mallopt(mmap_max, 0) == 1 and mallopt(trim_threshold, 2**31 - 1) == 1


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
