"""Where models compute: on whatever accelerator torch knows, or on the CPU."""

import pytest
import torch

from distill.common.hardware import (
    accelerator_name,
    compute_device,
    has_bf16,
    wait_for,
)


@pytest.fixture
def on(monkeypatch):
    """Pretend that there is an accelerator of a kind; gives the list of what was waited for."""

    def pretend(kind):
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda *_, **__: torch.device(kind))
        waited = []
        monkeypatch.setattr("torch.accelerator.synchronize", lambda *_: waited.append(kind))
        return waited

    return pretend


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_any_accelerator_is_taken_unless_the_launcher_says_cpu(monkeypatch, on, kind):
    waited = on(kind)
    assert compute_device() == torch.device(kind)
    wait_for(compute_device())
    assert waited == [kind]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert compute_device() == torch.device("cpu")
    wait_for(compute_device())
    assert waited == [kind]


def test_without_an_accelerator_all_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert compute_device() == torch.device("cpu")
    assert accelerator_name() is None


def test_an_accelerator_is_named(monkeypatch, on):
    on("mps")
    assert accelerator_name().endswith("(mps)")
    on("cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "A GPU")
    assert accelerator_name() == "A GPU"


def test_bf16_is_asked_of_the_hardware(monkeypatch):
    for kind in ("cuda", "xpu"):
        for there in (True, False):
            monkeypatch.setattr(f"torch.{kind}.is_bf16_supported", lambda including_emulation, there=there: there)
            assert has_bf16(kind) is there
    assert has_bf16("mps") is False


def test_no_module_chooses_cuda_by_itself(pytestconfig):
    """Only what is known of CUDA alone may name it: bfloat16 here, tensor cores in the trainer."""
    for path in (pytestconfig.rootpath / "distill").rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace("torch.cuda.is_bf16_supported", "")
        assert "torch.cuda" not in text, path
