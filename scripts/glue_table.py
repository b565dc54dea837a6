"""Run a recipe on many GLUE tasks, and write the table that people know: one row per model, one column per task.

    python scripts/glue_table.py --data_root path/to/glue --epochs 5 --most_steps 600 sst2=1500     # MiniLM, on a CPU
    python scripts/glue_table.py 'recipes/glue/{task}.yaml' --seeds 0 1 2 --accelerate_config multi_gpu

Each task and seed is a `distill run` of its own, into OUTPUT_DIR/<task>/seed-<seed>; its output goes into a .log beside
it. One that fails is told and doesn't stop the others, and the same command goes on where it was cut off. What the
script doesn't know goes to `distill run`: `--student.temperature 4`. OUTPUT_DIR then holds glue.md, .json and .csv.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.common.console import (
    log,
    log_errors,
    results,
    styled,
)
from distill.common.records import Report, read_report
from distill.data.load import load_data
from distill.errors import InputError, nearest_name
from distill.experiments.leaderboard import (
    NAMES,
    Leaderboard,
    as_csv,
    as_json,
    as_markdown,
    make_leaderboard,
)
from distill.recipes.plan import make_plan
from distill.recipes.recipe import Recipe, load_recipe
from distill.runs.run import is_finished, write_atomically
from distill.verbs.all import VERBS


@dataclass
class Run:
    """One task with one seed."""

    task: str
    seed: int
    recipe: Path
    folder: Path
    overrides: dict[str, str]
    num_rows: dict[str, int] = field(default_factory=dict)
    """Of each split."""
    steps: int | None = None
    """Optimizer steps of each model; None as the recipe says."""
    problem: str | None = None
    """Why it can't run, or failed."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{NAMES[self.task]}, seed {self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not finished, then write the table.

    Returns:
        0 done; 1 some task failed; 2 the input is wrong.
    """
    given, others = _parser().parse_known_args(arguments)
    try:
        most_steps = _most_steps(given.most_steps)
        runs = _prepare(given, others, most_steps)
    except InputError as error:
        log_errors(error.problems)
        return 2
    try:
        _run_all(runs, others)
    except KeyboardInterrupt:
        log.print("stopped; the same command goes on from the last checkpoint")
        return 1
    found = {(run.task, run.seed): _report(run) for run in runs if run.problem is None}
    reports = {key: report for key, report in found.items() if report is not None}
    if reports:
        _write(given.output_dir, make_leaderboard(reports, given.tasks, given.seeds), runs)
    for run in runs:
        if run.problem is not None:
            log.print(styled(("failed:", "red"), f" {run.name}: {run.problem}"))
    return 1 if any(run.problem for run in runs) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = Path(__file__).parent.parent / "recipes" / "glue" / "minilm" / "any.yaml"
    parser.add_argument("recipe", nargs="?", default=str(default), help="{task} in it stands for the task's name")
    parser.add_argument("--tasks", nargs="+", default=list(NAMES), metavar="TASK", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], metavar="SEED", help="of the training steps")
    parser.add_argument("--data_root", type=_path, help="a folder of one folder per task; else the rows are the Hub's")
    parser.add_argument("--output_dir", type=_path, default=Path("runs/glue_table"))
    parser.add_argument("--epochs", type=float, help="each model trains for at most as many epochs")
    parser.add_argument(
        "--most_steps", nargs="+", metavar="N", help="and for at most as many steps: 600, or for a task sst2=1500"
    )
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _most_steps(given: Sequence[str] | None) -> dict[str, int]:
    """Steps by task; `""` stands for all others."""
    found = {}
    for part in given or ():
        task, _, count = part.rpartition("=")
        if not count.isdigit() or int(count) < 1 or task not in ("", *NAMES):
            raise InputError(f"--most_steps: {part!r} should be a number of steps, or one for a task like sst2=1500")
        found[task] = int(count)
    return found


# --- what to run ----------------------------------------------------------------------------------------------------


def _prepare(given: argparse.Namespace, others: Sequence[str], most_steps: dict[str, int]) -> list[Run]:
    """A run for each task and seed; what is wrong with a task alone is its problem."""
    wrong = [task for task in given.tasks if task not in NAMES]
    unknown = [f"--tasks: no GLUE task {task!r}; {nearest_name(task, NAMES)}" for task in wrong]
    if others and not others[0].startswith("--"):
        unknown.append(f"{others[0]}: not understood; see --help")
    if unknown:
        raise InputError(*unknown)
    runs = []
    for task in (task for task in NAMES if task in given.tasks):
        path = Path(given.recipe.replace("{task}", task))
        for seed in given.seeds:
            folder = given.output_dir / task / f"seed-{seed}"
            runs.append(Run(task, seed, path, folder, {"task": task, "output_dir": str(folder)}))
            if given.data_root is not None:
                runs[-1].overrides["data.path"] = str(given.data_root / task)
        try:
            _resolve([run for run in runs if run.task == task], given.epochs, most_steps.get(task, most_steps.get("")))
        except InputError as error:
            for run in runs:
                run.problem = str(error) if run.task == task else run.problem
    return runs


def _resolve(runs: list[Run], epochs: float | None, most_steps: int | None) -> None:
    """The seeds, and the steps of each model, which follow from the task's rows."""
    recipe = load_recipe(runs[0].recipe, runs[0].overrides)
    data = load_data(recipe.task, recipe.data)
    for run in runs:
        run.num_rows = {split: len(rows) for split, rows in data.splits.items() if split != "unlabelled"}
        for name, options in _trained(recipe).items():
            run.overrides[f"{name}.seed"] = str(run.seed)
            limits = [] if most_steps is None else [most_steps]
            if epochs is not None:
                a_step = options.per_device_train_batch_size * options.gradient_accumulation_steps
                limits.append(max(1, round(epochs * math.ceil(run.num_rows["train"] / a_step))))
            if limits:
                run.steps = min(limits)
                run.overrides[f"{name}.max_steps"] = str(run.steps)


def _trained(recipe: Recipe) -> dict[str, Any]:
    """The options of each step that trains, which are a `TrainingConfig`."""
    return {step.name: step.options for step in recipe.steps.values() if VERBS[step.run].trains}


# --- running --------------------------------------------------------------------------------------------------------


def _run_all(runs: list[Run], others: Sequence[str]) -> None:
    """One after the other, with the time that is left at the speed so far."""
    todo = [run for run in runs if run.problem is None and (others or not _is_done(run))]
    started, spent = time.perf_counter(), 0
    for number, run in enumerate(todo, start=1):
        left = sum(each.steps or 1 for each in todo[number - 1 :])
        estimate = f", about {(time.perf_counter() - started) / spent * left / 60:.0f} min left" if spent else ""
        steps = f"{run.steps} steps a model" if run.steps else "steps as in the recipe"
        log.print(styled((f"[{number}/{len(todo)}] {run.name}", "bold"), f": {steps}{estimate}"))
        run.problem = _run(run, others)
        spent += run.steps or 1
        if run.problem is not None:
            log.print(styled(("failed:", "red"), f" {run.name}: {run.problem}"))


def _is_done(run: Run) -> bool:
    """Whether all its models and its report are there, as the recipe makes them."""
    if not (run.folder / "report.json").is_file():
        return False
    try:
        steps = make_plan(load_recipe(run.recipe, run.overrides)).steps
    except InputError:
        return False
    newest = max((each.folder / "step.json").stat().st_mtime for each in steps.values() if each.folder.is_dir())
    return all(map(is_finished, steps.values())) and (run.folder / "report.json").stat().st_mtime >= newest


def _run(run: Run, others: Sequence[str]) -> str | None:
    """`distill run` in a process of its own, its output shown and kept; what went wrong, or None."""
    command = [sys.executable, "-m", "distill.cli", "run", str(run.recipe), *others]
    command += [part for key, value in run.overrides.items() for part in (f"--{key}", value)]
    file = run.folder.with_suffix(".log")
    file.parent.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with (
        file.open("a", encoding="utf-8") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        for line in process.stdout or ():
            sys.stderr.write(line)
            kept.write(line)
            kept.flush()
            said += [line.strip()] if line.strip() else []
    if process.returncode == 0:
        return None
    reason = next((line for line in said if line.startswith("error:")), said[-1] if said else "it said nothing")
    return f"{reason} (exit status {process.returncode}; {file})"


# --- the table ------------------------------------------------------------------------------------------------------


def _report(run: Run) -> Report | None:
    """The report of a run; None, with the run's problem, where there is none that can be read."""
    try:
        found = read_report(run.folder)
    except InputError as error:
        run.problem = str(error)
        return None
    if found is None:
        run.problem = f"{run.folder / 'report.json'}: is no report"
    return found


def _write(folder: Path, board: Leaderboard, runs: Sequence[Run]) -> None:
    rows = {NAMES[run.task]: " + ".join(f"{count:,} {split}" for split, count in run.num_rows.items()) for run in runs}
    about = f"Rows: {'; '.join(f'{task} {counts}' for task, counts in rows.items() if counts)}."
    steps = dict.fromkeys(f"{NAMES[run.task]} {run.steps}" for run in runs if run.steps)
    more = [about, *([f"Steps of each model: {', '.join(steps)}."] if steps else [])]
    problems = [f"{run.name}: {run.problem}" for run in runs if run.problem is not None]
    table = as_markdown(board, *more, *problems)
    for suffix, text in (("md", table), ("json", as_json(board)), ("csv", as_csv(board))):
        write_atomically(folder / f"glue.{suffix}", text)
    results.print(table)
    results.print(f"→ {folder / 'glue.md'}, .json, .csv")


if __name__ == "__main__":
    sys.exit(main())
