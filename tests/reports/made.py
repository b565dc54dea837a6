"""Reports for tests of the page: some of it as usual, all of it as bad as can be."""

from distill.common.records import Report
from tests.records import report_of

ODD = '</script><img src=x onerror="window.hacked=1">&amp;'

MODELS = {
    "teacher": (0.95, 90.0, 24.0),
    "student": (0.93, 70.0, 12.0),
    "twin": (0.93, 70.0, 13.0),
    "nf4": (0.92, 15.0, 9.0),
    "int8": (0.91, 18.0, 8.0),
}
"""Metric, MB and ms of each."""


def a_model(name: str, score: float | None, megabytes: float, latency: float, **changes) -> dict:
    interval = [None, None] if score is None else [score - 0.01, score + 0.01]
    return {
        "name": name, "metrics": {"accuracy": score}, "interval": interval, "parents": ["teacher"],
        "size_on_disk_bytes": int(megabytes * 1e6), "latency_ms": {"p50": latency, "p95": latency}, **changes,
    }  # fmt: skip


def a_row(model: str, row: int, text: str, label: str = "a", prediction: str = "b") -> dict:
    return {
        "model": model, "row": row, "text": [text], "label": label, "baseline": label, "prediction": prediction,
        "baseline_right": True, "divergence": 1 / (1 + row),
    }  # fmt: skip


def a_report(names=MODELS, *, odd: str = "", text: str = "", rows: int = 3) -> Report:
    """A report with every section.

    Args:
        names: of its models, with metric, MB and ms.
        odd: stands in every name, label and text.
        text: of every row, beside `odd`.
        rows: worst ones of each model.
    """
    calibration = {
        "ece": 0.1, "interval": [0.09, 0.11], "brier": 0.2, "nll": 0.3, "temperature": 0.5,
        "bins": [[0.5, 0.6, 9.0]] * 15,
        "held_out": {"nll_gain": 0.1, "nll_gain_low": 0.1, "nll_gain_high": 0.1, "ece": 0.12, "ece_mended": 0.02},
    }  # fmt: skip
    flips = {"gained": 3, "lost": 12, "p": 0.035}
    baseline = f"teacher{odd}"
    models = [
        a_model(f"{name}{odd}", *numbers, calibration=calibration, flips=None if name == "teacher" else flips)
        for name, numbers in names.items()
    ]
    others = [model["name"] for model in models if model["name"] != baseline]
    worst = [
        a_row(name, row, f"text {row} of {name} {text}", f"a{odd}", f"b{odd}") for name in others for row in range(rows)
    ]
    pair = {"text": [text + odd], "trained_text": [text + odd], "similarity": 0.9, "split": "validation", "row": 1}
    of_all = {model["name"]: 0.9 for model in models}
    slices = [
        {
            "by": "label", "slice": f"{label}{odd}", "rows": 40, "metric": "accuracy", "metrics": of_all,
            "intervals": {name: [0.8, 1.0] for name in of_all}, "p": dict.fromkeys(others, p),
        }
        for label, p in (("short", 0.01), ("long", 0.5))
    ]  # fmt: skip
    return report_of(
        {
            "models": models, "baseline": baseline, "slices": slices, "worst_rows": worst,
            "task": f"classification{odd}",
            "environment": {
                "torch": f"2.13{odd}",
                "benchmark": {"sequence_length": 8, "latency_batch_size": 1, "throughput_batch_size": 32},
            },
            "contamination": {
                "rows": 100, "exact": 1, "near": 1,
                "examples": [pair | {"trained_split": "train", "trained_row": 2}] * 12,
                "metrics_without": of_all, "splits": {"validation": {"rows": 100, "exact": 1, "near": 1}},
            },
        }
    )  # fmt: skip
