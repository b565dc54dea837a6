"""The files of each split in a folder: `train.csv`, `dev.jsonl`, `test-00000-of-00002.parquet`."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from distill.data.files.text_files import PACKED, ending
from distill.errors import InputError
from distill.tasks.base import Task

READABLE = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Endings of files of rows; all but the last may be packed (`.csv.gz`)."""

_VALIDATION = ("validation", "val", "valid", "dev", "eval")

_SHARD = r"-\d+-of-(?P<count>\d+)(-[0-9a-f]+)?|[-_.]?(part)?[-_.]?\d+"
"""What follows a split's name where its rows lie in several files."""


def split_files(folder: Path, task: Task, notes: list[str]) -> dict[str, list[Path]]:
    """Find the files of each split, in a folder or in `data` inside of it; several of one split are shards in order.

    Args:
        folder: to look into.
        task: its splits are looked for by their usual names (`dev` is `validation`).
        notes: which file was taken for which split, and files that are not read, are appended here.

    Raises:
        InputError: files that each could be a split, or a shard that is missing.
    """
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    for place in places:
        found = {}
        for split, names in _names(task).items():
            files = _files(place, split, names)
            if files:
                found[split] = files
                _note(split, files, notes)
            notes += [f"{path.name} is not read ({', '.join(READABLE)} are)" for path in _of_other_kinds(place, names)]
        if found:
            return found
        notes.clear()
    return {}


def with_usual_names(found: Iterable[str], task: Task) -> dict[str, str]:
    """Map the split names of a data set to those that the task uses (`dev` to `validation`); others stay as they are.

    Args:
        found: the data set's names.
        task: whose splits are wanted.

    Raises:
        InputError: several names of one split.
    """
    found = list(found)
    usual = {}
    for split, names in _names(task).items():
        present = [name for name in found if name.lower() in names]
        if len(present) > 1 and split not in present:
            raise InputError(f"holds {' and '.join(present)}, and each could be the {split} split; keep one of them")
        if present:
            usual[split if split in present else present[0]] = split
    return {name: usual.get(name, name) for name in found}


def split_folders(folder: Path, task: Task) -> dict[str, Path]:
    """Find the folders inside of a folder that are named like splits of a task.

    Args:
        folder: to look into.
        task: its splits are looked for by their usual names (`dev` is `validation`).

    Raises:
        InputError: several folders of one split.
    """
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    usual = with_usual_names(inside, task)
    return {split: folder / name for name, split in usual.items() if split in _names(task)}


def is_readable(path: Path) -> bool:
    """Tell by a file's name whether it is of a kind that holds rows (csv, json, parquet, packed or not)."""
    return ending(path) in READABLE and not (ending(path) == ".parquet" and path.suffix.lower() in PACKED)


def _names(task: Task) -> dict[str, list[str]]:
    """List what each split may be called, the usual name first."""
    names = {"train": ["train"], "validation": list(_VALIDATION), "test": ["test"]}
    for split, _ in task.validation_splits:
        if split != "validation":
            names[split] = [split.replace("validation", name) for name in _VALIDATION]
    return names


def _files(folder: Path, split: str, names: list[str]) -> list[Path]:
    sources: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    shards = re.compile(f"(?P<split>{'|'.join(names)})({_SHARD})")
    counts = set()
    for path in sorted(folder.iterdir()):
        stem = _stem(path)
        if not is_readable(path) or not path.is_file():
            continue
        if stem in names:
            sources[(path.name,)].append(path)
        elif matched := shards.fullmatch(stem):
            sources[(matched["split"], ending(path), path.suffix)].append(path)
            counts |= {int(matched["count"])} if matched["count"] else set()
    for name in names:
        inside = sorted((folder / name).glob("*.parquet"))
        if inside:
            sources[(name, "folder")] = inside
    if len(sources) > 1:
        shown = " and ".join(files[0].relative_to(folder).as_posix() for files in sources.values())
        raise InputError(f"{folder} holds {shown}, and each could be the {split} split; keep one of them")
    files = next(iter(sources.values()), [])
    if counts and counts != {len(files)}:
        raise InputError(f"{folder} holds {len(files)} of the {max(counts)} files of the {split} split; add the others")
    return sorted(files, key=_in_order)


def _stem(path: Path) -> str:
    return (
        path.name.lower()
        .removesuffix(path.suffix.lower() if path.suffix.lower() in PACKED else "")
        .removesuffix(ending(path))
    )


def _in_order(path: Path) -> list[int | str]:
    """Make the sort key by which `train-10` comes after `train-9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _of_other_kinds(folder: Path, names: list[str]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.stem.lower() in names
            and not is_readable(path)]  # fmt: skip


def _note(split: str, files: list[Path], notes: list[str]) -> None:
    if len(files) > 1:
        notes.append(f"{split}: {len(files)} files read as one, {files[0].name} to {files[-1].name}")
    elif not _stem(files[0]).startswith(split):
        notes.append(f"{split}: {files[0].name}")
