"""GLUE's table: the models of many runs by task, with their averages, as markdown, json and csv."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distill.common.markdown import escaped, table
from distill.common.records import ModelEntry, Report
from distill.common.serialized import json_text

NAMES = {
    **{"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI"},
    **{"qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"},
}
"""As GLUE writes its tasks, in the order of its table."""

METRICS = {
    **dict.fromkeys(NAMES, ("accuracy",)),
    "cola": ("matthews_correlation",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy", "accuracy_mm"),
}
"""GLUE's own for each task; a task's score is their mean (Wang et al. 2018, section 3)."""

_SHORT = {
    **{"matthews_correlation": "Mcc", "accuracy": "acc", "f1": "F1", "pearson": "Pearson", "spearmanr": "Spearman"},
    "accuracy_mm": "mm",
}


Models = dict[tuple[str, int], ModelEntry]
"""One model's entries of report.json, by task and seed."""


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    deviation: float | None
    """Of the sample (divided by n − 1); None of one seed."""
    values: list[float]

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Row:
    """One model of the table; scores are times 100, as GLUE shows them."""

    name: str
    tasks: dict[str, dict[str, Spread]]
    average: Spread | None
    """Mean of the tasks' scores (GLUE's macro average), over the tasks that every model has from every seed."""
    average_without_wnli: Spread | None
    retention: float | None
    """The average over the baseline's."""
    num_parameters: int
    size_on_disk_bytes: int | None
    speed_up: float | None
    """Median over the runs of the baseline's latency over this model's."""
    throughput_ratio: float | None
    """Median over the runs of this model's rows per second over the baseline's."""


@dataclass(frozen=True)
class Leaderboard:
    """The table, and what a reader must know of it."""

    baseline: str
    tasks: list[str]
    averaged_tasks: list[str]
    seeds: list[int]
    rows: list[Row]
    notes: list[str]


def make_leaderboard(
    reports: Mapping[tuple[str, int], Report], tasks: Sequence[str], seeds: Sequence[int]
) -> Leaderboard:
    """Set the models of many runs side by side.

    Args:
        reports: of each (task, seed); one that is missing has failed.
        tasks: all that were asked for.
        seeds: likewise.
    """
    tasks = [task for task in NAMES if task in tasks]
    found: dict[str, Models] = {}
    for (task, seed), report in reports.items():
        for model in report.models:
            found.setdefault(model.name, {})[task, seed] = model
    runs = [(task, seed) for task in tasks for seed in seeds]
    whole = [
        task for task in tasks if all(_scores(models, task, [seed]) for models in found.values() for seed in seeds)
    ]
    baseline = next((report.baseline for report in reports.values()), "")
    best = _average(found[baseline], whole, seeds) if baseline in found else None
    rows = []
    for name, models in found.items():
        average = _average(models, whole, seeds)
        pairs = [(model, found[baseline][run]) for run, model in models.items() if run in found.get(baseline, {})]
        sizes = [model.size_on_disk_bytes for model in models.values() if model.size_on_disk_bytes]
        row = Row(
            name=name,
            tasks={task: _scores(models, task, seeds) for task in dict.fromkeys(task for task, _ in models)},
            average=average,
            average_without_wnli=_average(models, [task for task in whole if task != "wnli"], seeds),
            retention=average.mean / best.mean if average and best and best.mean > 0 else None,
            num_parameters=int(statistics.median(model.num_parameters for model in models.values())),
            size_on_disk_bytes=int(statistics.median(sizes)) if sizes else None,
            speed_up=_median([base.latency_ms.p50 / model.latency_ms.p50 for model, base in pairs]),
            throughput_ratio=_median(
                [model.throughput_samples_per_second / base.throughput_samples_per_second for model, base in pairs]
            ),
        )
        rows.append(row)
    failed = [f"{NAMES[task]}, seed {seed}" for task, seed in runs if (task, seed) not in reports]
    notes = [f"Failed: {'; '.join(failed)}."] if failed else []
    if len(whole) < len(tasks):
        notes.append(f"The average is over {', '.join(NAMES[task] for task in whole) or 'no task'}.")
    if any("accuracy_mm" not in row.tasks["mnli"] for row in rows if "mnli" in row.tasks):
        notes.append("MNLI: there were no mismatched rows, so its score is that of the matched ones.")
    return Leaderboard(baseline, tasks, whole, list(seeds), rows, notes)


def _median(ratios: list[float]) -> float | None:
    return statistics.median(ratios) if ratios else None


def _scores(models: Models, task: str, seeds: Sequence[int]) -> dict[str, Spread]:
    """The task's metrics that were measured (MNLI's mismatched rows may be missing), and are numbers."""
    measured = [models[task, seed].metrics for seed in seeds if (task, seed) in models]
    found = {}
    for metric in METRICS[task]:
        values = [metrics.get(metric) for metrics in measured]
        numbers = [100 * value for value in values if value is not None]
        if numbers and len(numbers) == len(values):
            found[metric] = _spread(numbers)
    return found


def _average(models: Models, tasks: Sequence[str], seeds: Sequence[int]) -> Spread | None:
    """Of each seed the mean of the tasks' scores, and its spread."""
    if not tasks:
        return None
    of_seeds = []
    for seed in seeds:
        scores = [_scores(models, task, [seed]).values() for task in tasks]
        of_seeds.append(statistics.fmean(statistics.fmean(each.mean for each in metrics) for metrics in scores))
    return _spread(of_seeds)


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, values)


# --- showing --------------------------------------------------------------------------------------------------------


def as_json(board: Leaderboard) -> str:
    """Everything, every seed's value too."""
    return json_text({"schema": 1, **asdict(board)}) + "\n"


def as_markdown(board: Leaderboard, *more: str) -> str:
    """The table people know, and the notes; `more` notes come after it."""
    header = ["model", *(_header(board, task) for task in board.tasks), "average"]
    header += ["average without WNLI"] * ("wnli" in board.averaged_tasks)
    header += ["retention", "params", "MB on disk", "speed-up, 1 row", "32 rows"]
    lines = [header]
    for row in board.rows:
        cells = [row.name, *(_cell(row.tasks.get(task)) for task in board.tasks), _shown(row.average)]
        cells += [_shown(row.average_without_wnli)] * ("wnli" in board.averaged_tasks)
        cells += ["–" if row.retention is None else f"{row.retention:.3f}", f"{row.num_parameters / 1e6:.1f} M"]
        cells += ["–" if row.size_on_disk_bytes is None else f"{row.size_on_disk_bytes / 1e6:.1f}"]
        ratios = ("–" if ratio is None else f"{ratio:.2f}×" for ratio in (row.speed_up, row.throughput_ratio))
        lines.append([*cells, *ratios])
    seeds = f"seed {board.seeds[0]}" if len(board.seeds) == 1 else f"mean ± deviation over seeds {board.seeds}"
    baseline = escaped(board.baseline)
    about = (
        f"GLUE's own metrics × 100 on the validation rows, {seeds}; the average is the mean of the tasks' scores, "
        f"retention that average over {baseline}'s, speed-up the time of {baseline} over the model's."
    )
    return "\n\n".join([table(lines), about, *map(escaped, (*board.notes, *more))]) + "\n"


def as_csv(board: Leaderboard) -> str:
    """One line per model; of every number its mean, and its deviation where there are several seeds."""
    lines = []
    for row in board.rows:
        line: dict[str, Any] = {"model": row.name}
        spreads = {
            f"{task}.{metric}": spread for task, metrics in row.tasks.items() for metric, spread in metrics.items()
        }
        averages = {"average": row.average, "average_without_wnli": row.average_without_wnli}
        for name, spread in {**spreads, **averages}.items():
            line[name] = None if spread is None else round(spread.mean, 3)
            if len(board.seeds) > 1:
                deviation = spread.deviation if spread is not None else None
                line[f"{name}.deviation"] = None if deviation is None else round(deviation, 3)
        for name in ("retention", "num_parameters", "size_on_disk_bytes", "speed_up", "throughput_ratio"):
            line[name] = getattr(row, name)
        lines.append(line)
    columns = list(dict.fromkeys(name for line in lines for name in line))
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def _header(board: Leaderboard, task: str) -> str:
    measured = next((row.tasks[task] for row in board.rows if task in row.tasks), dict.fromkeys(METRICS[task]))
    short = ["m" if task == "mnli" and metric == "accuracy" else _SHORT[metric] for metric in measured]
    return f"{NAMES[task]} ({'/'.join(short)})"


def _cell(metrics: Mapping[str, Spread] | None) -> str:
    return "–" if metrics is None else " / ".join(map(str, metrics.values()))


def _shown(spread: Spread | None) -> str:
    return "–" if spread is None else str(spread)
