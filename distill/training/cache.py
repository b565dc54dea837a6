"""A teacher's outputs over the training rows, computed once and then read from disk by every epoch, step and trial.

A cache is a folder of Arrow files, memory-mapped, each of some rows in order of length: the row's number, its logits
(float32), and the representations of its tokens side by side (float16). Its name is the fingerprint of the teacher's
weights, the tokenized rows and what is read, so it is found again by whoever needs the same.
"""

import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from filelock import ReadWriteLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill.common.console import log, progress
from distill.common.folders import told_of_a_full_disk
from distill.errors import InputError
from distill.models.adapters import adapter_states
from distill.models.structure import input_names
from distill.training.cache_plan import CachePlan, Layout
from distill.training.features import Representations

TEACHER_OUTPUTS = "teacher_outputs"
"""Of a batch: for each teacher what is stored of it, see `TeacherCache.read`."""

_VERSION = 2
_CHUNK_BYTES = 8 * 2**20  # of a file; a process holds one in memory while it computes it
_CHUNK_ROWS = 2048  # at most: the work that a killed process loses, and that processes are dealt
_HEX = set("0123456789abcdef")

TeacherOutputs = tuple[Tensor, Representations]


class TeacherCache:
    """Stored outputs, by the rows' numbers."""

    def __init__(self, folder: Path, layout: Layout, num_rows: int, *, in_use: ReadWriteLock | None = None):
        self.layout = layout
        self._in_use = in_use
        self._chunks = []
        self._place = np.full((num_rows, 2), -1, dtype=np.int32)
        for number, path in enumerate(sorted(folder.glob("chunk-*.arrow"))):
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            rows = batch["row"].to_numpy()
            self._place[rows, 0], self._place[rows, 1] = number, np.arange(len(rows))
            lists = {name: batch[name] for name in batch.schema.names if name != "row"}
            self._chunks.append(
                {name: (column.offsets.to_numpy(), column.values.to_numpy()) for name, column in lists.items()}
            )
        if (self._place < 0).any():
            raise InputError(
                f"cache_teacher: {folder} lacks rows; all processes need one disk for cache_dir, or say none"
            )

    def release(self) -> None:
        """Let other jobs delete the files where they need their room; what is open here can still be read."""
        if self._in_use is not None:
            self._in_use.release(force=True)

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What is stored of some rows: `logits` B×C (of tokens N×C), `states` N×S×D of their N tokens, `pooled` B×D.

        Of a causal LM's N tokens `logits` and `words` are N×k, and `tail` N.
        """
        places = self._place[numbers]
        rows: dict[str, NDArray] = {}
        for name in self._chunks[0]:
            columns = [(self._chunks[chunk][name], index) for chunk, index in places]
            rows[name] = np.concatenate(
                [values[starts[index] : starts[index + 1]] for (starts, values), index in columns]
            )
        found = {"logits": torch.from_numpy(rows["logits"]).reshape(-1, self.layout.top_k or self.layout.num_outputs)}
        if self.layout.top_k:
            found["words"] = torch.from_numpy(rows["words"]).reshape(-1, self.layout.top_k).long()
            found["tail"] = torch.from_numpy(rows["tail"])
        if "states" in rows:
            shape = (-1, self.layout.states_per_token, self.layout.width)
            found["states"] = torch.from_numpy(rows["states"]).reshape(shape)
        if "pooled" in rows:
            found["pooled"] = torch.from_numpy(rows["pooled"]).reshape(len(places), -1)
        return found


def restored(stored: dict[str, Tensor], layout: Layout, attention_mask: Tensor) -> TeacherOutputs:
    """Restore the logits and representations of a batch from what `TeacherCache.read` gave; padding is 0.

    Args:
        stored: of the rows of the batch, in its order; N tokens without padding.
        layout: of the cache.
        attention_mask: B×T, with N ones.
    """
    wanted, logits = layout.wanted, stored["logits"]
    if layout.top_k:
        logits = with_tail(logits, stored["words"], stored["tail"], layout.num_outputs)
    if layout.predicts_tokens:
        logits = _padded(logits, attention_mask)
        logits = layout.targets.tokens_first(logits)
    if "states" not in stored:
        return logits, Representations(pooled=stored.get("pooled"))
    layers = list(_padded(stored["states"].flatten(1), attention_mask).chunk(stored["states"].shape[1], dim=-1))
    hidden, rest = layers[: len(wanted.hidden)], layers[len(wanted.hidden) :]
    embedding = rest.pop(0) if wanted.embedding else None
    relations = [rest[start : start + 3] for start in range(0, len(rest), 3)]
    return logits, Representations(hidden=hidden, relations=relations, embedding=embedding, pooled=stored.get("pooled"))


def top_words(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the likeliest words of each token.

    Args:
        logits: N×V, of N tokens.
        top_k: words of each token.

    Returns:
        The log-probabilities and the ids of the k likeliest words (N×k each), and the logarithm of the probability of
        all others together (N).
    """
    log_probabilities = logits.float().log_softmax(-1)
    likeliest, words = log_probabilities.topk(top_k, dim=-1)
    return likeliest, words, log_probabilities.scatter(-1, words, -torch.inf).logsumexp(-1)


def with_tail(likeliest: Tensor, words: Tensor, tail: Tensor, num_words: int) -> Tensor:
    """Compute log-probabilities N×V from `top_words`; the words that were not kept share their probability equally.

    Args:
        likeliest: N×k log-probabilities.
        words: N×k, the ids of these words.
        tail: N, the logarithm of the probability of all other words together.
        num_words: V.
    """
    others = max(num_words - words.shape[-1], 1)
    spread = (tail.float() - math.log(others)).unsqueeze(-1).expand(-1, num_words)
    return spread.scatter(-1, words, likeliest.float())


def _padded(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Values of N tokens (N×D) as B×T×D."""
    padded = values.new_zeros(*attention_mask.shape, values.shape[-1])
    return padded.masked_scatter_(attention_mask.bool().unsqueeze(-1), values)  # unlike indexing, no GPU is waited for


def build_cache(
    model: PreTrainedModel,
    plan: CachePlan,
    rows: datasets.Dataset,
    outputs: Callable[[list[int]], tuple[TeacherOutputs, Tensor]],
    *,
    batch_size: int,
    precision: str,
    prefix: str = "",
    more: str = "",
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], Any] = lambda: None,
) -> TeacherCache:
    """Find a cache, or compute what is missing of it: each process its share, file by file; a killed one resumes.

    The caches that are unused the longest are deleted where this one needs their room, but none that another job uses.
    Jobs that compute the same one at once each write files of their own, and the first that is whole counts.

    Args:
        outputs: of the rows with these numbers, and their attention mask.
        precision: of the teacher's arithmetic, part of the fingerprint.
        prefix: of the columns that it reads.
        more: the prefix of columns that it reads beside these.
        wait: returns when all processes have come to it.
    """
    layout, lengths = plan.layout, plan.lengths
    if layout is None:
        raise ValueError("a plan to cache nothing")
    folder = plan.root / _fingerprint(model, layout, rows, precision, (prefix, more))
    chunks = _chunks(lengths, layout)
    is_main = process_index == 0
    with told_of_a_full_disk(plan.root):
        if is_main:
            _drop_half_made(folder)
        wait()
        in_use = _lock(folder)
        in_use.acquire_read()
        missing = [number for number in range(len(chunks)) if not _path(folder, number).is_file()]
        wait()  # before the first chunk is written, so that all see the same
        if missing:
            if is_main:
                _make_room(plan, folder)
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            mine = missing[process_index::num_processes]
            for number in progress(mine, "Caching the teacher") if is_main else mine:
                if not _path(folder, number).is_file():  # another job may have been quicker
                    _write_chunk(_path(folder, number), chunks[number], outputs, layout, batch_size)
            wait()
            if is_main:
                seconds = time.perf_counter() - started
                done = sum(len(chunks[number]) for number in missing)
                log.print(f"      cached {done} rows in {seconds:.0f} s ({done / seconds:.0f} rows/s)")
        elif is_main:
            log.print("      found in the cache")
            os.utime(folder)
    return TeacherCache(folder, layout, len(lengths), in_use=in_use)


def _lock(folder: Path) -> ReadWriteLock:
    """Of a cache: those who use it read, and who deletes of it writes. The system frees it where a process dies."""
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return ReadWriteLock(str(locks / f"{folder.name}.lock"), is_singleton=False)


@contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether nobody uses a cache; if so, nobody begins to within the block."""
    lock = _lock(folder)
    try:
        lock.acquire_write(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _drop_half_made(folder: Path) -> None:
    """Delete what processes that were killed left of their files."""
    with _unused(folder) as unused:
        for partial in folder.glob("*.partial") if unused else ():
            partial.unlink(missing_ok=True)


def _chunks(lengths: NDArray, layout: Layout) -> list[NDArray]:
    """Row numbers in order of length, cut where a file is full; the same cuts for every batch size and process."""
    order = np.argsort(lengths, kind="stable")
    empty = layout.size(1, 0)
    of_a_token = layout.size(0, 1)
    filled = np.maximum((empty + of_a_token * lengths[order]) / _CHUNK_BYTES, 1 / _CHUNK_ROWS).cumsum()
    return np.split(order, np.flatnonzero(np.diff(np.floor(filled)) > 0) + 1)


def _write_chunk(
    path: Path,
    numbers: NDArray,
    outputs: Callable[[list[int]], tuple[TeacherOutputs, Tensor]],
    layout: Layout,
    batch_size: int,
) -> None:
    columns: dict[str, list[tuple[NDArray, list[int]]]] = {}
    for start in range(0, len(numbers), batch_size):
        found, attention_mask = outputs(numbers[start : start + batch_size].tolist())
        for name, column in _columns(found, attention_mask, layout).items():
            columns.setdefault(name, []).append(column)
    arrays = [pa.array(numbers)]
    for parts in columns.values():
        offsets = np.cumsum([0, *(size for _, sizes in parts for size in sizes)])
        values = np.concatenate([values for values, _ in parts])
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values)))
    batch = pa.RecordBatch.from_arrays(arrays, names=["row", *columns])  # one a file, so that columns are read in place
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _columns(found: TeacherOutputs, attention_mask: Tensor, layout: Layout) -> dict[str, tuple[NDArray, list[int]]]:
    """For each column the values of all rows in a row, and how many are whose."""
    logits, shown = found
    one, valid = [1] * len(logits), attention_mask.bool()
    tokens = valid.sum(1).tolist()
    if layout.predicts_tokens:
        logits = layout.targets.tokens_first(logits)
        if layout.top_k:
            likeliest, words, tail = top_words(logits[valid], layout.top_k)
            columns = {"logits": _items(likeliest.half(), tokens), "words": _items(words.int(), tokens)}
            columns["tail"] = _items(tail.unsqueeze(-1), tokens)
        else:
            columns = {"logits": _items(logits[valid].float(), tokens)}
    else:
        columns = {"logits": _items(logits.float(), one)}
    states = [*shown.hidden, *([shown.embedding] if shown.embedding is not None else [])]
    states += [state for layer in shown.relations for state in layer]
    if states:
        columns["states"] = _items(_half(torch.stack([state[valid] for state in states], dim=1)), tokens)
    if shown.pooled is not None:
        columns["pooled"] = _items(_half(shown.pooled), one)
    return columns


def _items(values: Tensor, items_of_rows: list[int]) -> tuple[NDArray, list[int]]:
    size = values[0].numel() if len(values) else 0
    return values.cpu().contiguous().view(-1).numpy(), [size * items for items in items_of_rows]


def _half(states: Tensor) -> Tensor:
    half = states.half()
    if not half.isfinite().all():
        raise InputError("cache_teacher: the teacher's hidden states don't fit into 16 bits; say none or logits")
    return half


def _path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05}.arrow"


def _make_room(plan: CachePlan, folder: Path) -> None:
    """Delete the caches unused the longest until this one fits under the limit; none that is in use."""
    if not plan.root.is_dir():
        return
    others = [
        path
        for path in plan.root.iterdir()
        if path.is_dir() and path != folder and len(path.name) == 64 and set(path.name) <= _HEX
    ]
    sizes = {path: _size(path) for path in others}
    for path in sorted(others, key=_last_use):
        if plan.size + sum(sizes.values()) <= plan.limit:
            return
        with _unused(path) as unused:
            if unused:
                shutil.rmtree(path, ignore_errors=True)
                del sizes[path]
    if plan.size + sum(sizes.values()) > plan.limit:
        log.print("      other jobs use their caches, so all together are above cache_limit_gb for now")


def _size(folder: Path) -> int:
    """Bytes of a cache's files, some of which other jobs may be writing or deleting."""
    found = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            with suppress(FileNotFoundError):
                found += file.stat().st_size
    return found


def _last_use(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0


def _fingerprint(
    model: PreTrainedModel, layout: Layout, rows: datasets.Dataset, precision: str, prefixes: Sequence[str]
) -> str:
    digest = hashlib.sha256()
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    digest.update(json.dumps([_VERSION, layout.described(), precision, config], sort_keys=True, default=str).encode())
    digest.update("".join(adapter_states(model)).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    read = {prefix + name for prefix in prefixes for name in input_names(model)}
    columns = sorted(read & set(rows.column_names))
    for table in rows.select_columns(columns).with_format("arrow").iter(4096):
        for column in columns:
            values = table[column].combine_chunks()
            digest.update(np.asarray(pa.compute.list_value_length(values)).tobytes())
            digest.update(np.ascontiguousarray(values.flatten()).tobytes())
    return digest.hexdigest()
