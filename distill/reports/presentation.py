"""A report for people: the table, in a terminal and as Markdown, remarks that must not be overlooked, and the plot."""

import math
from pathlib import Path
from typing import Any, BinaryIO

from rich import box
from rich.table import Table

from distill.common.console import remark, results, styled
from distill.common.markdown import bullets, escaped, table
from distill.common.records import Recovery, Report
from distill.data.load import describe_cut
from distill.evaluation.benchmark import remarks_on
from distill.evaluation.intervals import interval_method
from distill.recipes.plan import Plan
from distill.reports.envelope import envelope_lines, never_picked, on_front
from distill.reports.sections import contamination_lines, cost_sections, fidelity_sections, slice_lines
from distill.reports.seeds import seed_lines, seeds_section
from distill.tasks.base import is_better_lower
from distill.tasks.kinds import KINDS
from distill.verbs.all import VERBS

_TWO_LINES = {
    "95 % interval": "95 %\ninterval",
    "retention": "reten-\ntion",
    "agreement": "agree-\nment",
    "MB on disk": "MB on\ndisk",
    "MB loaded": "MB\nloaded",
    "train s": "train\ns",
}


def print_report(report: Report) -> None:
    """Print the report's table and remarks."""
    header, *rows = table_rows(report)
    left_out = ("divergence", "params", "GFLOPs")  # so that it fits 80 columns
    shown = [index for index, column in enumerate(header) if column not in left_out]
    shown_table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index in shown:
        shown_table.add_column(
            _TWO_LINES.get(header[index], header[index]), justify="right" if index else "left", no_wrap=True
        )
    for row in rows:
        shown_table.add_row(*(row[index] for index in shown))
    results.print(shown_table)
    results.print(styled((units(report), "dim")))
    if line := engine_line(report):
        results.print(styled((line, "dim")))
    if is_better_lower(report.metric):
        results.print(styled((metric_name(report), "dim")))
    for line in [*seed_lines(report), *comparison_lines(report)]:
        results.print(line)
    if cut := describe_cut(report.truncated):
        results.print(f"rows {cut}")
    for line in slice_lines(report):
        results.print(line)
    for sentence in (*(f"{each}." for each in contamination_lines(report)), *remarks(report)):
        results.print(remark(sentence))


def as_markdown(plan: Plan, report: Report) -> str:
    """Write the text of report.md.

    Args:
        plan: of the run.
        report: of its finished models.
    """
    environment_line = ", ".join(f"{key} {value}" for key, value in report.environment.items() if key != "benchmark")
    rows_scored = len(plan.data.splits[plan.data.task.validation_splits[0][0]])
    cut = describe_cut(report.truncated)
    lines = [
        f"# {escaped(plan.recipe.output_dir.resolve().name)}",
        f"{metric_name(report)} on {rows_scored} validation rows, with its 95 % interval "
        f"({interval_method(plan.data.task)}); "
        f"retention, agreement and divergence (KL in nats; of scores the squared difference) are against "
        f"{escaped(report.baseline)}; {units(report)}.",
        table(table_rows(report)),
        *([f"{escaped(line)}."] if (line := engine_line(report)) else []),
        "![accuracy against size and latency](report.png)",
        *seeds_section(report),
        *(
            [f"On the same rows (paired bootstrap):\n\n{bullets(comparison_lines(report))}"]
            if comparison_lines(report)
            else []
        ),
        escaped(" ".join(envelope_lines(report))),
        *cost_sections(report),
        *fidelity_sections(report),
        bullets(remarks(report))
        or "No compressed model is larger than the one it was made from, and none more than 5 % slower.",
        *([f"Rows {cut}."] if cut else []),
        *([f"Data: {escaped('; '.join(plan.data.notes))}."] if plan.data.notes else []),
        f"Measured on {report.models[0].device} in alternating rounds, medians: {escaped(environment_line)}.",
    ]
    return "\n\n".join(lines) + "\n"


def draw(report: Report, path: Path | BinaryIO) -> None:
    """Plot the metric against bytes and against latency, as a PNG image.

    A line goes along the front of each; models that no limit would choose are pale.

    Args:
        report: one point for each of its models.
        path: the file to write, or an open one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = report.models
    unpicked = never_picked(report)
    panels = [
        ("weights on disk, MB", [(model.size_on_disk_bytes or math.nan) / 1e6 for model in models]),
        (f"median latency on {models[0].device}, ms", [model.latency_ms.p50 for model in models]),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    panel_labels: list[list[tuple[float, float, str]]] = []
    for axis, (label, values) in zip(axes, panels, strict=True):
        labels = []
        for model, value in zip(models, values, strict=True):
            score, low, high = (
                math.nan if number is None else number for number in (model.metrics[report.metric], *model.interval)
            )
            reach = [[max(score - low, 0)], [max(high - score, 0)]]
            marker = "*" if model.name == report.baseline else "o"
            strength = 0.3 if model.name in unpicked else 1.0
            axis.errorbar(value, score, yerr=reach, fmt=marker, markersize=9, capsize=3, elinewidth=1, alpha=strength)
            if not math.isnan(value + score):
                labels.append((value, score, model.name))
        best = on_front(values, models, report.metric)
        scores = [models[index].metrics[report.metric] for index in best]
        axis.step([values[index] for index in best], scores, where="post", color="grey", linewidth=1, zorder=0)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.3 * max(value for value in values if not math.isnan(value)) if any(values) else 1)
        axis.grid(alpha=0.3)
        axis.margins(y=0.12)
        panel_labels.append(labels)
    figure.draw_without_rendering()  # the scales are known from here on
    for axis, labels in zip(axes, panel_labels, strict=True):
        _write_apart(axis, labels)
    axes[0].set_ylabel(f"{metric_name(report)}, 95 % interval", parse_math=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _write_apart(axis: Any, labels: list[tuple[float, float, str]]) -> None:
    """Write names beside their points (x, y), moved up or down where they would lie on another name."""
    taken: list[tuple[float, float, float]] = []
    pixels_per_point = axis.figure.dpi / 72
    for x, y, name in sorted(labels):
        left, middle = axis.transData.transform((x, y))
        width = 5.5 * pixels_per_point * len(name)

        def is_free(offset: float, left: float = left, middle: float = middle, width: float = width) -> bool:
            at = middle + offset * pixels_per_point
            return all(
                abs(at - other) > 9 * pixels_per_point or left > end or left + width < start
                for start, end, other in taken
            )

        offset = next((each for step in range(12) for each in (5 + 9 * step, 5 - 9 * step) if is_free(each)), 5)
        taken.append((left, left + width, middle + offset * pixels_per_point))
        axis.annotate(name, (x, y), xytext=(6, offset), textcoords="offset points", fontsize=8, parse_math=False)


def remarks(report: Report) -> list[str]:
    """List what a reader must not overlook: compressed models that are no gain over their parent, or over its bf16
    form.
    """
    sentences = []
    for model in report.models:
        parent = report.entry(model.parents[0]) if model.parents else None  # a distill step's is its teacher
        if parent is None or model.run is None:
            continue
        if VERBS[model.run].is_smaller(model.num_parameters, parent.num_parameters):
            sentences += remarks_on(model, parent, report.variants)
    return sentences


def metric_name(report: Report) -> str:
    """Name the primary metric, and which way is better where it is not the usual one."""
    name = report.metric.replace("_", " ")
    return f"{name} (lower is better)" if is_better_lower(report.metric) else name


def table_rows(report: Report) -> list[list[str]]:
    """Make the table of the report: a header and one row per model."""
    header = ["model", report.metric.replace("_", " "), "95 % interval", "retention", "agreement", "divergence"]
    header += ["params", "MB on disk", "MB loaded", "ms", "rows/s", "GFLOPs", "train s"]
    rows = [header]
    for model in report.models:
        row = [
            model.name,
            _shown(model.metrics[report.metric], ".4f"),
            "–" if None in model.interval else "–".join(f"{bound:.3f}" for bound in model.interval),
            _shown(model.retention, ".3f"),
            _shown(model.agreement, ".3f"),
            _shown((model.divergence or {}).get("mean"), ".4f"),
            f"{model.num_parameters / 1e6:.1f} M",
            _shown(model.size_on_disk_bytes, ".1f", 1e-6),
            _shown(model.memory_bytes, ".1f", 1e-6),
            _shown(model.latency_ms.p50, ".1f"),
            _shown(model.throughput_samples_per_second, ".1f"),
            _shown(model.flops_per_sample, ".2f", 1e-9),
            _shown(model.train_seconds, ".0f"),
        ]
        rows.append(row)
    return rows


def comparison_lines(report: Report) -> list[str]:
    """Write one sentence for each comparison."""
    lines = []
    for each in report.comparisons:
        low, high = each.interval
        if each.difference is None or low is None or high is None:
            lines.append(f"{each.model} − {each.over}: no number, as the metric of one of them is none")
            continue
        is_better = (high < 0) if is_better_lower(report.metric) else (low > 0)
        verdict = "a tie" if low <= 0 <= high else "better" if is_better else "worse"
        interval = f"95 % interval {low:+.4f} to {high:+.4f}"
        lines.append(f"{each.model} − {each.over}: {each.difference:+.4f}, {interval} ({verdict})")
    return lines + [_recovery_line(each, report.baseline) for each in report.recoveries]


def _recovery_line(recovery: Recovery, baseline: str) -> str:
    low, high = recovery.interval
    verdict = " (a tie)" if low <= 0 <= high else ""
    won = f"{recovery.share:.0%} of {recovery.over}'s divergence from {baseline} won back"
    return f"{recovery.model}: {won}, 95 % interval {low:.0%} to {high:.0%}{verdict}"


def units(report: Report) -> str:
    """Say on what device, with how many rows and how long ones, latency and throughput were measured."""
    bench, device = report.environment["benchmark"], report.models[0].device
    of_images = report.task in KINDS and KINDS[report.task].reads == "images"
    each = "images" if of_images else f"rows of {bench['sequence_length']} tokens"
    return (
        f"on {device}: ms for {bench['latency_batch_size']} and rows/s for {bench['throughput_batch_size']} {each} at "
        "a time (medians)"
    )


def engine_line(report: Report) -> str:
    """Name the engine of every model, and its threads; nothing where torch computes them all."""
    models: dict[tuple[str, int | None], list[str]] = {}
    for model in report.models:
        models.setdefault((model.engine, model.threads), []).append(model.name)
    if all(engine == "torch" for engine, _ in models):
        return ""
    told = []
    for (engine, threads), names in models.items():
        given = "" if threads is None else f" with {threads} thread{'s' * (threads != 1)}"
        told.append(f"{', '.join(names)} by {engine}{given}")
    return f"computed: {'; '.join(told)}"


def _shown(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else format(value * factor, form)
