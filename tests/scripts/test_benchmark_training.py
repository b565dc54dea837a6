"""The training benchmark runs, and its last line is the JSON object that tools read."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import tiny_bert


def test_the_benchmark_measures_every_variant(tmp_path, tokenizer, sst2_folder):
    tokenizer.save_pretrained(tmp_path)
    tiny_bert().save_pretrained(tmp_path)
    script = Path(__file__).parents[2] / "scripts" / "benchmark_training.py"
    command = [sys.executable, str(script), "--rounds", "1", "--batches", "3", "--hidden-size", "32"]
    command += [
        "--teacher-layers",
        "2",
        "--student-layers",
        "1",
        "--data",
        str(sst2_folder),
        "--tokenizer",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rates = found["rows_per_second"]
    assert list(rates) == [
        "usual_pad128", "usual_dynamic", "student_only", "live", "cached_logits", "cached_hidden", "hand_written",
        "textbrewer",
    ]  # fmt: skip
    assert all(rate > 0 for name, rate in rates.items() if name != "textbrewer")
    assert found["threads"] >= 1
    assert found["cache"]["build"] > 0
    refused = subprocess.run(
        [*command[:-4], "--data", str(tmp_path / "nothing")], capture_output=True, text=True, check=False, timeout=300
    )
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
