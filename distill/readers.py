"""Read the splits of a data set: from the Hub, from csv, json and parquet files, or from folders of texts."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import datasets

from distill.errors import InputError
from distill.sources import hub_problem, locate, reason_of, sha256, split_revision
from distill.tasks import Task

logger = logging.getLogger(__name__)

GLUE_ON_THE_HUB = "nyu-mll/glue"

_COMMIT = re.compile("[0-9a-f]{40}")

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def _separated(path: str) -> datasets.Dataset:
    """Rows of a csv or tsv file; by their header, semicolons (of spreadsheets) or tabs separate them too.

    Only empty cells are missing values: pandas would take a class called `None` or `NA` for one.
    """
    with open(path, encoding="utf-8-sig") as file:
        header = file.readline()
    separator = max(",;\t", key=header.count)
    rows = datasets.Dataset.from_csv(path, sep=separator, keep_default_na=False, na_values=[""])
    if _UNNAMED in rows.column_names and _UNNAMED not in header:
        raise InputError(f"rows have more cells than the header has names; put texts that hold {separator!r} in quotes")
    return rows


_UNNAMED = "__index_level_0__"
"""What datasets calls a column that pandas found no name for."""

_READERS = {
    ".csv": _separated,
    ".tsv": _separated,
    ".json": datasets.Dataset.from_json,
    ".jsonl": datasets.Dataset.from_json,
    ".jsonl.gz": datasets.Dataset.from_json,
    ".parquet": datasets.Dataset.from_parquet,
}


def read_splits(
    task: Task, path: str | None, name: str | None, *, key: str = "data.path"
) -> tuple[dict[str, datasets.Dataset], str]:
    """Splits by name as they are found, and a fingerprint of their source.

    Args:
        task: its name says which part of GLUE, where `path` is None.
        path: a file (all of it `train`), a folder, `package:…`, or a Hub data set.
        name: the Hub data set's configuration.
        key: of the recipe, for messages.

    Raises:
        InputError: nothing there, or not readable.
    """
    try:
        location = locate(path or GLUE_ON_THE_HUB)
        return _read(task, location, name if path else task.name)
    except InputError as error:
        raise InputError(*(f"{key}: {problem}" for problem in error.problems)) from None


def _read(task: Task, location: str | Path, name: str | None) -> tuple[dict[str, datasets.Dataset], str]:
    if isinstance(location, str):
        return _read_hub(location, name)
    of_images = task.kind == "image-classification"
    if location.is_file():
        files = {"train": location}
    else:
        files = _split_files(location, task)
        if not files:
            return (_read_image_folders if of_images else _read_class_folders)(location), sha256(location)
    fingerprint = " ".join(f"{split} {sha256(file)}" for split, file in files.items())
    found = {split: _read_file(file) for split, file in files.items()}
    if of_images:
        found = {split: _with_images(rows, files[split].parent, task.text[0]) for split, rows in found.items()}
    return found, fingerprint


def _read_hub(reference: str, name: str | None) -> tuple[dict[str, datasets.Dataset], str]:
    where = f"{reference} ({name})" if name else reference
    path, wanted = split_revision(reference)
    try:
        loaded = datasets.load_dataset(path, name, revision=wanted)
    except Exception as error:  # the Hub client, the network and each builder raise their own kinds
        raise InputError(
            f"{hub_problem(error, reference, where=where, nothing_here='no such file or folder here')}. "
            "Without a network, give it a local folder with train.* and validation.* files"
        ) from None
    if not isinstance(loaded, dict):
        raise InputError(f"{where} has no splits")
    found = hub_revision(loaded)
    if wanted is not None and found is not None and _COMMIT.fullmatch(wanted) and found != wanted:
        # Without a network, datasets takes what was cached last, whatever revision was asked for.
        raise InputError(f"{where}: not to be had from the Hub now, and its cache holds another revision, {found}")
    return dict(loaded), " ".join(f"{split} {rows._fingerprint}" for split, rows in loaded.items())


def hub_revision(splits: Mapping[str, datasets.Dataset]) -> str | None:
    """The commit that rows from the Hub were read from; None for rows of files.

    datasets tells it nowhere, but keeps the rows of each commit in a folder named after it.
    """
    folders = [Path(file["filename"]).parent.name for rows in splits.values() for file in rows.cache_files]
    return next((name for name in folders if _COMMIT.fullmatch(name)), None)


def _split_files(folder: Path, task: Task) -> dict[str, Path]:
    """`train.*`, `validation.*` (under the task's names too) and `test.*` of a folder."""
    files: dict[str, Path] = {}
    for split in ["train", "validation", *(name for name, _ in task.validation_splits), "test"]:
        matches = [folder / f"{split}{suffix}" for suffix in _READERS if (folder / f"{split}{suffix}").is_file()]
        if len(matches) > 1:
            raise InputError(f"{folder} holds {' and '.join(m.name for m in matches)}; keep one of them")
        if matches:
            files[split] = matches[0]
    if "validation" in files and task.validation_splits[0][0] != "validation":
        files.setdefault(task.validation_splits[0][0], files.pop("validation"))
    return files


def _read_file(path: Path) -> datasets.Dataset:
    suffix = next((suffix for suffix in _READERS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise InputError(f"{path}: not a {', '.join(_READERS)} file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        rows = _READERS[suffix](str(path))
    except InputError as error:
        raise InputError(*(f"{path}: {problem}" for problem in error.problems)) from None
    except Exception as error:  # pyarrow, pandas and datasets raise their own kinds
        if "corresponds to no data" in str(error):
            raise InputError(f"{path}: the file holds no rows") from None
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            converted = f"iconv -f latin1 -t utf-8 {path.name}"
            raise InputError(f"{path}: is not UTF-8; save it as UTF-8, or convert it ({converted})") from None
        raise InputError(f"{path}: cannot be read as {suffix[1:]} ({reason_of(cause)})") from error
    if len(rows) == 0:
        raise InputError(f"{path}: the file holds no rows")
    return rows


def _with_images(rows: datasets.Dataset, folder: Path, column: str) -> datasets.Dataset:
    """The rows with images in place of the names of their files, which start at the data file's folder."""
    if column not in rows.column_names or getattr(rows.features[column], "dtype", None) != "string":
        return rows
    paths = [str(folder / name) for name in rows[column]]
    missing = next((path for path in paths if not Path(path).is_file()), None)
    if missing is not None:
        raise InputError(f"column {column!r} names {missing}, and there is no such file")
    return rows.remove_columns(column).add_column(column, paths).cast_column(column, datasets.Image())  # type: ignore


def _read_image_folders(folder: Path) -> dict[str, datasets.Dataset]:
    """`train/<class>/*` and the like, or `<class>/*` alone, as rows of `image` and `label` (the class's name)."""
    splits = {name: folder / name for name in ("train", "validation", "test") if (folder / name).is_dir()}
    found = {}
    for split, inside in (splits or {"train": folder}).items():
        files = sorted(path for path in inside.glob("*/*") if path.suffix.lower() in _IMAGES)
        if not files:
            raise InputError(f"{inside}: holds no class folders with images ({', '.join(_IMAGES)}) in it")
        rows = {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}
        found[split] = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    return found


def _read_class_folders(folder: Path) -> dict[str, datasets.Dataset]:
    """A folder `<class>/*.txt` as rows of `text` and `label` (the class's name)."""
    files = sorted(folder.glob("*/*.txt"))
    if not files:
        raise InputError(f"{folder}: neither train.* ({', '.join(_READERS)}) nor class folders with .txt files in it")
    texts, not_utf8 = [], []
    for path in files:
        content = path.read_bytes()
        try:
            texts.append(content.decode())
        except UnicodeDecodeError:
            not_utf8.append(path.name)
            texts.append(content.decode("cp1252", errors="replace"))
    if not_utf8:
        logger.warning("%s: %d of %d files are not UTF-8 and were read as cp1252", folder, len(not_utf8), len(files))
    return {"train": datasets.Dataset.from_dict({"text": texts, "label": [path.parent.name for path in files]})}
