"""Predict GLUE's test rows with one model per task, and write the zip that gluebenchmark.com takes.

    python scripts/glue_submission.py 'runs/glue_table/{task}/seed-42/student' --output submission.zip
    python scripts/glue_submission.py 'org/student-{task}' --data_root path/to/glue --output submission.zip

{task} stands for cola, sst2, mrpc, stsb, mnli, qnli, qqp, rte and wnli; the MNLI model also predicts MNLI's mismatched
rows and the diagnostic set AX. The rows are the Hub's (nyu-mll/glue), or with --data_root those of files:
<task>/test.*, mnli/test_matched.*, mnli/test_mismatched.*, ax/test.*. The server wants every file, with every row.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from distill.common.console import (
    log,
    log_errors,
    remark,
    results,
)
from distill.common.hardware import compute_device
from distill.data.files.readers import read_splits
from distill.data.load import tokenize
from distill.errors import InputError
from distill.evaluation.evaluate import predict_rows
from distill.models.load import find_model, load_classifier, load_tokenizer
from distill.tasks.base import GLUE, Task


@dataclass(frozen=True)
class TestFile:
    """One file of a submission."""

    task: str
    """Whose model predicts it."""
    split: str
    num_rows: int
    """Of GLUE's test set."""
    data: str | None = None
    """The folder of its rows, where it is not the task's."""


# Names, sizes and labels as on gluebenchmark.com/tasks and in its sample submission.
FILES = {
    "CoLA.tsv": TestFile("cola", "test", 1_063),
    "SST-2.tsv": TestFile("sst2", "test", 1_821),
    "MRPC.tsv": TestFile("mrpc", "test", 1_725),
    "STS-B.tsv": TestFile("stsb", "test", 1_379),
    "MNLI-m.tsv": TestFile("mnli", "test_matched", 9_796),
    "MNLI-mm.tsv": TestFile("mnli", "test_mismatched", 9_847),
    "QNLI.tsv": TestFile("qnli", "test", 5_463),
    "QQP.tsv": TestFile("qqp", "test", 390_965),
    "RTE.tsv": TestFile("rte", "test", 3_000),
    "WNLI.tsv": TestFile("wnli", "test", 146),
    "AX.tsv": TestFile("mnli", "test", 1_104, data="ax"),
}
_IN_WORDS = ("mnli", "qnli", "rte")  # the others' labels are 0 and 1, or scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the zip.

    Returns:
        0 done; 2 the input is wrong, and nothing was written.
    """
    given = _parser().parse_args(arguments)
    try:
        rows = {name: read_test_rows(file, given.data_root) for name, file in FILES.items()}
        files = predict_files(given.models, rows)
    except InputError as error:
        log_errors(error.problems)
        return 2
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(given.output, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    for name, file in FILES.items():
        if len(rows[name]) != file.num_rows:
            log.print(remark(f"{name}: {len(rows[name]):,} rows, but the server expects {file.num_rows:,}"))
    results.print(f"→ {given.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", help="a folder or Hub id with {task} in it")
    parser.add_argument("--data_root", type=Path, help="a folder of one folder per task; else the rows are the Hub's")
    parser.add_argument("--output", type=Path, default=Path("submission.zip"))
    return parser


def read_test_rows(file: TestFile, data_root: Path | None) -> datasets.Dataset:
    """The test rows in the order of their `idx`.

    Raises:
        InputError: there are none, columns are missing, or `idx` is not 0, 1, 2, ….
    """
    task = replace(GLUE[file.task], name=file.data or file.task)
    if data_root is None:
        splits, where = read_splits(task, None, None).splits, f"nyu-mll/glue ({task.name})"
        if file.split not in splits:
            raise InputError(f"{where}: has no split {file.split}")
        rows = splits[file.split]
    else:
        where = str(data_root / task.name / file.split)
        found = sorted((data_root / task.name).glob(f"{file.split}.*"))
        if len(found) != 1:
            raise InputError(f"{where}.*: {'no such file' if not found else 'more than one file'}")
        rows = read_splits(task, str(found[0]), None).splits["train"]
    missing = [column for column in task.text if column not in rows.column_names]
    if missing:
        raise InputError(f"{where}: has no column {' and '.join(missing)}; found {', '.join(rows.column_names)}")
    if "idx" in rows.column_names:
        rows = rows.select(np.argsort(rows["idx"]))
        if list(rows["idx"]) != list(range(len(rows))):
            raise InputError(f"{where}: idx should be the rows' numbers from 0 to {len(rows) - 1}, each once")
    return rows


def predict_files(models: str, rows: dict[str, datasets.Dataset]) -> dict[str, str]:
    """The text of each file of `FILES`.

    Args:
        models: a folder or Hub id with {task} in it.
        rows: the test rows of each file.

    Raises:
        InputError: with every model that is not there, or whose labels are not the task's.
    """
    if "{task}" not in models:
        raise InputError(
            f"{models}: should hold {{task}}, which stands for the task's name; each task has its own model"
        )
    locations: dict[str, str] = {}
    problems: list[str] = []
    for task in dict.fromkeys(file.task for file in FILES.values()):
        try:
            locations[task] = find_model(models.replace("{task}", task)).location
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    texts = {}
    for task, location in locations.items():
        model = load_classifier(location, GLUE[task])
        model = model.to(compute_device())
        tokenizer = load_tokenizer(location)
        for name in [name for name, file in FILES.items() if file.task == task]:
            inputs = tokenize(
                rows[name].select_columns(list(GLUE[task].text)).add_column("label", [0] * len(rows[name])),
                GLUE[task], tokenizer, min(tokenizer.model_max_length, model.config.max_position_embeddings),
            )  # fmt: skip
            texts[name] = as_tsv(GLUE[task], predict_rows(model, tokenizer, GLUE[task], inputs, name=name))
    return {name: texts[name] for name in FILES}


def as_tsv(task: Task, predictions: Sequence[float]) -> str:
    """A file: a header, then each row's number and its label as the server writes it.

    Args:
        predictions: class ids, or scores, which are clipped to STS-B's 0 to 5.
    """
    lines = ["index\tprediction"]
    for number, prediction in enumerate(predictions):
        if task.kind == "regression":
            shown = f"{min(max(prediction, 0.0), 5.0):.3f}"
        elif task.name in _IN_WORDS:
            shown = (task.label_names or ())[int(prediction)]
        else:
            shown = str(int(prediction))
        lines.append(f"{number}\t{shown}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
