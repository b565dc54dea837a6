import sys
from types import SimpleNamespace

import pytest
import torch

from distill.common.records import Latency
from distill.evaluation import cost
from distill.evaluation.cost import cost_per_million, energy_counter, joules_per_row
from distill.evaluation.options import BenchmarkOptions

CPU = torch.device("cpu")


def test_a_million_rows_cost_the_hours_that_they_take():
    measured = SimpleNamespace(latency_ms=Latency(36.0, 40.0), throughput_samples_per_second=100.0)
    # 36 ms × 10⁶ are 10 hours; 10⁶ rows at 100 a second 2.777… hours.
    found = cost_per_million(measured, BenchmarkOptions(), 0.9)
    assert found == {"1": pytest.approx(9.0), "32": pytest.approx(2.5)}
    options = BenchmarkOptions(latency_batch_size=4, throughput_batch_size=8)
    assert cost_per_million(measured, options, 0.9) == {"4": pytest.approx(2.25), "8": pytest.approx(2.5)}


def package(folder, number, energy, name="package-0", limit=999_999):
    domain = folder / f"intel-rapl:{number}"
    domain.mkdir(parents=True, exist_ok=True)
    for file, content in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", limit)):
        (domain / file).write_text(f"{content}\n")


def test_rapl_counts_every_package_once_and_past_the_counters_end(tmp_path):
    package(tmp_path, 0, 900_000)
    package(tmp_path, 1, 100_000, "package-1")
    package(tmp_path, 2, 0, "psys")
    package(tmp_path, "0:0", 0, "core")
    counter = energy_counter(CPU, tmp_path)
    before = counter()
    package(tmp_path, 0, 100_000)  # 0.2 J later, past its end
    package(tmp_path, 1, 400_000, "package-1")
    package(tmp_path, 2, 777_777, "psys")
    package(tmp_path, "0:0", 55_555, "core")
    assert counter() - before == pytest.approx(0.5)


def test_no_counter_no_number(tmp_path, monkeypatch):
    assert energy_counter(CPU, tmp_path / "none") is None
    package(tmp_path, 0, "secret")  # as one that may not be read
    assert energy_counter(CPU, tmp_path) is None
    assert energy_counter(torch.device("mps"), tmp_path) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # is not installed
    assert cost._nvml_counter("0") is None


def test_nvml_is_asked_for_the_gpu_by_its_uuid(monkeypatch):
    class NVMLError(Exception):
        pass

    def handle(uuid):
        if uuid != "GPU-1234":
            raise NVMLError
        return uuid

    energies = iter([1000, 5000, 8500])
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(energies),  # in millijoules
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert cost._nvml_counter("9") is None
    counter = cost._nvml_counter("1234")
    assert -counter() + counter() == pytest.approx(3.5)


def test_joules_of_a_row_are_those_of_all_calls_over_all_rows(monkeypatch):
    monkeypatch.setattr(cost, "_SECONDS", 0.01)
    spent = [0.0]

    def call():
        spent[0] += 12.0

    assert joules_per_row(call, lambda: spent[0], rows=4, device=CPU) == pytest.approx(3.0)
    assert joules_per_row(call, lambda: 7.0, rows=4, device=CPU) is None
