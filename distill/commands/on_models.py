"""What the commands on models do: eval, predict, bench."""

import argparse
from dataclasses import asdict, fields
from typing import Any

from rich.table import Table

from distill.common.console import remark, results
from distill.common.folders import told_of_a_full_disk
from distill.common.serialized import json_text
from distill.data.load import describe_cut
from distill.data.tokenized import cut_rows
from distill.errors import InputError
from distill.evaluation.benchmark import benchmark_models, environment, remarks_on
from distill.evaluation.cost import cost_per_million
from distill.evaluation.evaluate import evaluate_model
from distill.evaluation.loading import engine_of, engine_versions, load_scored
from distill.evaluation.options import EVAL_OPTIONS, BenchmarkOptions, ReportOptions
from distill.evaluation.predict import predict_lines, refuse_output, write_lines
from distill.models.load import fetch_weights, find_model, load_processor
from distill.recipes.recipe import parse_options
from distill.recipes.rows import PREDICT_OPTIONS, rows_to_predict, rows_to_score
from distill.recipes.yaml12 import parse_value
from distill.tasks.base import GLUE


def evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Score one model."""
    values = _data_options(overrides, EVAL_OPTIONS)
    label_map = parse_value(arguments.label_map, "--label_map") if arguments.label_map else None
    if label_map is not None and not isinstance(label_map, dict):
        raise InputError(f"--label_map: should be a mapping like '{{LABEL_0: negative}}', got {arguments.label_map!r}")
    if label_map is not None:
        label_map = {name: str(label) for name, label in label_map.items()}
    source = find_model(arguments.model, adapters=True, exports=True)
    data = rows_to_score(source, arguments.task, values, label_map)
    for note in data.notes:
        results.print(f"note: {note}")
    fetch_weights(source)
    model = load_scored(source.location, data.task, label_map=label_map)
    evaluation = evaluate_model(model, load_processor(source.location, data.task.kind), data, name=arguments.model)
    table = Table("metric", arguments.model, "95 % interval")
    low, high = evaluation.interval
    for name, value in evaluation.metrics.items():
        table.add_row(name, f"{value:.4f}", f"{low:.3f}–{high:.3f}" if name == data.task.primary_metric else "")
    results.print(table)
    rows = {split: len(data.splits[split]) for split, _, _ in data.scored_splits()}
    results.print(", ".join(f"{split}: {count} rows" for split, count in rows.items()))
    if cut := describe_cut(evaluation.truncated):
        results.print(cut)
    scored = {"metrics": evaluation.metrics, "interval": list(evaluation.interval)}
    engine, threads = engine_of(model)
    counted = {"rows": rows, "truncated": evaluation.truncated, "engine": engine, "threads": threads}
    task = data.task.name if data.task.name in GLUE else data.task.kind
    print(json_text({"model": arguments.model, "task": task, **scored, **counted}, indent=None))


def predict(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Predict rows without labels."""
    values = _data_options(overrides, PREDICT_OPTIONS)
    refuse_output(arguments.output, overwrite=arguments.overwrite, rows=values.get("path"))
    source = find_model(arguments.model, adapters=True, exports=True)
    wanted = rows_to_predict(source, arguments.task, values, keep=arguments.keep or ())
    new = wanted.new
    for note in new.notes:
        results.print(f"note: {note}")
    fetch_weights(source)
    model, processor = load_scored(source.location, new.task), load_processor(source.location, new.task.kind)
    encoded = wanted.encoded(processor, model.config)
    with told_of_a_full_disk(arguments.output.absolute().parent):
        count = write_lines(arguments.output, predict_lines(model, processor, new, encoded, name=arguments.model))
    cut = cut_rows(encoded)
    if cut:
        results.print(describe_cut({"new": {"rows": count, "cut": cut}}))
    results.print(f"→ {arguments.output}: {count} rows")


def bench(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Measure models side by side."""
    if overrides:
        raise InputError(f"--{next(iter(overrides))}: no such option of bench")
    given = {
        field.name: parse_value(getattr(arguments, field.name) or "null", f"--{field.name}")
        for field in fields(BenchmarkOptions)
    }
    problems: list[str] = []
    options = parse_options(BenchmarkOptions, {k: v for k, v in given.items() if v is not None}, "bench", problems)
    price = parse_value(arguments.price_per_hour or "null", "--price_per_hour")
    priced = parse_options(ReportOptions, {"price_per_hour": price}, "bench", problems)
    if problems:
        raise InputError(*problems)
    sources = [find_model(reference, adapters=True, exports=True) for reference in arguments.models]
    for source in sources:
        fetch_weights(source)
    locations = {source.reference: source.location for source in sources}
    first, *others = locations
    measurements = list(benchmark_models(locations, options, made_from=dict.fromkeys(others, first)).values())
    models, variants = measurements[: len(locations)], measurements[len(locations) :]
    around = environment() | engine_versions({each.engine for each in models})
    results.print(
        f"{around['cpu']}, {around['threads']} threads, torch {around['torch']}; medians of alternating rounds"
    )
    table = Table("", *(each.name for each in measurements))
    rows = [asdict(each) for each in measurements]
    for row, each in zip(rows, measurements, strict=True):
        price = priced.price_per_hour
        row["cost_per_million"] = None if price is None else cost_per_million(each, options, price)
    for key in rows[0]:
        if key != "name" and not (key == "cost_per_million" and priced.price_per_hour is None):
            table.add_row(key, *(_cell(row[key]) for row in rows))
    results.print(table)
    for model in models[1:]:
        for said in remarks_on(model, models[0], variants):
            results.print(remark(said))
    found = {"environment": around, "options": asdict(options), "models": rows[: len(models)]}
    found["price_per_hour"] = priced.price_per_hour
    found["variants"] = rows[len(models) :]
    print(json_text(found, indent=None))


def _data_options(overrides: dict[str, str], known: str) -> dict[str, Any]:
    """The values under `--data.<option>`; all others are refused with what is known."""
    values = {}
    for path, text in overrides.items():
        block, _, key = path.partition(".")
        if block != "data" or not key:
            raise InputError(f"--{path}: no such option; {known}")
        values[key] = parse_value(text, f"--{path}")
    return values


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return f"{value:,}" if isinstance(value, int | float) else str(value)
