"""The report: every model of a run scored and measured side by side, as report.json, report.md and a plot."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from distill.benchmark import as_row, benchmark_models, environment, remarks_on
from distill.card import write_model_card
from distill.console import results
from distill.errors import InputError
from distill.evaluation import Evaluation, evaluate_model
from distill.intervals import agreement, divergence_from, interval_method, paired_difference, won_back
from distill.models import fetch_weights, load_classifier, load_processor
from distill.options import QuantizeOptions
from distill.pipeline import is_finished, write_atomically
from distill.plan import Plan, PlannedStep, code_fingerprint
from distill.records import read_record

_SCORING_CODE = (
    *("readers", "data", "encoding", "masking", "tasks", "metrics", "entities", "questions", "models", "linears"),
    *("embeddings", "quantize", "evaluation", "intervals"),
)
_LOWER_IS_BETTER = ("perplexity",)

_TWO_LINES = {
    "95 % interval": "95 %\ninterval",
    "retention": "reten-\ntion",
    "agreement": "agree-\nment",
    "MB on disk": "MB on\ndisk",
    "MB loaded": "MB\nloaded",
    "train s": "train\ns",
}


def write_report(plan: Plan) -> dict[str, Any]:
    """Score and measure the run's finished models and its baseline, and write report.json, report.md and the plot.

    What was measured before stays valid while models, rows and code are the same: a second report measures nothing.

    Returns:
        The content of report.json (schema 1).

    Raises:
        InputError: no step is finished.
    """
    finished = [name for name, planned in plan.steps.items() if is_finished(planned)]
    if not finished:
        raise InputError(f"{plan.recipe.output_dir}: no step of the recipe is finished there; `distill run` it first")
    names = finished if plan.baseline in plan.steps else [plan.baseline, *finished]
    locations = {name: _location(plan, name) for name in names}
    fingerprints = {name: _model_fingerprint(plan, name) for name in names}
    cache = plan.recipe.output_dir / ".cache"
    cache.mkdir(parents=True, exist_ok=True)

    evaluations = {name: _evaluation(plan, name, locations[name], fingerprints[name], cache) for name in names}
    benchmarks = _benchmarks(plan, locations, fingerprints, cache)
    models = [_entry(plan, name, evaluations, benchmarks[name]) for name in names]
    report = {
        "schema": 1,
        "task": plan.recipe.task or plan.data.task.kind,
        "metric": plan.data.task.primary_metric,
        "environment": environment() | {"benchmark": asdict(plan.recipe.benchmark)},
        "baseline": plan.baseline,
        "models": models,
        "variants": [row for name, row in benchmarks.items() if name not in names],
        "comparisons": _comparisons(plan, evaluations, fingerprints, cache),
        "recoveries": _recoveries(plan, evaluations, benchmarks),
    }
    write_atomically(plan.recipe.output_dir / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _draw(report, plan.recipe.output_dir / "report.png")
    write_atomically(plan.recipe.output_dir / "report.md", _markdown(plan, report))
    for entry in models:
        if entry["name"] in plan.steps:
            folder = plan.steps[entry["name"]].folder
            write_model_card(folder, read_record(folder), report)
    return report


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader must not overlook: compressed models that are no smaller, or slower, than their parent;
    quantized ones that are slower than its plain bfloat16 weights."""
    by_name = {model["name"]: model for model in report["models"]}
    said = []
    for model in report["models"]:
        parent = by_name.get(model["parents"][0]) if model["parents"] else None  # a distill step's is its teacher
        # One of as many parameters was trained on, and not compressed.
        trained_on = parent and model["run"] == "distill" and model["num_parameters"] == parent["num_parameters"]
        if parent is not None and model["run"] != "finetune" and not trained_on:
            said += remarks_on(model, parent, report["variants"])
    return said


def print_report(report: dict[str, Any]) -> None:
    """The report's table and remarks."""
    header, *rows = _rows(report)
    left_out = ("divergence", "params", "GFLOPs")  # so that it fits 80 columns
    shown = [index for index, column in enumerate(header) if column not in left_out]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index in shown:
        table.add_column(
            _TWO_LINES.get(header[index], header[index]), justify="right" if index else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    results.print(table)
    results.print(f"[dim]{_units(report)}[/]")
    for line in _comparison_lines(report):
        results.print(line)
    for remark in remarks(report):
        results.print(f"[yellow]![/] {remark}")


# --- measuring ------------------------------------------------------------------------------------------------------


def _location(plan: Plan, name: str) -> str:
    """The folder that holds a model, with its weights."""
    if name in plan.steps:
        return str(plan.steps[name].folder)
    fetch_weights(plan.sources[name])
    return plan.sources[name].location


def _model_fingerprint(plan: Plan, name: str) -> str:
    if name in plan.steps:
        # The weights of a rerun with --force may differ: its start is part of what it is.
        return f"{plan.steps[name].fingerprint} {read_record(plan.steps[name].folder).get('started')}"
    return plan.sources[name].fingerprint


def _evaluation(plan: Plan, name: str, location: str, fingerprint: str, cache: Path) -> Evaluation:
    file = cache / f"evaluation-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    key = _key(fingerprint, plan.data.fingerprint, [code_fingerprint(module) for module in _SCORING_CODE])
    known = _read_cache(file, key)
    if known is not None:
        return Evaluation(**known)
    model = load_classifier(location, plan.data.task, label_map=None if name in plan.steps else plan.baseline_label_map)
    evaluation = evaluate_model(model, load_processor(location, plan.data.task.kind), plan.data, name=name)
    _write_cache(file, key, asdict(evaluation))
    return evaluation


def _benchmarks(
    plan: Plan, locations: dict[str, str], fingerprints: dict[str, str], cache: Path
) -> dict[str, dict[str, Any]]:
    """All models together in alternating rounds, or none: timings of different runs don't compare."""
    options = plan.recipe.benchmark
    key = _key(fingerprints, asdict(options), environment(), [code_fingerprint("benchmark")])
    known = _read_cache(cache / "benchmark.json", key)
    if known is None:
        quantized = [each for each in plan.steps.values() if each.step.run == "quantize"]
        measured = benchmark_models(
            locations, options, made_from={each.step.name: each.parents[0] for each in quantized}
        )
        known = {name: as_row(name, result) for name, result in measured.items()}
        _write_cache(cache / "benchmark.json", key, known)
    return known


def _comparisons(
    plan: Plan, evaluations: dict[str, Evaluation], fingerprints: dict[str, str], cache: Path
) -> list[dict[str, Any]]:
    """What the first distilled model gained over every other trained one, on the same rows."""
    trained = [name for name in evaluations if name in plan.steps and plan.steps[name].step.run != "quantize"]
    student = next((name for name in trained if plan.steps[name].step.run == "distill"), None)
    if student is None:
        return []
    key = _key(fingerprints, plan.data.fingerprint, [code_fingerprint(module) for module in _SCORING_CODE])
    known = _read_cache(cache / "comparisons.json", key)
    if known is None:
        labels = plan.data.labels(plan.data.task.validation_splits[0][0])
        known = []
        for other in [name for name in trained if name != student]:
            predictions = evaluations[student].predictions, evaluations[other].predictions
            difference, interval = paired_difference(plan.data.task, *predictions, labels)
            known.append({"model": student, "over": other, "difference": difference, "interval": list(interval)})
        _write_cache(cache / "comparisons.json", key, known)
    return known


def _recoveries(
    plan: Plan, evaluations: dict[str, Evaluation], benchmarks: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """What training or mixing formats won back of a plain quantization's divergence from the baseline.

    Each quantized model that more was done to is held against the plainly quantized baseline closest in bytes.
    """
    quantized = [
        name
        for name, planned in plan.steps.items()
        if name in evaluations and getattr(planned.config, "quantization_config", None) is not None
    ]
    plain = [name for name in quantized if _is_plain(plan.steps[name], plan.baseline)]
    found = []
    for name in [each for each in quantized if each not in plain] if plain else []:
        size = benchmarks[name]["size_on_disk_bytes"]
        over = min(plain, key=lambda other: abs(benchmarks[other]["size_on_disk_bytes"] - size))
        logits = [evaluations[each].logits for each in (plan.baseline, over, name)]
        won = won_back(plan.data.task, *(each for each in logits if each is not None)) if all(logits) else None
        if won is not None:
            found.append({"model": name, "over": over, "share": won[0], "interval": won[1]})
    return found


def _is_plain(planned: PlannedStep, baseline: str) -> bool:
    options = planned.step.options
    return isinstance(options, QuantizeOptions) and not options.reads_rows and options.model == baseline


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_cache(file: Path, key: str) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content["value"] if content.get("key") == key else None


def _write_cache(file: Path, key: str, value: Any) -> None:
    write_atomically(file, json.dumps({"key": key, "value": value}))


def _entry(plan: Plan, name: str, evaluations: dict[str, Evaluation], benchmark: dict[str, Any]) -> dict[str, Any]:
    """One model of report.json; every key is there, null where it does not apply."""
    planned = plan.steps.get(name)
    record = read_record(planned.folder) if planned else {}
    evaluation, metric = evaluations[name], plan.data.task.primary_metric
    baseline = evaluations.get(plan.baseline)
    return {
        "name": name,
        "run": planned.step.run if planned else None,
        "path": name,
        "parents": list(planned.parents) if planned else [],
        "metrics": evaluation.metrics,
        "interval": list(evaluation.interval),
        "retention": retention(metric, evaluation.metrics[metric], baseline.metrics[metric]) if baseline else None,
        "agreement": agreement(plan.data.task, evaluation.predictions, baseline.predictions) if baseline else None,
        "divergence": _divergence(plan, evaluation, baseline),
        **{key: value for key, value in benchmark.items() if key != "name"},
        "train_seconds": record.get("train_seconds"),
        "samples_per_second": record.get("samples_per_second"),
    }


def _divergence(plan: Plan, evaluation: Evaluation, baseline: Evaluation | None) -> dict[str, float] | None:
    """From the baseline's predictions; None for kinds with more than one prediction a row."""
    if baseline is None or baseline.logits is None or evaluation.logits is None:
        return None
    return divergence_from(plan.data.task, baseline.logits, evaluation.logits)


def retention(metric: str, value: float, baseline: float) -> float | None:
    """The primary metric over the baseline's (the other way round where lower is better); None for a baseline ≤ 0."""
    if baseline <= 0:
        return None
    if metric in _LOWER_IS_BETTER:
        return baseline / value
    return value / baseline


# --- showing --------------------------------------------------------------------------------------------------------


def _rows(report: dict[str, Any]) -> list[list[str]]:
    """The table of the report: a header and one row per model."""
    header = ["model", report["metric"].replace("_", " "), "95 % interval", "retention", "agreement", "divergence"]
    header += ["params", "MB on disk", "MB loaded", "ms", "rows/s", "GFLOPs", "train s"]
    rows = [header]
    for model in report["models"]:
        row = [
            model["name"],
            f"{model['metrics'][report['metric']]:.4f}",
            "–".join(f"{bound:.3f}" for bound in model["interval"]),
            _shown(model["retention"], ".3f"),
            _shown(model["agreement"], ".3f"),
            _shown((model["divergence"] or {}).get("mean"), ".4f"),
            f"{model['num_parameters'] / 1e6:.1f} M",
            _shown(model["size_on_disk_bytes"], ".1f", 1e-6),
            _shown(model["memory_bytes"], ".1f", 1e-6),
            _shown(model["latency_ms"]["p50"], ".1f"),
            _shown(model["throughput_samples_per_second"], ".1f"),
            _shown(model["flops_per_sample"], ".2f", 1e-9),
            _shown(model["train_seconds"], ".0f"),
        ]
        rows.append(row)
    return rows


def _comparison_lines(report: dict[str, Any]) -> list[str]:
    """One sentence for each comparison."""
    lines = []
    for each in report["comparisons"]:
        low, high = each["interval"]
        verdict = " (a tie)" if low <= 0 <= high else ""
        interval = f"95 % interval {low:+.4f} to {high:+.4f}"
        lines.append(f"{each['model']} − {each['over']}: {each['difference']:+.4f}, {interval}{verdict}")
    return lines + [_recovery_line(each, report["baseline"]) for each in report["recoveries"]]


def _recovery_line(recovery: dict[str, Any], baseline: str) -> str:
    low, high = recovery["interval"]
    verdict = " (a tie)" if low <= 0 <= high else ""
    won = f"{recovery['share']:.0%} of {recovery['over']}'s divergence from {baseline} won back"
    return f"{recovery['model']}: {won}, 95 % interval {low:.0%} to {high:.0%}{verdict}"


def _units(report: dict[str, Any]) -> str:
    bench, device = report["environment"]["benchmark"], report["models"][0]["device"]
    of_images = report["task"] == "image-classification"
    each = "images" if of_images else f"rows of {bench['sequence_length']} tokens"
    return (
        f"on {device}: ms for {bench['latency_batch_size']} and rows/s for {bench['throughput_batch_size']} {each} at "
        "a time (medians)"
    )


def _shown(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else format(value * factor, form)


def _markdown(plan: Plan, report: dict[str, Any]) -> str:
    header, *rows = _rows(report)
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    environment_line = ", ".join(f"{key} {value}" for key, value in report["environment"].items() if key != "benchmark")
    rows_scored = len(plan.data.splits[plan.data.task.validation_splits[0][0]])
    lines = [
        f"# {plan.recipe.path.stem}",
        f"{report['metric'].replace('_', ' ')} on {rows_scored} validation rows, with its 95 % interval "
        f"({interval_method(plan.data.task)}); "
        f"retention, agreement and divergence (KL in nats; of scores the squared difference) are against "
        f"{report['baseline']}; {_units(report)}.",
        "\n".join(f"| {' | '.join(row)} |" for row in table),
        "![accuracy against size and latency](report.png)",
        *(
            [f"On the same rows (paired bootstrap):\n\n{_as_list(_comparison_lines(report))}"]
            if _comparison_lines(report)
            else []
        ),
        _as_list(remarks(report))
        or "No compressed model is larger than the one it was made from, and none more than 5 % slower.",
        *([f"Data: {'; '.join(plan.data.notes)}."] if plan.data.notes else []),
        f"Measured on {report['models'][0]['device']} in alternating rounds, medians: {environment_line}.",
    ]
    return "\n\n".join(lines) + "\n"


def _as_list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _draw(report: dict[str, Any], path: Path) -> None:
    """The metric against bytes and against latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = report["models"]
    panels = [
        ("weights on disk, MB", [(model["size_on_disk_bytes"] or math.nan) / 1e6 for model in models]),
        (f"median latency on {models[0]['device']}, ms", [model["latency_ms"]["p50"] for model in models]),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, (label, values) in zip(axes, panels, strict=True):
        for model, value in zip(models, values, strict=True):
            score = model["metrics"][report["metric"]]
            reach = [[max(score - model["interval"][0], 0)], [max(model["interval"][1] - score, 0)]]
            marker = "*" if model["name"] == report["baseline"] else "o"
            axis.errorbar(value, score, yerr=reach, fmt=marker, markersize=9, capsize=3, elinewidth=1)
            axis.annotate(model["name"], (value, score), xytext=(6, 5), textcoords="offset points", fontsize=9)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.3 * max(value for value in values if not math.isnan(value)) if any(values) else 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{report['metric'].replace('_', ' ')} (95 % interval)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
