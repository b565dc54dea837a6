"""Several runs side by side: one table, plot and page of all their models, each named run/step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill.common.records import Measurement, ModelEntry, Report
from distill.errors import InputError
from distill.evaluation.benchmark import benchmark_models
from distill.evaluation.cost import cost_per_million
from distill.recipes.plan import Plan
from distill.reports.report import FILES, retention, write_files, write_report


def write_side_by_side(plans: Sequence[Plan], folder: Path) -> Report:
    """Report each run by itself, then all of them as one in a folder of its own.

    Scores are those of the runs' own reports. Timings of different runs don't compare, so all models are timed anew, in
    alternating rounds under the first run's `benchmark`. Retention is over the first run's baseline; what hangs on the
    predictions of a baseline (agreement, divergence, flips) is left out of other runs' models, and slices, worst rows
    and contamination stand in the runs' own reports.

    Args:
        plans: of finished runs.
        folder: where report.json, report.md, report.png and report.html go; made if it does not exist.

    Raises:
        InputError: runs of different tasks or scored rows, one run named twice, or a folder that is a run's.
    """
    first, names = plans[0], run_names([plan.recipe.output_dir for plan in plans])
    _check(plans, folder)
    reports = [write_report(plan) for plan in plans]
    locations = {
        f"{name}/{model.name}": _location(plan, model.name)
        for name, plan, report in zip(names, plans, reports, strict=True)
        for model in report.models
    }
    timed = benchmark_models(locations, first.recipe.benchmark)
    baseline = reports[0].entry(reports[0].baseline)
    models = [
        _entry(first, f"{name}/", model, timed[f"{name}/{model.name}"], baseline, is_first=number == 0)
        for number, (name, report) in enumerate(zip(names, reports, strict=True))
        for model in report.models
    ]
    found = replace(
        reports[0],
        baseline=f"{names[0]}/{reports[0].baseline}",
        models=models,
        variants=[],
        comparisons=[
            replace(each, model=f"{name}/{each.model}", over=f"{name}/{each.over}")
            for name, report in zip(names, reports, strict=True)
            for each in report.comparisons
        ],
        recoveries=[],
        slices=None,
        worst_rows=None,
        contamination=None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    recipes = [f"# {name}\n{(plan.recipe.output_dir / 'recipe.yaml').read_text(encoding='utf-8')}" for name, plan in
               zip(names, plans, strict=True)]  # fmt: skip
    shown = replace(first, recipe=replace(first.recipe, output_dir=folder))
    write_files(shown, found, recipe="\n".join(recipes))
    return found


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name runs by the last parts of their folders, as few as tell them apart.

    Args:
        folders: of the runs, all different.
    """
    paths = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-count:]).lstrip("/") for path in paths]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path).lstrip("/") for path in paths]


def _check(plans: Sequence[Plan], folder: Path) -> None:
    """Raise an `InputError` with all that keeps the runs from standing side by side."""
    first, problems = plans[0], []
    if (folder / "recipe.yaml").is_file():
        problems.append(f"{folder}: is a run's folder; say another by --output")
    problems += [f"{folder / file}: is a folder, and the report would be written there" for file in FILES
                 if (folder / file).is_dir()]  # fmt: skip
    seen: set[Path] = set()
    for plan in plans:
        where = plan.recipe.output_dir
        if where.resolve() in seen:
            problems.append(f"{where}: is named twice")
        seen.add(where.resolve())
        of_first, of_this = _task(first), _task(plan)
        if of_this != of_first:
            problems.append(f"{where}: its task is {of_this}, and that of {first.recipe.output_dir} {of_first}; "
                            "runs side by side are of one task")  # fmt: skip
        elif _labels(plan) != _labels(first):
            problems.append(
                f"{where}: its models are scored on other rows than those of {first.recipe.output_dir}, and scores on "
                "other rows don't compare; data with its seed, validation_fraction and max_eval_rows should be the same"
            )
    if problems:
        raise InputError(*problems)


def _task(plan: Plan) -> str:
    task = plan.data.task
    labels = f" of {', '.join(task.label_names)}" if task.label_names else ""
    return f"{task.name} ({task.kind}{labels}, {task.primary_metric.replace('_', ' ')})"


def _labels(plan: Plan) -> list[str]:
    return [str(label) for label in plan.data.labels(plan.data.task.validation_splits[0][0])]


def _location(plan: Plan, name: str) -> str:
    return str(plan.steps[name].folder) if name in plan.steps else plan.sources[name].location


def _entry(
    first: Plan, prefix: str, model: ModelEntry, timed: Measurement, baseline: ModelEntry | None, *, is_first: bool
) -> ModelEntry:
    """A model under its run's name, timed beside all others."""
    metric, options = first.data.task.primary_metric, first.recipe.report
    value, of_baseline = model.metrics[metric], None if baseline is None else baseline.metrics[metric]
    price, fleet, size = options.price_per_hour, options.fleet, timed.size_on_disk_bytes
    return replace(
        model,
        **vars(timed),
        path=f"{prefix}{model.path}",
        parents=[f"{prefix}{parent}" for parent in model.parents],
        retention=None if value is None or of_baseline is None else retention(metric, value, of_baseline),
        cost_per_million=cost_per_million(timed, first.recipe.benchmark, price) if price else None,
        fleet_bytes=size * fleet if size and fleet else None,
        agreement=model.agreement if is_first else None,
        divergence=model.divergence if is_first else None,
        flips=model.flips if is_first else None,
    )
