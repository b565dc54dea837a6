"""What the commands on recipes and runs do: check, run, search, compress, report."""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.commands.help_options import print_options
from distill.commands.publishing import push_all
from distill.common.console import log_errors, results
from distill.common.distributed import check_launch, on_main_process
from distill.common.folders import locked, told_of_a_full_disk
from distill.data.load import DataOptions
from distill.errors import InputError
from distill.evaluation.options import BenchmarkOptions
from distill.experiments.asked import Asked, read_budget
from distill.experiments.compress import PICK, compress
from distill.experiments.found import rows_of, sentences
from distill.experiments.search import search, space_problems
from distill.recipes.check import print_plan
from distill.recipes.dry_run import push_problems, runnable_plan
from distill.recipes.plan import Plan, make_plan
from distill.recipes.recipe import load_recipe, parse_options
from distill.recipes.yaml12 import parse_value
from distill.reports.presentation import print_report
from distill.reports.report import write_report
from distill.reports.side_by_side import write_side_by_side
from distill.runs.launch import check_config, find_config, launch
from distill.runs.run import chosen_steps, run_plan


def check(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Tell what a recipe will do, or everything that is wrong with it."""
    if arguments.help_options:
        print_options(arguments.help_options)
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


def run(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Run a recipe, or start processes that do."""
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
    push_all(plan.recipe)


def search_values(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Try what a recipe's `search:` block names."""
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


def compress_model(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Make a model smaller within limits and a time."""
    found = compress(_asked(arguments, overrides))
    if not found.picked or found.report is None:
        log_errors([found.said])
        return 1
    print_report(found.report)
    results.print(found.said)
    for name in (PICK, "recipe.yaml", "report.html"):
        results.print(f"→ {Path(parse_value(overrides['output_dir'], '--output_dir')) / name}")
    return 0


def _asked(arguments: argparse.Namespace, overrides: dict[str, str]) -> Asked:
    """What a compression is asked for, from the words of the command line."""
    problems: list[str] = []
    blocks: dict[str, dict[str, Any]] = {"data": {}, "benchmark": {}}
    for path, text in overrides.items():
        block, _, key = path.partition(".")
        if block in blocks and key:
            blocks[block][key] = parse_value(text, f"--{path}")
        elif path != "output_dir":
            problems.append(
                f"--{path}: no such option; compress takes --data.<option>, --benchmark.<option> and --output_dir"
            )
    parse_options(DataOptions, blocks["data"], "--data", problems)
    parse_options(BenchmarkOptions, blocks["benchmark"], "--benchmark", problems)
    output_dir = parse_value(overrides.get("output_dir", "null"), "--output_dir")
    if not isinstance(output_dir, str):
        problems.append("--output_dir: missing; say where the picked model goes, like runs/small")
    if arguments.task is None and not blocks["data"].keys() & {"kind", "path"}:
        problems.append("--task: missing; say which rows, with --task, or with --data.kind and --data.path")
    given = {name: getattr(arguments, name) for name in ("max_mb", "max_ms", "min_retention")}
    limits = {name: parse_value(text, f"--{name}") for name, text in given.items() if text is not None}
    budget = 1.0
    try:
        budget = read_budget(arguments.budget)
    except InputError as error:
        problems += error.problems
    try:
        asked = Asked(
            model=arguments.model,
            output_dir=Path(str(output_dir)).expanduser(),
            task=arguments.task,
            data=blocks["data"],
            benchmark=blocks["benchmark"],
            limits=limits,
            engine=arguments.engine,
            budget=budget,
            tolerance=parse_value(arguments.tolerance, "--tolerance"),
        )
    except InputError as error:
        raise InputError(*problems, *error.problems) from None
    if problems:
        raise InputError(*problems)
    return asked


def report(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Write the report of a run, or of several side by side."""
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
