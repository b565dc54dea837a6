"""The functions behind the commands of the command line, with all that they import; `distill.cli` reads the words."""

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import transformers
from huggingface_hub import constants

from distill.commands.on_models import bench, evaluate, predict
from distill.commands.on_recipes import check, compress_model, report, run, search_values
from distill.commands.publishing import push
from distill.common.console import log_handler
from distill.common.folders import told_of_a_full_disk
from distill.common.hardware import available_cores


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


COMMANDS: dict[str, Callable[[argparse.Namespace, dict[str, str]], int | None]] = {
    "check": check,
    "run": run,
    "search": search_values,
    "compress": compress_model,
    "eval": evaluate,
    "predict": predict,
    "bench": bench,
    "report": report,
    "push": push,
}
"""The function behind each command, by the command's name."""
