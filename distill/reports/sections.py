"""What report.md and a terminal say of fidelity: flips, calibration, slices that lost more, contamination."""

from distill.common.markdown import bullets, escaped, table
from distill.common.records import ModelEntry, Report, Slice

LEVEL = 0.05
"""Of a slice's p-value, below which it is told."""


def fidelity_sections(report: Report) -> list[str]:
    """Paragraphs of report.md; no row's text stands in them, as cards show them too."""
    found = []
    rows = fidelity_rows(report)
    if rows:
        baseline = escaped(report.baseline)
        found += [
            f"Rows that {baseline} gets wrong and a model right (gained), and the other way round (lost), with "
            "McNemar's exact p; calibration error (ECE, 15 bins of as many predictions each, 95 % interval), Brier "
            "score and likelihood (NLL, nats) of the probabilities; the temperature that mends them, and what it takes "
            "off the NLL of the half of the rows that it was not fitted on.",
            table(rows),
        ]
    judged = next((model.calibration.rows for model in report.models if model.calibration), None)
    if judged:
        found.append(f"Calibration is of the {judged:,} rows that no model's temperature was fitted on.")
    lines = slice_lines(report)
    if lines:
        found.append(
            f"Slices that lost more than the other rows (permutation test, Holm's correction):\n\n{bullets(lines)}"
        )
    elif report.slices:
        found.append(f"On none of {len(report.slices)} slices did a model lose more than on the other rows.")
    found += [f"{escaped(line)}." for line in contamination_lines(report)]
    return found


def cost_sections(report: Report) -> list[str]:
    """Paragraphs of report.md: what a million predictions cost, joules and the bytes of a fleet, where these are known.

    Args:
        report: whose recipe may say a price and a fleet.
    """
    rows = cost_rows(report)
    return [f"{cost_sentence(report)}.", *([table(rows)] if rows else [])]


def cost_sentence(report: Report) -> str:
    """What the numbers of `cost_rows` are, and whether energy was measured.

    Args:
        report: whose recipe may say a price and a fleet.
    """
    said = []
    if report.price_per_hour is not None:
        price = f"a million predictions at {report.price_per_hour:g} an hour for this machine, busy with nothing else"
        said.append(f"{price}, by so many rows at a time")
    if report.fleet is not None:
        said.append(f"gigabytes of weight files to {report.fleet:,} devices together")
    if _of_energy(report):
        said.append("joules of the whole chip for a row in a batch")
    else:
        said.append("energy not measured, as no counter of it can be read here")
    return f"Cost: {'; '.join(said)}"


def cost_rows(report: Report) -> list[list[str]]:
    """A header and one row per model; nothing where neither price nor fleet is said and no energy was measured.

    Args:
        report: whose recipe may say a price and a fleet.
    """
    batches = list(report.models[0].cost_per_million or {})
    header = ["model", *(f"per million by {rows}" for rows in batches)]
    header += ["joules"] * _of_energy(report) + ["fleet GB"] * (report.fleet is not None)
    if len(header) == 1:
        return []
    rows = [header]
    for model in report.models:
        row = [model.name, *(f"{(model.cost_per_million or {})[each]:.2f}" for each in batches)]
        row += [_number(model.joules_per_sample)] * _of_energy(report)
        gigabytes = None if model.fleet_bytes is None else model.fleet_bytes / 1e9
        rows.append([*row, *[_number(gigabytes, ",.2f")] * (report.fleet is not None)])
    return rows


def _of_energy(report: Report) -> bool:
    return any(model.joules_per_sample for model in report.models)


def slice_lines(report: Report) -> list[str]:
    """One sentence for each model and slice on which it lost more than elsewhere, the surest first."""
    surest = sorted(
        ((p, number, model) for number, each in enumerate(report.slices or ()) for model, p in each.p.items()),
    )
    return [_slice_line(report, (report.slices or [])[number], model, p) for p, number, model in surest if p < LEVEL]


def contamination_lines(report: Report) -> list[str]:
    """How many rows of each scored split were trained on, and what the metric is without them."""
    found = report.contamination
    if found is None:
        return []
    lines = []
    for split, counts in found.splits.items():
        touched = (counts["exact"] or 0) + (counts["near"] or 0)
        near = "near ones were not looked for" if counts["near"] is None else f"{counts['near']} nearly the same"
        if touched:
            said = f"{counts['exact']} the same, {near}"
            lines.append(f"{touched:,} of {counts['rows']:,} {split} rows are among the rows trained on ({said})")
    known = {model: value for model, value in found.metrics_without.items() if value is not None}
    if found.exact + (found.near or 0) and known:
        without = ", ".join(f"{model} {value:.4f}" for model, value in known.items())
        lines[0] += f"; {report.metric.replace('_', ' ')} without them: {without}"
    return lines


def _slice_line(report: Report, found: Slice, model: str, p: float) -> str:
    values = [found.metrics[name] for name in (model, report.baseline)]
    here, there = ("no number" if value is None else f"{value:.4f}" for value in values)
    low, high = found.intervals[model]
    interval = "" if low is None or high is None else f" ({low:.3f}–{high:.3f})"
    where = f"{found.by.replace('_', ' ')} {found.slice}"
    return (
        f"{model}: lost more where {where} ({found.rows:,} rows): {found.metric.replace('_', ' ')} {here}{interval} "
        f"against {report.baseline}'s {there}, p = {p_value(p)}"
    )


def fidelity_rows(report: Report) -> list[list[str]]:
    """A header and one row per model; nothing where neither flips nor probabilities are known of any."""
    header = ["model", "gained", "lost", "p", "ECE", "95 % interval", "Brier", "NLL", "temperature", "NLL taken off"]
    known = [model for model in report.models if model.flips or model.calibration]
    return [header, *map(_fidelity_row, known)] if known else []


def _fidelity_row(model: ModelEntry) -> list[str]:
    flips, found = model.flips, model.calibration
    row = [model.name, *(["–"] * 3 if flips is None else [str(flips.gained), str(flips.lost), p_value(flips.p)])]
    if found is None:
        return row + ["–"] * 6
    held_out = found.held_out or {}
    gain = [held_out.get(f"nll_gain{bound}") for bound in ("", "_low", "_high")]
    return [
        *row,
        _number(found.ece),
        "–" if None in found.interval else "–".join(f"{bound:.3f}" for bound in found.interval),
        _number(found.brier),
        _number(found.nll),
        _number(found.temperature, ".2f"),
        "–" if None in gain else f"{gain[0]:.4f} ({gain[1]:.4f} to {gain[2]:.4f})",
    ]


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def p_value(value: float) -> str:
    """Write a p-value with three digits."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
