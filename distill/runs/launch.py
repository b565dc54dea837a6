"""`--accelerate_config NAME` of `distill run` and `check`: `accelerate launch` of the same on every process."""

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from distill.common.console import log, log_errors, remark
from distill.errors import InputError, nearest_name

_TARGET = ("--module", "distill.cli")
_FOLDERS = [Path("accelerate_configs"), Path(__file__).parents[1] / "accelerate_configs"]


def launch(config: str, arguments: list[str], *, num_processes: int | None = None) -> int:
    """Run `distill ARGUMENTS` on every process of a launch configuration.

    Args:
        config: the name of a file in accelerate_configs, or a path.
        arguments: the command and its words.
        num_processes: instead of the configuration's.

    Returns:
        The exit status: 0, or 1 where a process failed; what was saved before is good.

    Raises:
        InputError: no such configuration, or one that accelerate would not start as it says.
    """
    path = find_config(config)
    check_config(path, num_processes)
    launched = load_config_from_file(str(path))
    wants_gpus = launched.distributed_type == DistributedType.MULTI_GPU and not launched.use_cpu
    if wants_gpus and not torch.accelerator.is_available():
        log.print(remark("no GPU here: the processes compute on the CPU"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += [] if num_processes is None else [f"--num_processes={num_processes}"]
    command += [*_TARGET, *arguments]
    status = _run(command)
    if status:
        log_errors(["a process stopped (see above), and with it the others"])
        if arguments[0] == "run":
            log.print("the same command goes on from the last checkpoint")
    return 1 if status else 0


def find_config(name: str) -> Path:
    """Find the file of a launch configuration.

    Raises:
        InputError: none of that name.
    """
    candidates = [Path(name).expanduser(), *(folder / f"{name}.yaml" for folder in _FOLDERS)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        known = [path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")]
        raise InputError(
            f"--accelerate_config: {name} is no file and no known configuration; {nearest_name(name, known)}"
        )
    return found


def check_config(path: Path, num_processes: int | None) -> None:
    """Check that accelerate would start what a launch configuration says.

    Args:
        path: of the configuration.
        num_processes: instead of the configuration's.

    Raises:
        InputError: it can't be read, would start one process instead of several, or needs a package that is missing.
    """
    try:
        config = load_config_from_file(str(path))
    except Exception as error:  # yaml's, and accelerate's for each wrong key
        raise InputError(f"{path}: no launch configuration of accelerate ({' '.join(str(error).split())})") from None
    kind = config.distributed_type
    count = config.num_processes if num_processes is None else num_processes
    one_process = kind in (DistributedType.NO, DistributedType.MULTI_CPU) and not config.mpirun_config
    if one_process and count > 1:
        raise InputError(
            f"{path}: accelerate would start one process, not {count}, for `distributed_type: {kind.value}`; "
            "use multi_cpu or multi_gpu (`distributed_type: MULTI_GPU`, which also starts processes on a CPU)"
        )
    if kind == DistributedType.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise InputError(f"{path}: deepspeed is not installed here; pip install deepspeed, or use multi_gpu or fsdp")


def _run(command: list[str]) -> int:
    """The exit status of a command that gets our signals, and time to end its processes."""
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the launcher too
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
