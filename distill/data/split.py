"""The split of rows into those to train on and those to score: a validation part cut from train, random parts."""

import hashlib
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from distill.data.spill import Spill
from distill.errors import InputError
from distill.tasks.base import Task
from distill.tasks.kinds import KINDS

_ROWS_AT_ONCE = 10_000


def cut_validation(
    rows: datasets.Dataset, task: Task, *, fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut a seeded share of every class off the training rows; rows with equal texts stay together, so none leaks.

    Args:
        rows: the checked training rows.
        task: what their columns are.
        fraction: share of the rows to cut off.
        seed: of the choice.

    Returns:
        The rows to train on, and those to validate on.

    Raises:
        InputError: every label is another, or one of the two would be empty.
    """
    labels = np.zeros(len(rows), np.int8)
    of_classes = KINDS[task.kind].labels.one_class
    if of_classes:
        labels = rows.with_format("arrow")["label"][:].to_numpy()
    order, is_first = _by_text(rows, task)
    firsts = np.sort(order[is_first])
    by_class = [firsts[labels[firsts] == label] for label in np.unique(labels[firsts])]
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(of_class)).astype(order.dtype) for of_class in by_class]
    counts = _counts_to_cut([len(of_class) for of_class in by_class], fraction, generator)
    is_cut = np.zeros(len(rows), bool)
    for of_class, chosen, count in zip(by_class, orders, counts, strict=True):
        is_cut[of_class[chosen[:count]]] = True
    is_cut[order] = is_cut[order[is_first]][np.cumsum(is_first, dtype=order.dtype) - 1]  # all rows of a text
    cut = int(is_cut.sum())
    if not cut and of_classes and len(by_class) == len(rows):
        raise InputError(
            f"data.label: column {task.label!r} has another label in each of {len(rows)} rows; name the column of the "
            "classes, or say kind: regression for scores"
        )
    if cut in (0, len(rows)):
        raise InputError(
            f"data.validation_fraction: {fraction} of {len(rows)} rows leaves "
            f"{len(rows) - cut} to train on and {cut} to validate; add rows, or give a validation file"
        )
    return _chosen(rows, ~is_cut), _chosen(rows, is_cut)


def random_part(rows: datasets.Dataset, limit: int, seed: int) -> datasets.Dataset:
    """Draw a seeded random part of at most `limit` rows, in their order.

    Args:
        rows: of one split.
        limit: number of rows.
        seed: of the draw.
    """
    wanted = np.zeros(len(rows), bool)
    wanted[np.random.default_rng(seed).permutation(len(rows))[:limit]] = True
    return _chosen(rows, wanted)


def _chosen(rows: datasets.Dataset, wanted: NDArray[np.bool_]) -> datasets.Dataset:
    """Select some of the rows in their order; texts are copied, as `datasets` reads selected rows one by one.

    Args:
        wanted: of each row whether it is among them.
    """
    if any(isinstance(feature, datasets.Image) for feature in rows.features.values()):  # these are not copied
        return rows.select(np.flatnonzero(wanted))
    kept, start = Spill(), 0
    for table in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
        kept.add(table.filter(pa.array(wanted[start : start + len(table)])))
        start += len(table)
    name = hashlib.sha256(rows._fingerprint.encode() + np.packbits(wanted).tobytes()).hexdigest()
    table = InMemoryTable(pa.concat_tables(kept.tables()))
    return datasets.Dataset(table, info=rows.info, split=rows.split, fingerprint=name[:16])


def classes_without_rows(rows: datasets.Dataset, task: Task) -> int:
    """Count the classes of a task that no row has; 0 for tasks without classes.

    Args:
        rows: checked rows, with their class ids in `label`.
        task: whose classes are counted.
    """
    return task.num_labels - len(set(rows["label"])) if KINDS[task.kind].labels.one_class else 0


def _counts_to_cut(sizes: list[int], fraction: float, generator: np.random.Generator) -> list[int]:
    """Choose how many rows of each class are cut off, never all of one.

    Each class gives its share, rounded. Where that misses the whole's share, as it does if most classes are small (0.4
    of a row rounds to none), the shares are rounded by the largest remainder, ties by chance.
    """
    rounded = [min(round(size * fraction), size - 1) for size in sizes]
    wanted = sum(sizes) * fraction
    if sum(rounded) > 0 and abs(sum(rounded) - wanted) <= max(1, min(np.sqrt(len(sizes)), wanted / 4)):
        return rounded
    total = round(wanted)
    divisible = sum(size for size in sizes if size > 1)
    shares = np.array([size * total / divisible if size > 1 else 0.0 for size in sizes])
    counts = np.minimum(np.floor(shares), np.array(sizes) - 1).astype(int)
    remainders = np.round(shares - np.floor(shares), 9)
    by_remainder = sorted(range(len(sizes)), key=lambda place: (-remainders[place], generator.random()))
    for place in by_remainder:
        if counts.sum() < total and counts[place] < sizes[place] - 1:
            counts[place] += 1
    return counts.tolist()


def _by_text(rows: datasets.Dataset, task: Task) -> tuple[NDArray[Any], NDArray[Any]]:
    """Order the rows' numbers so that equal texts are side by side, and tell of each whether it is its text's first.

    Arrays of a million rows are tens of megabytes, so the numbers are of 32 bits where these are enough.
    """
    hashes = _hashes(rows, task)
    order = np.argsort(hashes, kind="stable").astype(np.int32 if len(rows) < 2**31 else np.int64)
    hashes = hashes[order]
    return order, np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(rows)]


def _hashes(rows: datasets.Dataset, task: Task) -> NDArray[np.uint64]:
    """Hash (64 bits) what tells a row from others: its texts, or for questions the context alone, or an image's bytes.

    Of a million different texts two have the same ones with a chance of 3 in 10⁸, and then share a side.
    """
    its = KINDS[task.kind]
    if its.reads == "images":
        raw = rows.cast_column(task.text[0], datasets.Image(decode=False))[task.text[0]]
        texts = (str(image["bytes"] or image["path"]) for image in raw)
    else:
        columns = list(task.text[its.grouped_by])
        batches = rows.select_columns(columns).iter(_ROWS_AT_ONCE)
        of_batches = (zip(*(batch[column] for column in columns), strict=True) for batch in batches)
        texts = (str(row) for batch in of_batches for row in batch)  # words are in a list
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64, len(rows))
