"""The report: every model of a run scored and measured side by side, as report.json, report.md, a plot and a page."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.common.console import log, remark
from distill.common.folders import write_atomically
from distill.common.records import (
    Comparison,
    Measurement,
    ModelEntry,
    Pick,
    Report,
    StepRecord,
    read_report,
    read_step,
)
from distill.common.serialized import as_json, finite, from_json
from distill.data.fingerprints import token_fingerprint, tokenizer_fingerprint
from distill.data.load import Truncated
from distill.errors import InputError
from distill.evaluation.benchmark import benchmark_models, environment
from distill.evaluation.contamination import MOST_ROWS, Matches, find_matches, has_minhash
from distill.evaluation.cost import cost_per_million
from distill.evaluation.evaluate import Evaluation, evaluate_model
from distill.evaluation.intervals import (
    agreement,
    divergence_from,
    paired_difference,
)
from distill.evaluation.loading import engine_versions, load_scored
from distill.models.load import fetch_weights, load_processor
from distill.recipes.fingerprint import code_fingerprint
from distill.recipes.finished import is_finished
from distill.recipes.plan import Plan
from distill.reports.fidelity import Fidelity, measure_contamination, measure_fidelity
from distill.reports.page import as_html
from distill.reports.presentation import as_markdown, draw
from distill.reports.recoveries import find_recoveries
from distill.reports.seeds import further_copies, paired_over_seeds, spread_over_seeds
from distill.runs.card import write_model_card
from distill.tasks.base import is_better_lower
from distill.tasks.kinds import KINDS
from distill.verbs.all import VERBS

FILES = ("report.json", "report.md", "report.png", "report.html")


def write_report(plan: Plan, *, pick: Pick | None = None) -> Report:
    """Score and measure the run's finished models and its baseline, and write report.json, report.md, plot and page.

    What was measured before stays valid while models, rows and code are the same: a second report measures nothing.

    Args:
        plan: of the run.
        pick: which of the models `distill compress` has picked; by default what the report that is there says.

    Returns:
        What report.json holds.

    Raises:
        InputError: no step is finished.
    """
    finished = [name for name, planned in plan.steps.items() if is_finished(planned)]
    if not finished:
        raise InputError(f"{plan.recipe.output_dir}: no step of the recipe is finished there; `distill run` it first")
    stale = [name for name, planned in plan.steps.items() if name not in finished and read_step(planned.folder)]
    if stale:
        said = f"left out, as they are not what the recipe would make now: {', '.join(stale)}; "
        log.print(remark(f"{said}`distill run` makes them anew"))
    blocked = [file for file in FILES if (plan.recipe.output_dir / file).is_dir()]
    if blocked:
        raise InputError(f"{plan.recipe.output_dir / blocked[0]}: is a folder, and the report would be written there")
    names = finished if plan.baseline in plan.steps else [plan.baseline, *finished]
    locations = {name: _location(plan, name) for name in names}
    fingerprints = {name: _model_fingerprint(plan, name) for name in names}
    cache = plan.recipe.output_dir / ".cache"
    cache.mkdir(parents=True, exist_ok=True)

    evaluations = {name: _evaluation(plan, name, locations[name], fingerprints[name], cache) for name in names}
    benchmarks = _benchmarks(plan, locations, fingerprints, cache)
    tokens = {name: _predicted_tokens(plan, locations[name]) for name in names}
    fidelity = _fidelity(plan, evaluations, locations, fingerprints, cache)
    models = [_entry(plan, name, evaluations, benchmarks[name], tokens, fidelity) for name in names]
    found = Report(
        task=plan.recipe.task or plan.data.task.kind,
        metric=plan.data.task.primary_metric,
        environment=environment()
        | engine_versions({model.engine for model in models})
        | {"benchmark": asdict(plan.recipe.benchmark)},
        baseline=plan.baseline,
        models=models,
        variants=[each for name, each in benchmarks.items() if name not in names],
        comparisons=_comparisons(plan, evaluations, fingerprints, tokens, cache),
        recoveries=find_recoveries(plan, evaluations, benchmarks),
        truncated=_truncated(models),
        slices=fidelity.slices,
        worst_rows=fidelity.worst_rows,
        contamination=measure_contamination(plan.data, _matches(plan, cache), evaluations),
        price_per_hour=plan.recipe.report.price_per_hour,
        fleet=plan.recipe.report.fleet,
        seeds=spread_over_seeds(plan, evaluations),
        pick=pick or _picked_before(plan),
    )
    report = from_json(Report, finite(asdict(found)))  # a correlation with constant predictions is no number
    recipe = plan.recipe.output_dir / "recipe.yaml"
    write_files(plan, report, recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "")
    for entry in models:
        record = read_step(plan.steps[entry.name].folder) if entry.name in plan.steps else None
        if record is not None:
            write_model_card(plan.steps[entry.name].folder, record, report)
    return report


def _picked_before(plan: Plan) -> Pick | None:
    before = read_report(plan.recipe.output_dir)
    return before.pick if before is not None and before.pick and before.pick.model in plan.steps else None


def write_files(plan: Plan, report: Report, *, recipe: str) -> None:
    """Write a report into the plan's `output_dir`, as each of `FILES`.

    Args:
        plan: of the run.
        report: of its models.
        recipe: text of recipe.yaml, which the page shows.
    """
    folder = plan.recipe.output_dir
    write_atomically(folder / "report.json", as_json(report))
    draw(report, folder / "report.png")
    write_atomically(folder / "report.md", as_markdown(plan, report))
    rows = len(plan.data.splits[plan.data.task.validation_splits[0][0]])
    page = as_html(report, title=folder.resolve().name, rows=rows, recipe=recipe, notes=plan.data.notes)
    write_atomically(folder / "report.html", page)


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
        return f"{plan.steps[name].fingerprint} {_record_of(plan, name).started}"
    return plan.sources[name].fingerprint


def _record_of(plan: Plan, name: str) -> StepRecord:
    """Read a model's step.json; an empty record of a model from outside."""
    return (read_step(plan.steps[name].folder) if name in plan.steps else None) or StepRecord()


def _evaluation(plan: Plan, name: str, location: str, fingerprint: str, cache: Path) -> Evaluation:
    file = cache / f"evaluation-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    processor = load_processor(location, plan.data.task.kind)
    key = _key(
        fingerprint,
        plan.data.fingerprint,
        tokenizer_fingerprint(processor),
        _scored_with(),
        code_fingerprint("evaluation.evaluate"),
    )
    known = _read_cache(file, key)
    if known is not None:
        return Evaluation(**known)
    model = load_scored(location, plan.data.task, label_map=None if name in plan.steps else plan.baseline_label_map)
    evaluation = evaluate_model(model, processor, plan.data, name=name)
    _write_cache(file, key, asdict(evaluation))
    return evaluation


def _predicted_tokens(plan: Plan, location: str) -> str | None:
    """A fingerprint of the tokens that a model predicts; None for kinds that predict something else.

    Predictions of language models with different tokens don't compare, nor do their perplexities: of fewer and longer
    tokens each is harder to predict.
    """
    kind = plan.data.task.kind
    return token_fingerprint(load_processor(location, kind)) if KINDS[kind].targets.over_vocabulary else None


def _scored_with() -> dict[str, Any]:
    """Describe what else a score depends on: the device, and the versions of what computes there."""
    around = environment()
    versions = {package: around[package] for package in ("torch", "transformers", "bitsandbytes", "peft")}
    return versions | engine_versions() | {"device": around["gpu"] or around["cpu"]}


def _benchmarks(
    plan: Plan, locations: dict[str, str], fingerprints: dict[str, str], cache: Path
) -> dict[str, Measurement]:
    """Measure all models together in alternating rounds, or none: timings of different runs don't compare."""
    options = plan.recipe.benchmark
    around = environment() | engine_versions()
    key = _key(fingerprints, asdict(options), around, code_fingerprint("evaluation.benchmark"))
    known = _read_cache(cache / "benchmark.json", key)
    if known is None:
        with_variants = [each for each in plan.steps.values() if VERBS[each.step.run].has_variants]
        made_from = {each.step.name: each.parents[0] for each in with_variants}
        measured = benchmark_models(locations, options, made_from=made_from)
        known = {name: asdict(result) for name, result in measured.items()}
        _write_cache(cache / "benchmark.json", key, known)
    return {name: from_json(Measurement, each) for name, each in known.items()}


def _comparisons(
    plan: Plan,
    evaluations: dict[str, Evaluation],
    fingerprints: dict[str, str],
    tokens: dict[str, str | None],
    cache: Path,
) -> list[Comparison]:
    """What the first distilled model gained over every other trained one, on the same rows."""
    verbs = {name: VERBS[plan.steps[name].step.run] for name in evaluations if name in plan.steps}
    trained = [name for name, verb in verbs.items() if verb.trains]
    student = next((name for name in trained if verbs[name].is_compared), None)
    if student is None:
        return []
    code, seeds = code_fingerprint("evaluation.evaluate"), [plan.recipe.seeds] if plan.recipe.seeds else []
    key = _key(fingerprints, plan.data.fingerprint, _scored_with(), code, *seeds)
    known = _read_cache(cache / "comparisons.json", key)
    if known is None:
        labels = plan.data.labels(plan.data.task.validation_splits[0][0])
        known = []
        further = further_copies(plan)
        for other in [name for name in trained if name != student and tokens[name] == tokens[student]]:
            if other in further:
                continue
            predictions = evaluations[student].predictions, evaluations[other].predictions
            compared = paired_over_seeds(plan, evaluations, student, other)
            difference, interval = compared or paired_difference(plan.data.task, *predictions, labels)
            known.append({"model": student, "over": other, "difference": difference, "interval": list(interval)})
        _write_cache(cache / "comparisons.json", key, known)
    return [from_json(Comparison, each) for each in known]


def _fidelity(
    plan: Plan, evaluations: dict[str, Evaluation], locations: dict[str, str], fingerprints: dict[str, str], cache: Path
) -> Fidelity:
    """What every model is against the baseline."""
    code = [code_fingerprint(module) for module in ("evaluation.evaluate", "reports.fidelity")]
    key = _key(fingerprints, plan.baseline, plan.data.fingerprint, plan.recipe.report.slices, _scored_with(), code)
    known = _read_cache(cache / "fidelity.json", key)
    if known is not None:
        return from_json(Fidelity, known)
    processor = None
    if plan.baseline in locations:
        processor = load_processor(locations[plan.baseline], plan.data.task.kind)
    found = measure_fidelity(
        plan.data, evaluations, baseline=plan.baseline, processor=processor, calibrated=_has_calibrated(plan)
    )
    _write_cache(cache / "fidelity.json", key, asdict(found))
    return found


def _has_calibrated(plan: Plan) -> bool:
    """Whether any model, or one that it was made from, got a temperature that was fitted on scored rows."""
    folders = [planned.folder for planned in plan.steps.values()]
    records = [read_step(folder) for folder in (*folders, *(Path(each.location) for each in plan.sources.values()))]
    return any((record.decided or {}).get("temperature") for record in records if record is not None)


def _matches(plan: Plan, cache: Path) -> Matches | None:
    """The scored rows that are among those trained on."""
    key = _key(plan.data.fingerprint, has_minhash(), code_fingerprint("evaluation.contamination"))
    known = _read_cache(cache / "contamination.json", key)
    if known is not None:
        return from_json(Matches, known)
    found = find_matches(plan.data)
    if found is not None and not found.looked_for_near and KINDS[plan.data.task.kind].reads != "images":
        said = f"beyond {MOST_ROWS:,} rows trained on, near copies of scored rows are looked for by datasketch alone"
        log.print(remark(f"{said}; pip install 'distill-transformers[near-duplicates]' and report again"))
    if found is not None:
        _write_cache(cache / "contamination.json", key, asdict(found))
    return found


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_cache(file: Path, key: str) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content["value"] if content.get("key") == key else None


def _write_cache(file: Path, key: str, value: Any) -> None:
    # For ourselves alone: numbers that are not finite stand in it as Python writes them, and come back as they were.
    write_atomically(file, json.dumps({"key": key, "value": value}))


def _entry(
    plan: Plan,
    name: str,
    evaluations: dict[str, Evaluation],
    measured: Measurement,
    tokens: dict[str, str | None],
    fidelity: Fidelity,
) -> ModelEntry:
    """One model of report.json."""
    planned, record = plan.steps.get(name), _record_of(plan, name)
    price, fleet = plan.recipe.report.price_per_hour, plan.recipe.report.fleet
    evaluation, metric = evaluations[name], plan.data.task.primary_metric
    baseline = evaluations.get(plan.baseline) if tokens[name] == tokens.get(plan.baseline) else None
    return ModelEntry(
        run=planned.step.run if planned else None,
        path=name,
        parents=list(planned.parents) if planned else [],
        metrics=dict(evaluation.metrics),
        interval=list(evaluation.interval),
        retention=retention(metric, evaluation.metrics[metric], baseline.metrics[metric]) if baseline else None,
        agreement=agreement(plan.data.task, evaluation.predictions, baseline.predictions) if baseline else None,
        divergence=_divergence(plan, evaluation, baseline),
        **vars(measured),
        train_seconds=record.train_seconds,
        samples_per_second=record.samples_per_second,
        truncated={**(record.truncated or {}), **(evaluation.truncated or {})} or None,
        calibration=fidelity.calibration[name],
        flips=fidelity.flips[name],
        cost_per_million=cost_per_million(measured, plan.recipe.benchmark, price) if price else None,
        fleet_bytes=measured.size_on_disk_bytes * fleet if measured.size_on_disk_bytes and fleet else None,
    )


def _truncated(models: list[ModelEntry]) -> Truncated | None:
    """Count for each split the rows that were cut by the model whose tokenizer cut the most."""
    most: Truncated = {}
    for model in models:
        for split, each in (model.truncated or {}).items():
            most[split] = max(most.get(split, each), each, key=lambda counted: counted["cut"])
    return most or None


def _divergence(plan: Plan, evaluation: Evaluation, baseline: Evaluation | None) -> dict[str, float] | None:
    """Compute the divergence from the baseline's predictions; None for kinds with more than one prediction a row."""
    if baseline is None or baseline.logits is None or evaluation.logits is None:
        return None
    return divergence_from(plan.data.task, baseline.logits, evaluation.logits)


def retention(metric: str, value: float, baseline: float) -> float | None:
    """Divide the primary metric by the baseline's (the other way round where lower is better).

    Args:
        metric: its name, which says whether lower is better.
        value: the model's.
        baseline: the baseline's.

    Returns:
        The quotient; None for a baseline ≤ 0, or one that is no number.
    """
    if not baseline > 0:
        return None
    if is_better_lower(metric):
        return baseline / value
    return value / baseline
