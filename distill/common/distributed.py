"""The processes of a run: how many there are, and work that one of them does while the others wait."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

from distill.common.private_names import reset_accelerator_state, shared_precision, shared_states
from distill.errors import InputError, MainProcessFailed

Result = TypeVar("Result")

_LONGEST_WORK = timedelta(days=30)  # of one process; a peer that dies is noticed at once, whatever this says
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of torchrun, and of MPIs
_LAUNCH = (
    "`accelerate launch --config_file accelerate_configs/multi_gpu.yaml` (without GPUs multi_cpu.yaml), "
    "or with `torchrun --nproc_per_node N`"
)


def process_state() -> PartialState:
    """Accelerate's state of this process, on the CPU (gloo) where there is no accelerator.

    Raises:
        InputError: the launcher was asked for more processes than this one sees, or there are more than GPUs.
    """
    state = PartialState(cpu=runs_on_cpu())
    check_world_size(state.num_processes)
    return state


def forget_precision() -> None:
    """Let the next trainer of this process choose its own: Accelerate keeps the first one's, and refuses another."""
    reset_accelerator_state()


def forget_other_precision(mixed_precision: str) -> None:
    """`forget_precision`, where the one that Accelerate keeps is another."""
    if shared_precision() not in (None, mixed_precision):
        forget_precision()


class AcceleratorSnapshot:
    """Accelerate's state, one for the whole process, as a trainer found it.

    Another trainer's precision, or a mere `TrainingArguments` made since, has replaced it by the time that this trainer
    runs.
    """

    def __init__(self) -> None:
        self._states = [(shared, dict(shared)) for shared in shared_states()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The state as it was, for the time of a run."""
        now = AcceleratorSnapshot()
        self._put()
        try:
            yield
        finally:
            now._put()

    def _put(self) -> None:
        for shared, values in self._states:
            shared.clear()
            shared.update(values)


def runs_on_cpu() -> bool:
    """Whether there is no accelerator, or the launcher said CPU (`accelerate launch --cpu`, or `use_cpu: true`)."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def check_world_size(seen: int) -> None:
    """Compare the processes that were asked for with those that are seen: each would train alone, into one folder.

    Raises:
        InputError: they differ, or there are more on this machine than GPUs.
    """
    started = get_int_from_env(_WORLD_SIZES, 1)
    if started != seen:
        raise InputError(
            f"the launcher started {started} processes, but this one sees {seen}: each would train alone. "
            f"Launch with {_LAUNCH}, and make no accelerate state before distill's"
        )
    if seen == 1:
        check_launch()
    here = get_int_from_env(["LOCAL_WORLD_SIZE"], 1)
    if seen > 1 and not runs_on_cpu() and here > torch.accelerator.device_count():
        raise InputError(
            f"{here} processes were started on a machine with {torch.accelerator.device_count()} GPU(s); "
            "each needs its own: say fewer with --num_processes"
        )


def check_launch() -> None:
    """Refuse what accelerate does without a word: start one process instead of several, or leave out FSDP.

    Raises:
        InputError: the launcher's variables say that it did.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and runs_on_cpu():
        raise InputError("FSDP needs GPUs, and would be left out on a CPU; use accelerate_configs/multi_cpu.yaml there")
    is_single = (
        "ACCELERATE_USE_CPU" in os.environ and "LOCAL_RANK" not in os.environ
    )  # only its simple launcher does so
    if is_single and "MASTER_ADDR" in os.environ:  # where they would meet
        raise InputError(
            "accelerate was asked for several processes, but started one (`--cpu --num_processes N` and "
            f"`distributed_type: MULTI_CPU` do that without MPI). Launch with {_LAUNCH}; if one process is meant, "
            "say `--num_processes 1` and unset MASTER_ADDR"
        )


def on_main_process(work: Callable[[], Result]) -> Result | None:
    """Do work on the main process while the others wait, however long it takes.

    Returns:
        On the main process what `work` returns, on the others None.

    Raises:
        MainProcessFailed: on the others, where `work` raised; the main process raises what it raised.
    """
    state = process_state()
    if state.num_processes == 1:
        return work()
    result = None
    failed = torch.zeros(1)
    if state.is_main_process:
        try:
            result = work()
        except Exception:
            torch.distributed.broadcast(failed.fill_(1), src=0, group=_waiting_group())
            raise
    torch.distributed.broadcast(failed, src=0, group=_waiting_group())
    if failed.item():
        raise MainProcessFailed("the main process stopped with an error; what it said stands in its output")
    return result


def wait_for_everyone() -> None:
    """Return when all processes have come here, however long that takes."""
    if process_state().num_processes > 1:
        torch.distributed.barrier(group=_waiting_group())


@cache
def _waiting_group() -> torch.distributed.ProcessGroup:
    """All processes, to wait in: by gloo, and longer than their other collectives, which stop a run that hangs."""
    return torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WORK)
