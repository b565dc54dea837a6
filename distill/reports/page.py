"""report.html: the report as one page without network, of at most 1 MB, whatever names and texts stand in it."""

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill.common.console import visible
from distill.common.records import ModelEntry, Report, Slice
from distill.common.serialized import json_text
from distill.reports.envelope import envelope_lines, never_picked
from distill.reports.presentation import comparison_lines, metric_name, remarks, table_rows, units
from distill.reports.sections import (
    LEVEL,
    contamination_lines,
    cost_rows,
    cost_sentence,
    fidelity_rows,
    p_value,
    slice_lines,
)
from distill.tasks.base import is_better_lower

# What nobody reads ten thousand of; report.json has all of it. Together they keep the page below 1 MB.
_MODELS = 60
_SLICES, _CELLS = 60, 1500
_LINES = 30  # of a list of sentences
_DIAGRAMS = 24
_EXAMPLES = 10
_NAME = 120  # characters
_TEXT = 1000
_WORST = 200_000  # bytes
_RECIPE = 60_000  # bytes

_TEMPLATES = Path(__file__).parent / "templates"


def as_html(report: Report, *, title: str, rows: int, recipe: str = "", notes: Sequence[str] = ()) -> str:
    """Write the text of report.html.

    Args:
        report: of a run.
        title: the run's name.
        rows: scored ones, of the first validation split.
        recipe: the text of recipe.yaml; without one it is not shown.
        notes: on the data.
    """
    pale = never_picked(report)
    models = report.models[:_MODELS]
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
    )
    worst = _worst_rows(report)
    fidelity = fidelity_rows(report)[: _MODELS + 1]
    versions = "\n".join(f"{key} {value}" for key, value in report.environment.items() if key != "benchmark")
    blocks = [("recipe", _within(recipe, _RECIPE)), ("versions", _cut(versions, 4000))]
    return environment.get_template("report.html").render(
        title=_cut(title),
        lead=_lead(report, rows),
        about_table=f"Measured {units(report)}. Retention, agreement and divergence are against "
        f"{_cut(report.baseline)}. Pale: models that no limit of size or latency would choose.",
        columns=[_cut(each) for each in _columns(report)],
        rows=_table(report, models, pale),
        left_out=len(report.models) - len(models),
        cost=cost_sentence(report),
        remarks=_some([*comparison_lines(report), *remarks(report)]),
        metric=metric_name(report),
        envelope=[_cut(each, 2 * _TEXT) for each in envelope_lines(report)][:_LINES],
        baseline=_cut(report.baseline),
        flips=_flips(models),
        calibration=_diagrams(models),
        fidelity=[[_cut(cell) for cell in row] for row in fidelity],
        slices=_slices(report),
        worst=list(worst),
        contamination=_contamination(report),
        notes=_some(notes),
        blocks=[{"name": name, "text": text} for name, text in blocks if text],
        data=_safe_json(_data(report, models, pale, worst)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _lead(report: Report, rows: int) -> str:
    baseline = report.entry(report.baseline)
    said = f"{len(report.models)} models on {rows:,} validation rows of {report.task}."
    if baseline is None or baseline.metrics[report.metric] is None:
        return said
    score = f"{metric_name(report)} {baseline.metrics[report.metric]:.4f}"
    bounds = "–".join(f"{bound:.3f}" for bound in baseline.interval if bound is not None)
    interval = f" (95 % interval {bounds})" if bounds else ""
    return f"{said} The baseline, {_cut(report.baseline)}, has {score}{interval}."


# --- models -----------------------------------------------------------------------------------------------------------


def _columns(report: Report) -> list[str]:
    costs = cost_rows(report)
    return [*table_rows(report)[0], *(costs[0][1:] if costs else [])]


def _table(report: Report, models: Sequence[ModelEntry], pale: dict[str, str | None]) -> list[dict[str, Any]]:
    costs = cost_rows(report)
    known = [bound for model in models for bound in model.interval if bound is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    found = []
    for number, (model, cells) in enumerate(zip(models, table_rows(report)[1:], strict=False)):
        made = " ← ".join(_cut(part) for part in (model.run, *model.parents[:1]) if part)
        found.append(
            {
                "number": number,
                "cells": [_cut(cell) for cell in [*cells, *(costs[number + 1][1:] if costs else [])]],
                "made": "baseline" if model.name == report.baseline else made,
                "pale": model.name in pale,
                "whisker": _whisker(model, report.metric, low, (high - low) or 1.0),
            }
        )
    return found


def _whisker(model: ModelEntry, metric: str, low: float, width: float) -> Markup:
    """The metric and its interval, drawn to the scale of the others'."""
    score = model.metrics[metric]
    if score is None or None in model.interval:
        return Markup("")
    start, end, at = (f"{100 * (value - low) / width:.1f}" for value in (*model.interval, score) if value is not None)
    return Markup(
        f'<svg class="whisker" aria-hidden="true"><line x1="{start}%" x2="{end}%" y1="4" y2="4"/>'
        f'<circle cx="{at}%" cy="4" r="2.6"/></svg>'
    )


def _data(
    report: Report, models: Sequence[ModelEntry], pale: dict[str, str | None], worst: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "metric": metric_name(report),
        "lower": is_better_lower(report.metric),
        "baseline": _cut(report.baseline),
        "models": [
            {
                "number": number,
                "name": _cut(model.name),
                "score": model.metrics[report.metric],
                "low": model.interval[0],
                "high": model.interval[1],
                "mb": None if model.size_on_disk_bytes is None else model.size_on_disk_bytes / 1e6,
                "ms": model.latency_ms.p50,
                "pale": model.name in pale,
                "baseline": model.name == report.baseline,
            }
            for number, model in enumerate(models)
        ],
        "worst": worst,
    }


# --- fidelity ---------------------------------------------------------------------------------------------------------


def _flips(models: Sequence[ModelEntry]) -> list[dict[str, Any]]:
    known = [(model.name, model.flips) for model in models if model.flips is not None]
    most = max((max(flips.gained, flips.lost) for _, flips in known), default=0) or 1
    return [
        {
            "name": _cut(name),
            "lost": flips.lost,
            "gained": flips.gained,
            "lost_share": f"{70 * flips.lost / most:.1f}",
            "gained_share": f"{70 * flips.gained / most:.1f}",
            "p": p_value(flips.p),
            "sure": flips.p < LEVEL,
        }
        for name, flips in known
    ]


def _diagrams(models: Sequence[ModelEntry]) -> list[dict[str, Any]]:
    """Reliability diagrams, all to one scale, which ends at 1."""
    known = [(model.name, model.calibration) for model in models if model.calibration is not None][:_DIAGRAMS]
    lowest = min((min(confidence, right) for _, each in known for confidence, right, _ in each.bins), default=0.0)
    least = min(math.floor(10 * lowest) / 10, 0.9)

    def placed(share: float) -> float:
        return round(100 * (share - least) / (1 - least), 1)

    found = []
    for name, each in known:
        held_out = each.held_out or {}
        before, after = held_out.get("ece"), held_out.get("ece_mended")
        error = "" if each.ece is None else f"ECE {each.ece:.3f}"
        found.append(
            {
                "name": _cut(name),
                "least": f"{least:.1f}",
                "bins": [
                    {"x": placed(sure), "y": round(100 - placed(right), 1), "ideal": round(100 - placed(sure), 1)}
                    for sure, right, _ in each.bins
                ],
                "error": error if before is None or after is None else f"ECE {before:.3f} → {after:.3f}",
                "temperature": "" if each.temperature is None else f"T {each.temperature:.2f}",
            }
        )
    return found


def _slices(report: Report) -> dict[str, Any] | None:
    if not report.slices:
        return None
    models = [report.baseline, *(each.name for each in report.models if each.name != report.baseline)][:_MODELS]
    surest = sorted(report.slices, key=lambda each: min(each.p.values(), default=1.0))
    some = {id(each) for each in surest[: min(_SLICES, _CELLS // len(models))]}
    shown = [each for each in report.slices if id(each) in some]
    return {
        "metric": shown[0].metric.replace("_", " ").capitalize(),
        "said": _some(slice_lines(report)),
        "number": len(report.slices),
        "columns": ["slice", "rows", *map(_cut, models)],
        "rows": [
            {
                "name": _cut(each.slice),
                "by": _cut(each.by.replace("_", " ")),
                "cells": [{"text": f"{each.rows:,}", "sure": False}, *_slice_cells(each, models, report.baseline)],
            }
            for each in shown
        ],
        "left_out": len(report.slices) - len(shown),
    }


def _slice_cells(found: Slice, models: Sequence[str], baseline: str) -> list[dict[str, Any]]:
    """The baseline's metric, and what each other model has more."""
    of_baseline, cells = found.metrics.get(baseline), []
    for name in models:
        value, p = found.metrics.get(name), found.p.get(name)
        if value is None:
            text = "–"
        elif name == baseline or of_baseline is None:
            text = f"{value:.4f}"
        else:
            text = f"{value - of_baseline:+.4f}".replace("-", "−") if value != of_baseline else "0"
        cells.append({"text": text, "sure": p is not None and p < LEVEL})
    return cells


def _worst_rows(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The farthest rows of each model, as many of every model as fit."""
    of_models: dict[str, list[dict[str, Any]]] = {}
    for each in report.worst_rows or ():
        of_models.setdefault(each["model"], []).append(each)
    names = list(of_models)[:_MODELS]
    # Where the predictions are the labels wherever they are right, this says so of the model's, too.
    rights = [(each["baseline_right"], each["label"] == each["baseline"]) for name in names for each in of_models[name]]
    by_label = all(right == alike for right, alike in rights)
    found: dict[str, list[dict[str, Any]]] = {}
    left = _WORST
    for rank in range(max((len(of_models[name]) for name in names), default=0)):
        for name in names:
            if rank >= len(of_models[name]):
                continue
            each = of_models[name][rank]
            divergence = each["divergence"]
            row = {
                "row": each["row"],
                "text": [_cut(text, _TEXT) for text in (each["text"] or ())[:4]],
                "label": _shown(each["label"]),
                "baseline": _shown(each["baseline"]),
                "prediction": _shown(each["prediction"]),
                "right": each["baseline_right"],
                "correct": each["label"] == each["prediction"] if by_label else None,
                "divergence": None if divergence is None else f"{divergence:.4f}",
            }
            left -= len(_safe_json(row).encode())
            if left > 0:
                found.setdefault(_cut(name), []).append(row)
    return found


def _contamination(report: Report) -> dict[str, Any] | None:
    found = report.contamination
    if found is None:
        return None
    without = [(model, value) for model, value in (found.metrics_without or {}).items() if value is not None]
    touched = (found.exact or 0) + (found.near or 0)
    examples = [
        {
            "scored": f"{each['split']} row {each['row']}",
            "trained": f"{each['trained_split']} row {each['trained_row']}, similarity {each['similarity']:.2f}",
            "text": _cut("\n".join(map(str, each["text"])), _TEXT // 2),
            "trained_text": _cut("\n".join(map(str, each["trained_text"])), _TEXT // 2),
        }
        for each in (found.examples or [])[:_EXAMPLES]
    ]
    rows = []
    for model, value in without[:_MODELS] if touched else []:
        entry = report.entry(model)
        whole = None if entry is None else entry.metrics[report.metric]
        rows.append([_cut(model), "–" if whole is None else f"{whole:.4f}", f"{value:.4f}"])
    return {
        "said": _some([line.partition(";")[0] for line in contamination_lines(report)]),
        "columns": ["model", f"{metric_name(report)}, all rows", "without these"],
        "rows": rows,
        "examples": examples,
    }


# --- texts ------------------------------------------------------------------------------------------------------------


def _safe_json(content: Any) -> Markup:
    """JSON that may stand in a script element: nothing in it ends one, or begins a comment."""
    text = json_text(content, indent=None)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _cut(text: str, most: int = _NAME) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _within(text: str, most: int) -> str:
    """The beginning of a text whose HTML has at most so many bytes."""
    start = text[:most]
    bytes_of_start = len(str(Markup.escape(visible(start))).encode())
    if len(text) <= most and bytes_of_start <= most:
        return text
    return f"{start[: most * len(start) // max(bytes_of_start, most)]}\n…"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return _cut(value if isinstance(value, str) else json_text(value, indent=None), 300)


def _some(sentences: Sequence[str]) -> list[str]:
    shown = [_cut(each, 4 * _NAME) for each in sentences[:_LINES]]
    return shown + [f"{len(sentences) - _LINES} more are in report.md"] * (len(sentences) > _LINES)
