"""The functions behind the commands of the command line, with all that they import; `distill.cli` reads the words."""

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

import datasets
import transformers
from huggingface_hub import constants
from rich import box
from rich.table import Table

from distill.common.console import log_handler, remark, results
from distill.common.distributed import check_launch, on_main_process
from distill.common.folders import locked, told_of_a_full_disk
from distill.common.hardware import available_cores
from distill.common.serialized import json_text
from distill.data.load import DataOptions, describe_cut
from distill.data.tokenized import cut_rows
from distill.errors import InputError
from distill.evaluation.benchmark import benchmark_models, environment, remarks_on
from distill.evaluation.cost import cost_per_million
from distill.evaluation.evaluate import evaluate_model
from distill.evaluation.loading import engine_of, engine_versions, load_scored
from distill.evaluation.options import EVAL_OPTIONS, BenchmarkOptions, ReportOptions
from distill.evaluation.predict import predict_lines, refuse_output, write_lines
from distill.experiments.found import rows_of, sentences
from distill.experiments.search import search, space_problems
from distill.models.load import fetch_weights, find_model, load_processor
from distill.publishing.published import left_out
from distill.publishing.push import push_folder, to_push, write_content
from distill.recipes.check import print_plan
from distill.recipes.dry_run import push_problems, runnable_plan
from distill.recipes.plan import Plan, make_plan
from distill.recipes.predicting import PREDICT_OPTIONS, rows_to_predict
from distill.recipes.recipe import Recipe, load_recipe, parse_options
from distill.recipes.scoring import rows_to_score
from distill.recipes.search_options import SearchOptions
from distill.recipes.trainer_options import refusal
from distill.recipes.yaml12 import parse_value
from distill.reports.presentation import print_report
from distill.reports.report import write_report
from distill.reports.side_by_side import write_side_by_side
from distill.runs.launch import check_config, find_config, launch
from distill.runs.run import chosen_steps, run_plan
from distill.tasks.base import GLUE
from distill.verbs.all import VERBS


def run_command(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Run one command of the command line.

    Args:
        arguments: the command's name and its own arguments.
        overrides: values (as YAML) by path: `student.temperature`, `data.max_length`, `output_dir`.

    Returns:
        The exit status.
    """
    logging.getLogger("distill").addHandler(log_handler)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )  # peft asks for it
    datasets.disable_progress_bars()
    # Where rows and models are kept; others are named before.
    with available_cores(), told_of_a_full_disk(Path(constants.HF_HOME)):
        return COMMANDS[arguments.command](arguments, overrides) or 0


def _check(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    if arguments.help_options:
        _print_options(arguments.help_options)
        return 0
    if arguments.recipe is None:
        raise InputError("check: name a recipe, or --help-options finetune")
    if _is_launched(arguments):
        return _launch(arguments, overrides, ["check", str(arguments.recipe)])
    check_launch()
    plan = runnable_plan(load_recipe(arguments.recipe, overrides, draft=True))
    if problems := space_problems(arguments.recipe, overrides, plan.recipe):
        raise InputError(*problems)
    print_plan(plan)
    for problem in push_problems(plan.recipe):
        results.print(f"note: {problem}")
    return 0


def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    if _is_launched(arguments):
        command = ["run", str(arguments.recipe)]
        for flag, steps in (("--only", arguments.only), ("--rerun", arguments.rerun)):
            command += [flag, *steps] if steps else []
        return _launch(
            arguments, overrides, [*command, *["--force"] * arguments.force, *["--profile"] * arguments.profile]
        )
    run_recipe(
        arguments.recipe,
        overrides,
        only=arguments.only,
        rerun=arguments.rerun,
        force=arguments.force,
        profile=arguments.profile,
    )
    return 0


def run_recipe(
    path: Path,
    overrides: dict[str, str] | None = None,
    *,
    only: list[str] | None = None,
    rerun: list[str] | None = None,
    force: bool = False,
    profile: bool = False,
) -> None:
    """Run a recipe's unfinished steps; then report and push as it says, unless only some steps were asked for.

    Args:
        path: of the recipe.
        overrides: values (as YAML) by path: `student.temperature`, `data.max_length`, `output_dir`.
        only: run these steps alone; what they start from must be finished.
        rerun: make these steps, and those that depend on them, anew though they are finished.
        force: make every step anew.
        profile: write where the time of training steps goes into the run folders.

    Raises:
        InputError: with every problem that can be told before the first step runs.
        FolderInUse: another process runs into the same folder.
        DiskFull: the steps so far are whole, and the next run goes on.
    """
    check_launch()
    recipe = load_recipe(path, overrides, draft=True)
    # Before the hours, not after them.
    plan = runnable_plan(recipe, only=only, rerun=rerun, force=force, pushes=only is None)
    run_plan(plan, only=only, rerun=rerun, force=force, profile=profile)
    if only is None:
        on_main_process(lambda: _report_and_push(plan))


def _report_and_push(plan: Plan) -> None:
    with told_of_a_full_disk(plan.recipe.output_dir), locked(plan.recipe.output_dir):
        print_report(write_report(plan))
    results.print(f"→ {plan.recipe.output_dir / 'report.md'}")
    results.print(f"→ {plan.recipe.output_dir / 'report.html'}")
    _push_all(plan.recipe)


def _data_options(overrides: dict[str, str], known: str) -> dict[str, Any]:
    """The values under `--data.<option>`; all others are refused with what is known."""
    values = {}
    for path, text in overrides.items():
        block, _, key = path.partition(".")
        if block != "data" or not key:
            raise InputError(f"--{path}: no such option; {known}")
        values[key] = parse_value(text, f"--{path}")
    return values


def _search(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    found = search(arguments.recipe, overrides)
    header, *rows = rows_of(found)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    results.print(table)
    for line in sentences(found):
        results.print(line)
    if found.best is None:
        return 1
    results.print(f"→ {load_recipe(arguments.recipe, overrides).output_dir / 'best.yaml'}")
    return 0


def _eval(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
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


def _predict(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
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


def _bench(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
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


def _report(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    directories: list[Path] = arguments.directory
    if arguments.output is not None and len(directories) == 1:
        raise InputError("--output: is of several runs side by side; the report of one run lies in its folder")
    lacking = [each for each in directories if not (each / "recipe.yaml").is_file()]
    if lacking:
        raise InputError(
            *(f"{each}: no run lies there (no recipe.yaml, which `distill run` writes)" for each in lacking)
        )
    plans = [
        make_plan(load_recipe(each / "recipe.yaml", {"output_dir": str(each), **overrides}, draft=True))
        for each in directories
    ]
    if len(plans) == 1:
        with told_of_a_full_disk(plans[0].recipe.output_dir):
            print_report(write_report(plans[0]))
        return
    output = arguments.output or directories[0].resolve().parent / "side-by-side"
    with told_of_a_full_disk(output):
        print_report(write_side_by_side(plans, output))
    results.print(f"→ {output / 'report.html'}")


def _push(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    if overrides:
        raise InputError(f"--{next(iter(overrides))}: no such option of push")
    if arguments.dry_run is not None:
        content = to_push(arguments.folder, arguments.repo_id)
        write_content(content, arguments.dry_run)
        _print_left_out(arguments.folder)
        results.print(f"{arguments.dry_run}: {len(content)} files, as they would be pushed to {arguments.repo_id}")
        return
    _push_one(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        collection=arguments.collection,
    )


def _push_all(recipe: Recipe) -> None:
    """Push what a recipe's `push:` names, in the order of its steps (adapters come after what they adapt)."""
    problems: list[str] = []
    for name in [step for step in recipe.steps if step in recipe.push]:
        try:
            _push_one(recipe.output_dir / name, recipe.push[name])
        except InputError as error:
            problems += [f"push.{name}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(*problems)


def _push_one(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None, collection: str | None = None
) -> None:
    pushed, is_new = push_folder(folder, repo_id, private=private, revision=revision, collection=collection)
    _print_left_out(folder)
    results.print(f"→ {pushed.url}{'' if is_new else ' (nothing had changed)'}")


def _print_left_out(folder: Path) -> None:
    names = left_out(folder)
    if names:
        results.print(f"note: not pushed, as no files of a model that others load: {', '.join(names)}")


def _is_launched(arguments: argparse.Namespace) -> bool:
    """Whether the command starts processes that do its work."""
    if arguments.num_processes is not None and not arguments.accelerate_config:
        raise InputError("--num_processes: goes with --accelerate_config, which starts them")
    if arguments.num_processes is not None and arguments.num_processes < 1:
        raise InputError(f"--num_processes: {arguments.num_processes} are too few; say 1 or more")
    return bool(arguments.accelerate_config)


def _launch(arguments: argparse.Namespace, overrides: dict[str, str], command: list[str]) -> int:
    """This same command by `accelerate launch`; what is wrong with the recipe is told once, here."""
    check_config(find_config(arguments.accelerate_config), arguments.num_processes)
    only, rerun = getattr(arguments, "only", None), getattr(arguments, "rerun", None)
    force = getattr(arguments, "force", False)
    recipe = load_recipe(arguments.recipe, overrides, draft=True)
    plan = runnable_plan(recipe, only=only, rerun=rerun, force=force, launches=True)
    if command[0] == "run":
        chosen_steps(plan, only, rerun or [])
        with locked(plan.recipe.output_dir):
            pass  # else every process would tell of the run that has it
    command += [part for key, value in overrides.items() for part in (f"--{key}", value)]
    return launch(arguments.accelerate_config, command, num_processes=arguments.num_processes)


def _print_options(name: str) -> None:
    blocks = {"data": DataOptions, "benchmark": BenchmarkOptions, "report": ReportOptions, "search": SearchOptions}
    options_class = VERBS[name].options if name in VERBS else blocks[name]
    own = _own_fields(options_class)
    shown = [field for field in fields(options_class) if field.init and not refusal(options_class, field.name)]
    table = Table("option", "default", "help", box=box.SIMPLE_HEAD, pad_edge=False)
    for field in sorted(shown, key=lambda field: (_default(field) != "required", field.name not in own)):
        table.add_row(field.name, _default(field), " ".join(field.metadata.get("help", "").split()))
    results.print(table)
    if issubclass(options_class, transformers.TrainingArguments):
        results.print("Ours first; the rest are transformers.TrainingArguments.")


def _default(field: Field) -> str:
    if field.default is field.default_factory is MISSING:
        return "required"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return str(getattr(default, "value", default))


def _own_fields(options_class: type) -> set[str]:
    inherited = {field.name: field.default for field in fields(transformers.TrainingArguments)}
    return {field.name for field in fields(options_class) if inherited.get(field.name, field) != field.default}


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return f"{value:,}" if isinstance(value, int | float) else str(value)


COMMANDS: dict[str, Callable[[argparse.Namespace, dict[str, str]], int | None]] = {
    "check": _check,
    "run": _run,
    "search": _search,
    "eval": _eval,
    "predict": _predict,
    "bench": _bench,
    "report": _report,
    "push": _push,
}
"""The function behind each command, by the command's name."""
