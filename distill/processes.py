"""The processes of a run: two that don't see each other would both train alone, and write one folder."""

import os

import torch
from accelerate import PartialState

from distill.errors import InputError


def process_state() -> PartialState:
    """Accelerate's state of this process, on the CPU (gloo) where there is no accelerator.

    Raises:
        InputError: the launcher started more processes than this one sees.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_world_size(state.num_processes)
    return state


def check_world_size(seen: int) -> None:
    """Compare the processes that were started with those that are seen.

    Raises:
        InputError: they differ.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != seen:
        raise InputError(
            f"the launcher started {started} processes, but this one sees {seen}: each would train alone. Launch with "
            "`torchrun --nproc_per_node N` or `accelerate launch --config_file accelerate_configs/multi_gpu.yaml`, "
            "and make no accelerate state before distill's"
        )
