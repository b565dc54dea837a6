"""What was won back of a plain quantization's divergence, of models that are as large alone."""

import numpy as np
import pytest

from distill.common.records import Latency, Measurement
from distill.evaluation.evaluate import Evaluation
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.recoveries import find_recoveries

STEPS = """
  teacher: {run: finetune, model: MODEL, max_steps: 2}
  student: {run: distill, teacher: teacher, num_layers: 2, max_steps: 2}
  plain: {run: quantize, model: teacher, format: nf4}
  gptq: {run: quantize, model: teacher, format: nf4, gptq: true}
  small: {run: quantize, model: student, format: nf4, gptq: true}
"""


@pytest.mark.parametrize(("parameters", "models"), [(1000, ["gptq", "small"]), (700, ["gptq"])])
def test_a_smaller_model_in_as_many_bytes_is_not_compared(tmp_path, pretrained, sst2_folder, parameters, models):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'run'}\nbaseline: teacher\n"
        f"data: {{path: {sst2_folder}, max_length: 24}}\n"
        f"benchmark: {{sequence_length: 16}}\nsteps:{STEPS.replace('MODEL', str(pretrained))}"
    )
    logits = np.random.default_rng(0).normal(size=(40, 2))
    far = {"teacher": 0.0, "student": 0.3, "plain": 0.4, "gptq": 0.2, "small": 0.1}
    evaluations = {
        name: Evaluation({}, (0, 1), [], (logits + error * np.array([1, -1])).tolist()) for name, error in far.items()
    }
    counts = dict.fromkeys(far, 1000) | {"small": parameters}
    benchmarks = {
        name: Measurement(name, count, 5000, 5000, None, Latency(1.0, 1.0), 1.0, {}, "cpu")
        for name, count in counts.items()
    }
    found = {each.model: each for each in find_recoveries(make_plan(load_recipe(path)), evaluations, benchmarks)}
    assert list(found) == models
    assert found["gptq"].over == "plain"
    assert 0.6 < found["gptq"].share < 0.8  # half of the error, a quarter of the divergence to second order
