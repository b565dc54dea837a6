import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import InputError
from distill.processes import check_world_size, process_state


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    with pytest.raises(InputError, match="started 2 processes, but this one sees 1"):
        check_world_size(1)


def test_a_process_alone_is_the_main_one():
    assert process_state().is_main_process
    assert process_state().num_processes == 1


def test_two_cpu_processes_see_each_other(tmp_path):
    """Without an accelerator stock accelerate gives each of them a world of one."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os; from distill.processes import process_state; "
        "open(f'{__file__}.{os.environ[\"RANK\"]}', 'w').write(str(process_state().num_processes))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [Path(f"{script}.{rank}").read_text() for rank in (0, 1)] == ["2", "2"]  # a file each: stdout interleaves
