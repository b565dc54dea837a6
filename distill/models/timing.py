"""The time that calls take, measured in turns so that a busy moment of the machine hits all of them."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.common.hardware import wait_for
from distill.models.structure import input_names

_IMAGE_SIZE = 224  # of networks that take any size

Name = TypeVar("Name", bound=Hashable)


def interleaved_medians(
    calls: Mapping[Name, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[Name, float]:
    """Measure the median seconds of each call over rounds in which every one has its turn, after one that warms up.

    Args:
        calls: by any key.
        rounds: that are measured.
        device: which the calls compute on; it is waited for.
    """
    measured: dict[Name, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            if number > 0:
                measured[name].append(seconds)
    return {name: float(np.median(each)) for name, each in measured.items()}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds that one call takes, with what it leaves to a device.

    Args:
        call: what is timed.
        device: which it computes on; it is waited for.
    """
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def random_inputs(
    model: PreTrainedModel, batch_size: int, sequence_length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Make rows of random tokens without padding, always the same; images of the model's size where it takes these.

    Args:
        model: which takes them.
        batch_size: rows.
        sequence_length: tokens of a row.
        device: to put them on.
    """
    generator = torch.Generator().manual_seed(0)
    if "pixel_values" in input_names(model):
        size = getattr(model.config, "image_size", _IMAGE_SIZE)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.rand(batch_size, model.config.num_channels, *sides, generator=generator)
        return {"pixel_values": pixels.to(device, model.dtype)}
    ids = torch.randint(model.config.vocab_size, (batch_size, sequence_length), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
