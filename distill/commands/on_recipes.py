"""What the commands on recipes and runs do: check, run, search, report."""

import argparse
from pathlib import Path

from rich.table import Table

from distill.commands.help_options import print_options
from distill.commands.publishing import push_all
from distill.common.console import results
from distill.common.distributed import check_launch, on_main_process
from distill.common.folders import locked, told_of_a_full_disk
from distill.errors import InputError
from distill.experiments.found import rows_of, sentences
from distill.experiments.search import search, space_problems
from distill.recipes.check import print_plan
from distill.recipes.dry_run import push_problems, runnable_plan
from distill.recipes.plan import Plan, make_plan
from distill.recipes.recipe import load_recipe
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
