"""Records for tests that are about a few of their keys."""

from typing import Any

from distill.common.records import ModelEntry, Report
from distill.common.serialized import from_json

_MEASURED = {
    "num_parameters": 1, "size_on_disk_bytes": 4, "memory_bytes": 4, "flops_per_sample": None,
    "latency_ms": {"p50": 1.0, "p95": 1.0}, "throughput_samples_per_second": 1.0,
    "throughput_spread": {"min": 1.0, "max": 1.0}, "device": "cpu",
}  # fmt: skip
_ENTRY = {
    **_MEASURED, "run": "distill", "path": "student", "parents": [], "metrics": {}, "interval": [None, None],
    "retention": None, "agreement": None, "divergence": None, "train_seconds": None, "samples_per_second": None,
}  # fmt: skip


def report_of(content: dict[str, Any]) -> Report:
    """A report with the keys given; the others of it and of its models are something."""
    whole = {"metric": "accuracy", "baseline": "teacher", **content}
    whole["models"] = [{**_ENTRY, **model} for model in content["models"]]
    whole["variants"] = [{**_MEASURED, **variant} for variant in content.get("variants", [])]
    return from_json(Report, whole)


def entry_of(content: dict[str, Any]) -> ModelEntry:
    """A model of a report, likewise."""
    return from_json(ModelEntry, {**_ENTRY, **content})
