"""The words of the command line, `distill check | run | search | compress | eval | …`; `commands` has what they do.

Nothing slow is imported before a command runs: help and what is wrong with the words or the YAML come at once.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from distill.errors import DiskFull, FolderInUse, InputError, MainProcessFailed, TrainingDiverged
from distill.evaluation.options import EVAL_OPTIONS, BenchmarkOptions
from distill.recipes.yaml12 import parse_value, read_yaml

_WITH_OPTIONS = (
    "finetune",
    "distill",
    "trim_vocabulary",
    "prune",
    "factorize",
    "share",
    "quantize",
    "export",
    "data",
    "benchmark",
    "report",
    "search",
)
"""The verbs, whose modules import torch, and a recipe's blocks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 2 the input is wrong; 1 anything else.
    """
    try:
        plain, overrides = _split_overrides(list(sys.argv[1:] if arguments is None else arguments))
        parser = _parser()
        known, unknown = parser.parse_known_args(plain)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}\n{_hint(known.command, unknown[0])}")
        if not getattr(known, "help_options", None):
            _refuse_no_yaml(known, overrides)  # before all is imported that a recipe may need
        from distill.commands import run_command

        return run_command(known, overrides)
    except InputError as error:
        _log_errors(error.problems)
        return 2
    except (TrainingDiverged, FolderInUse, DiskFull, MainProcessFailed) as error:
        _log_errors([str(error)])
        return 1
    except KeyboardInterrupt:
        from distill.common.console import log

        log.print("stopped; the same command goes on from the last checkpoint")
        return 1


def _refuse_no_yaml(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Raise an `InputError` for a recipe or for values of a command that are no YAML."""
    if getattr(arguments, "recipe", None) is not None:
        read_yaml(arguments.recipe)
    for directory in arguments.directory if arguments.command == "report" else ():
        if (directory / "recipe.yaml").is_file():
            read_yaml(directory / "recipe.yaml")
    problems: list[str] = []
    for path, text in overrides.items():
        try:
            parse_value(text, f"--{path}")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)


def _log_errors(problems: Iterable[str]) -> None:
    from distill.common.console import log_errors

    log_errors(problems)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "distill", description="Distil, quantize and measure Hugging Face encoders.", allow_abbrev=False
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="check | run | search | compress | eval | predict | bench | report | push",
    )

    check = commands.add_parser(
        "check", allow_abbrev=False, help="tell what a recipe will do, and everything that is wrong with it"
    )
    check.add_argument("recipe", nargs="?", type=_path)
    check.add_argument("--help-options", choices=_WITH_OPTIONS, help="list the options of a verb or block")
    _add_launch(check)

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

    search = commands.add_parser(
        "search",
        allow_abbrev=False,
        help="try what a recipe's `search:` block names, and write the best as a recipe",
        epilog=_OVERRIDES,
    )
    search.add_argument("recipe", type=_path)

    compress = commands.add_parser(
        "compress",
        allow_abbrev=False,
        help="make a model smaller within limits and a time, and pick the cheapest that is about as good as the best",
        epilog=_COMPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compress.add_argument("model", help="a model folder or a Hub id; one without a head is fine-tuned first")
    compress.add_argument("--task", help="a GLUE task; own rows by --data.kind, --data.path, …")
    compress.add_argument("--max_mb", metavar="X", help="10⁶ bytes of weight files, at most")
    compress.add_argument("--max_ms", metavar="X", help="median milliseconds of a call, at most")
    compress.add_argument("--min_retention", metavar="R", help="of the model's metric, at the interval's lower end")
    compress.add_argument(
        "--engine", default="auto", help="auto (all that are installed), torch, onnxruntime, openvino"
    )
    compress.add_argument("--budget", default="30min", help="30min, 90s, 2h (default 30min)")
    compress.add_argument("--tolerance", default="0.01", help="share of the best metric that may go (default 0.01)")

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

    predict = commands.add_parser(
        "predict",
        allow_abbrev=False,
        help="predict rows without labels: one JSON object a row, in their order",
        epilog=_NEW_ROWS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument("model", help="a model folder or a Hub id")
    predict.add_argument("--task", help="a GLUE task, whose columns the rows have")
    predict.add_argument("--output", required=True, type=_path, metavar="FILE", help="a new .jsonl or .csv file")
    predict.add_argument("--keep", nargs="+", metavar="COLUMN", help="columns of the rows that go along")
    predict.add_argument("--overwrite", action="store_true", help="replace the file if it is there")

    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="size, memory, FLOPs, latency and throughput; the last line is one JSON object",
    )
    bench.add_argument("models", nargs="+", metavar="model")
    for field in fields(BenchmarkOptions):
        told = f"{field.metadata['help']} (default {field.default})"
        bench.add_argument(f"--{field.name}", default=None, help=told.replace("%", "%%"))
    bench.add_argument("--price_per_hour", help="of this machine: what a million predictions cost is told, too")

    report = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="rebuild report.json, report.md, report.html and the plot of a run; of several runs side by side, too",
    )
    report.add_argument("directory", nargs="+", type=_path)
    report.add_argument(
        "--output",
        type=_path,
        metavar="FOLDER",
        help="of several runs' report (default: side-by-side beside the first)",
    )

    push = commands.add_parser("push", allow_abbrev=False, help="upload a run folder with its model card to the Hub")
    push.add_argument("folder", type=_path, metavar="RUN_FOLDER", help="output_dir/<step> of a run with a report")
    push.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="the repository; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", metavar="BRANCH", help="push to a branch; made if it does not exist")
    push.add_argument("--collection", metavar="ORG/SLUG", help="add the model to this collection")
    push.add_argument("--dry-run", type=_path, metavar="FOLDER", help="write what would be uploaded to a new folder")
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

_COMPRESS = """\
what is asked for beside the options is where it goes, and how the rows are read:
  distill compress runs/teacher --task sst2 --max_mb 12 --max_ms 8 --output_dir runs/small
  distill compress MODEL --data.kind classification --data.path reviews.csv --budget 10min --output_dir runs/small
the same command goes on where it was cut off"""

_NEW_ROWS = """\
rows with the text columns of the model's run; labels, if there are any, are not read:
  distill predict runs/quickstart/student --data.path new.csv --output predicted.jsonl
other columns, of a model from anywhere:
  distill predict MODEL --data.path new.csv --data.text review --keep id --output predicted.csv"""


def _hint(command: str, flag: str) -> str:
    """What to write instead of an unknown flag."""
    name = flag.lstrip("-").partition("=")[0]
    if command == "check" and name in ("only", "rerun", "force", "profile"):
        return f"--{name} belongs to distill run; check goes over every step"
    if command in ("run", "check", "report", "search") and flag.startswith("--"):
        return f"a step's option is --STEP.{name}, the data's --data.{name}; for all others: distill {command} --help"
    if command == "compress":
        return "compress takes --data.<option>, --benchmark.<option> and what distill compress --help lists"
    if command == "predict":
        return "predict takes --data.<option>, --task, --output, --keep and --overwrite"
    return EVAL_OPTIONS if command == "eval" else f"for all options: distill {command} --help"


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command's own arguments, and overrides: `--a.b value` or `--a.b=value`, wherever they stand."""
    plain: list[str] = []
    overrides: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        of_recipe = name in ("output_dir", "baseline", "base_model", "license", "language", "seeds") or (
            name == "task" and arguments[0] not in ("eval", "predict", "compress")
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


if __name__ == "__main__":
    sys.exit(main())
