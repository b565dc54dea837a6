"""The command line: `distill check | run | eval | bench | report | push`."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

import datasets
import transformers
from huggingface_hub import constants
from rich import box
from rich.table import Table

from distill.common.console import (
    log,
    log_errors,
    log_handler,
    remark,
    results,
)
from distill.common.distributed import check_launch, on_main_process
from distill.common.folders import locked, told_of_a_full_disk
from distill.common.hardware import available_cores
from distill.common.records import json_text
from distill.data.load import DataOptions, describe_cut
from distill.errors import (
    DiskFull,
    FolderInUse,
    InputError,
    MainProcessFailed,
    TrainingDiverged,
)
from distill.evaluation.benchmark import (
    BenchmarkOptions,
    as_row,
    benchmark_models,
    environment,
    remarks_on,
)
from distill.evaluation.evaluate import evaluate_model
from distill.models.load import (
    fetch_weights,
    find_model,
    load_classifier,
    load_processor,
)
from distill.publishing.published import left_out
from distill.publishing.push import push_folder, to_push, write_content
from distill.recipes.check import print_plan
from distill.recipes.dry_run import push_problems, runnable_plan
from distill.recipes.plan import Plan, make_plan
from distill.recipes.recipe import (
    Recipe,
    load_recipe,
    parse_options,
    parse_value,
)
from distill.recipes.scoring import rows_to_score
from distill.recipes.trainer_options import refusal
from distill.reports.presentation import print_report
from distill.reports.report import write_report
from distill.runs.launch import check_config, find_config, launch
from distill.runs.run import chosen_steps, run_plan
from distill.tasks.base import GLUE
from distill.verbs.options import VERBS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 2 the input is wrong; 1 anything else.
    """
    logging.getLogger("distill").addHandler(log_handler)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )  # peft asks for it
    datasets.disable_progress_bars()
    try:
        plain, overrides = _split_overrides(list(sys.argv[1:] if arguments is None else arguments))
        parser = _parser()
        known, unknown = parser.parse_known_args(plain)
        if unknown:
            command = next(word for word in plain if not word.startswith("-"))
            parser.error(f"unrecognized arguments: {' '.join(unknown)}\n{_hint(command, unknown[0])}")
        # Where rows and models are kept; others are named before.
        with available_cores(), told_of_a_full_disk(Path(constants.HF_HOME)):
            return known.command(known, overrides) or 0
    except InputError as error:
        log_errors(error.problems)
        return 2
    except (TrainingDiverged, FolderInUse, DiskFull, MainProcessFailed) as error:
        log_errors([str(error)])
        return 1
    except KeyboardInterrupt:
        log.print("stopped; the same command goes on from the last checkpoint")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "distill", description="Distil, quantize and measure Hugging Face encoders.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="check | run | eval | bench | report | push")

    check = commands.add_parser(
        "check", allow_abbrev=False, help="tell what a recipe will do, and everything that is wrong with it"
    )
    check.add_argument("recipe", nargs="?", type=_path)
    check.add_argument(
        "--help-options", choices=[*VERBS, "data", "benchmark"], help="list the options of a verb or block"
    )
    _add_launch(check)
    check.set_defaults(command=_check)

    run = commands.add_parser(
        "run", allow_abbrev=False, help="run the steps that are not finished, then report", epilog=_OVERRIDES
    )
    run.add_argument("recipe", type=_path)
    run.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone, without a report")
    run.add_argument("--profile", action="store_true", help="write where the steps' time goes into their run folders")
    run.add_argument(
        "--rerun", nargs="+", metavar="STEP", help="make these steps anew, and what depends on them, though finished"
    )
    run.add_argument("--force", action="store_true", help="make every step anew")
    _add_launch(run)
    run.set_defaults(command=_run)

    evaluate = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="score one model; the last line is one JSON object",
        epilog=_OWN_ROWS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("model", help="a model folder or a Hub id")
    evaluate.add_argument("--task", help="a GLUE task")
    evaluate.add_argument("--label_map", help="the model's label names → the task's: '{LABEL_0: negative, …}'")
    evaluate.set_defaults(command=_eval)

    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="size, memory, FLOPs, latency and throughput; the last line is one JSON object",
    )
    bench.add_argument("models", nargs="+", metavar="model")
    for field in fields(BenchmarkOptions):
        told = f"{field.metadata['help']} (default {field.default})"
        bench.add_argument(f"--{field.name}", default=None, help=told.replace("%", "%%"))
    bench.set_defaults(command=_bench)

    report = commands.add_parser(
        "report", allow_abbrev=False, help="rebuild report.json, report.md and the plot of a run"
    )
    report.add_argument("directory", type=_path)
    report.set_defaults(command=_report)

    push = commands.add_parser("push", allow_abbrev=False, help="upload a run folder with its model card to the Hub")
    push.add_argument("folder", type=_path, metavar="RUN_FOLDER", help="output_dir/<step> of a run with a report")
    push.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="the repository; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", metavar="BRANCH", help="push to a branch; made if it does not exist")
    push.add_argument("--collection", metavar="ORG/SLUG", help="add the model to this collection")
    push.add_argument("--dry-run", type=_path, metavar="FOLDER", help="write what would be uploaded to a new folder")
    push.set_defaults(command=_push)
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _add_launch(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--accelerate_config", metavar="NAME", help="launch with accelerate_configs/NAME.yaml (or a path)"
    )
    command.add_argument("--num_processes", type=int, metavar="N", help="of the launch, instead of the file's")


_OVERRIDES = "Any value of the recipe is overridden by its path: --student.temperature 4 --data.max_length 64."
_OWN_ROWS = """\
the validation rows that a model's run scored it on:
  distill eval runs/quickstart/student
rows of your own, a file or a folder:
  distill eval MODEL --data.kind classification --data.path reviews.csv --data.text review --data.label verdict
a GLUE task, from the Hub or (with --data.path) from a folder:
  distill eval MODEL --task sst2 --data.path glue/sst2
every --data.<option>: distill check --help-options data"""


_EVAL_OPTIONS = "eval takes --task, --label_map and --data.<option>"


def _hint(command: str, flag: str) -> str:
    """What to write instead of an unknown flag."""
    name = flag.lstrip("-").partition("=")[0]
    if command == "check" and name in ("only", "rerun", "force", "profile"):
        return f"--{name} belongs to distill run; check goes over every step"
    if command in ("run", "check", "report") and flag.startswith("--"):
        return f"a step's option is --STEP.{name}, the data's --data.{name}; for all others: distill {command} --help"
    return _EVAL_OPTIONS if command == "eval" else f"for all options: distill {command} --help"


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
    """Run a recipe's unfinished steps, then (unless `only` some were asked for) report, and push what it says."""
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
    _push_all(plan.recipe)


def _eval(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    values = {}
    for path, text in overrides.items():
        block, _, key = path.partition(".")
        if block != "data" or not key:
            raise InputError(f"--{path}: no such option; {_EVAL_OPTIONS}")
        values[key] = parse_value(text, f"--{path}")
    label_map = parse_value(arguments.label_map, "--label_map") if arguments.label_map else None
    if label_map is not None and not isinstance(label_map, dict):
        raise InputError(f"--label_map: should be a mapping like '{{LABEL_0: negative}}', got {arguments.label_map!r}")
    if label_map is not None:
        label_map = {name: str(label) for name, label in label_map.items()}
    source = find_model(arguments.model, adapters=True)
    data = rows_to_score(source, arguments.task, values, label_map)
    for note in data.notes:
        results.print(f"note: {note}")
    fetch_weights(source)
    model = load_classifier(source.location, data.task, label_map=label_map)
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
    counted = {"rows": rows, "truncated": evaluation.truncated}
    task = data.task.name if data.task.name in GLUE else data.task.kind
    print(json_text({"model": arguments.model, "task": task, **scored, **counted}, indent=None))


def _bench(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    if overrides:
        raise InputError(f"--{next(iter(overrides))}: no such option of bench")
    given = {
        field.name: parse_value(getattr(arguments, field.name) or "null", f"--{field.name}")
        for field in fields(BenchmarkOptions)
    }
    problems: list[str] = []
    options = parse_options(BenchmarkOptions, {k: v for k, v in given.items() if v is not None}, "bench", problems)
    if problems:
        raise InputError(*problems)
    sources = [find_model(reference, adapters=True) for reference in arguments.models]
    for source in sources:
        fetch_weights(source)
    locations = {source.reference: source.location for source in sources}
    first, *others = locations
    measured = benchmark_models(locations, options, made_from=dict.fromkeys(others, first))
    measurements = [as_row(name, result) for name, result in measured.items()]
    rows, variants = measurements[: len(locations)], measurements[len(locations) :]
    around = environment()
    results.print(
        f"{around['cpu']}, {around['threads']} threads, torch {around['torch']}; medians of alternating rounds"
    )
    table = Table("", *(row["name"] for row in measurements))
    for key in rows[0]:
        if key != "name":
            table.add_row(key, *(_cell(row[key]) for row in measurements))
    results.print(table)
    for row in rows[1:]:
        for said in remarks_on(row, rows[0], variants):
            results.print(remark(said))
    found = {"environment": around, "options": asdict(options), "models": rows, "variants": variants}
    print(json_text(found, indent=None))


def _report(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    recipe = arguments.directory / "recipe.yaml"
    if not recipe.is_file():
        raise InputError(f"{arguments.directory}: no run lies there (no recipe.yaml, which `distill run` writes)")
    plan = make_plan(load_recipe(recipe, {"output_dir": str(arguments.directory), **overrides}, draft=True))
    with told_of_a_full_disk(plan.recipe.output_dir):
        print_report(write_report(plan))


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
    options_class = {"data": DataOptions, "benchmark": BenchmarkOptions, **VERBS}[name]
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


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command's own arguments, and overrides: `--a.b value` or `--a.b=value`, wherever they stand."""
    plain: list[str] = []
    overrides: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        of_recipe = name in ("output_dir", "baseline", "base_model", "license", "language") or (
            name == "task" and arguments[0] != "eval"
        )
        if not word.startswith("--") or not ("." in name or of_recipe):
            plain.append(word)
        elif equals:
            overrides[name] = value
        else:
            following = next(words, None)
            if following is None:
                raise InputError(f"--{name}: needs a value")
            overrides[name] = following
    return plain, overrides


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return f"{value:,}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
