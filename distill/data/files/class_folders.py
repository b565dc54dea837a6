"""Rows of folders: a class of texts or images in each, and images that the rows of a file name."""

import hashlib
import re
from pathlib import Path

import datasets

from distill.common.sources import reason_of, sha256
from distill.data.files.split_files import READABLE, split_folders
from distill.data.files.text_files import text_lines
from distill.errors import InputError
from distill.tasks.base import Task

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def read_image_folders(folder: Path, task: Task) -> dict[str, datasets.Dataset]:
    """Read a folder of class folders of images, for each split (`train/<class>/*`) or of one (`<class>/*`).

    Args:
        folder: which holds them.
        task: its validation splits may be folders too, under any of their usual names.

    Returns:
        For each split rows of `image` and `label` (the class folder's name).

    Raises:
        InputError: a split without class folders with images.
    """
    found = {}
    for split, inside in (split_folders(folder, task) or {"train": folder}).items():
        files = sorted(path for path in inside.glob("*/*") if path.suffix.lower() in _IMAGES)
        if not files:
            raise InputError(f"{inside}: holds no class folders with images ({', '.join(_IMAGES)}) in it")
        rows = {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}
        found[split] = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    return found


def read_text_folders(folder: Path, task: Task, notes: list[str]) -> dict[str, datasets.Dataset]:
    """Read a folder of class folders of .txt files, for each split (`train/<class>/*.txt`) or of one (`<class>/*.txt`).

    Args:
        folder: which holds them.
        task: its validation splits may be folders too, under any of their usual names.
        notes: how files in another encoding than UTF-8 were read is appended here.

    Returns:
        For each split rows of `text` (a file's whole text) and `label` (the class folder's name).

    Raises:
        InputError: no class folders with .txt files, or a file that is no text.
    """
    inside = {split: path for split, path in split_folders(folder, task).items() if any(path.glob("*/*.txt"))}
    found = {}
    for split, place in (inside if "train" in inside else {"train": folder}).items():
        files = sorted(place.glob("*/*.txt"))
        if not files:
            raise InputError(
                f"{folder}: neither train.* ({', '.join(READABLE)}) nor class folders with .txt files in it"
            )
        remarks: list[str] = []
        texts = [_text(path, remarks) for path in files]
        if remarks:
            notes.append(f"{remarks[0]}; {len(remarks)} of {len(files)} files are like it")
        rows = {"text": texts, "label": [path.parent.name for path in files]}
        found[split] = datasets.Dataset.from_dict(rows)
    return found


def _text(path: Path, notes: list[str]) -> str:
    try:
        return "".join(text_lines(path, notes))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({reason_of(error)})") from None


def with_images(rows: datasets.Dataset, folder: Path, column: str) -> datasets.Dataset:
    """Replace the names of image files in a column by the images themselves.

    Args:
        rows: of one data file; without such a column, or where it holds neither names nor images, they stay as they
            are.
        folder: the data file's, from which the names start.
        column: the name of the column.

    Raises:
        InputError: a name leads out of that folder, or to no file, or the column holds images in some rows only.
    """
    if column not in rows.column_names:
        return rows
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        stored = rows.cast_column(column, datasets.Image(decode=False))[column]
        names = [image["path"] for image in stored if image is not None and image["bytes"] is None]
        if not names:
            return rows
        if len(names) < len(rows):
            raise InputError(f"column {column!r} holds some images and names {names[0]!r} of others; store all of them")
    elif getattr(feature, "dtype", None) == "string":
        names = list(rows[column])
    else:
        return rows
    paths = [_image_inside(folder, name, column, row) for row, name in enumerate(names, 1)]
    named = rows.add_column(f"{column} (path)", paths).remove_columns(column)  # type: ignore[call-arg]
    return named.rename_column(f"{column} (path)", column).cast_column(column, datasets.Image())


def named_images(rows: datasets.Dataset, column: str) -> str:
    """Hash the image files (SHA-256) that rows name, which the digest of their data file does not cover.

    Args:
        rows: of one split.
        column: of images; "" is returned for another one.
    """
    if not isinstance(rows.features.get(column), datasets.Image):
        return ""
    stored = rows.cast_column(column, datasets.Image(decode=False))[column]
    digest = hashlib.sha256()
    for image in stored:
        if image is not None and image["bytes"] is None:
            digest.update(sha256(Path(image["path"])).encode())
    return digest.hexdigest()


def _image_inside(folder: Path, name: str | None, column: str, row: int) -> str:
    """Find an image inside of a folder; a data set from elsewhere must not show files of this machine.

    Raises:
        InputError: the path leads out of the folder, or to no file.
    """
    if not name:
        raise InputError(f"column {column!r} names no image in row {row}")
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or re.match(r"\w+:", name):
        raise InputError(
            f"column {column!r} names {name!r} in row {row}; write paths that start at {folder}, without .."
        )
    if not path.is_file():
        raise InputError(f"column {column!r} names {path}, and there is no such file")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"column {column!r} names {path} in row {row}, a link out of {folder}; copy the image there")
    return str(path)
