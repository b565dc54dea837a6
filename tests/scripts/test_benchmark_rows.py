"""A large corpus takes the memory of a small one, and is tokenized as fast as its tokenizer can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_rows.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no RssAnon on this system")
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(form):
    command = [sys.executable, str(SCRIPT), "--rows", "10000", "200000", "--format", form]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout.splitlines()[-1])["rows"].values()
    for peak in ("check_peak_anonymous_mb", "run_peak_anonymous_mb"):
        assert 100 < many[peak] < 1.1 * few[peak]
    assert many["ratio"] > 0.8  # 0.9 and more where nothing else runs
