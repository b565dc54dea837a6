"""The tables of `distill check --help-options`."""

from dataclasses import MISSING, Field, fields

import transformers
from rich import box
from rich.table import Table

from distill.common.console import results
from distill.data.load import DataOptions
from distill.evaluation.options import BenchmarkOptions, ReportOptions
from distill.recipes.search_options import SearchOptions
from distill.recipes.trainer_options import refusal
from distill.verbs.all import VERBS


def print_options(name: str) -> None:
    """Print a table of the options of a verb or of a recipe's block."""
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
