"""What is cached of a teacher, how large that is, and whether it is worth it; decided before anything is computed."""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from numpy.typing import NDArray

from distill.common.folders import is_writable, nearest_existing
from distill.errors import InputError
from distill.tasks.targets import Targets
from distill.training.config import DistillationConfig
from distill.training.features import FeatureSpec


@dataclass(frozen=True)
class Layout:
    """What a cache holds of a row."""

    wanted: FeatureSpec
    num_outputs: int
    width: int
    targets: Targets
    top_k: int = 0
    """For a causal LM: likeliest words that are kept of each token, and the mass of the others in one; 0: all."""

    @cached_property
    def predicts_tokens(self) -> bool:
        """Whether logits are stored for each token; a span's are two, for its start and its end."""
        return not self.targets.per_row

    def described(self) -> dict[str, Any]:
        """What two caches must share, as JSON takes it."""
        described = {name: getattr(self, name) for name in ("num_outputs", "width", "top_k")}
        return described | {"wanted": asdict(self.wanted), "problem": self.targets.name}

    @cached_property
    def states_per_token(self) -> int:
        """Layers of hidden states, embedding layer, and three states for each layer of relations."""
        return len(self.wanted.hidden) + self.wanted.embedding + 3 * len(self.wanted.relations)

    def size(self, num_rows: int, num_tokens: int) -> int:
        """Compute how many bytes the outputs of some rows take.

        Args:
            num_rows: rows.
            num_tokens: tokens of these rows together, without padding.
        """
        per_row = 2 * self.width * self.wanted.pooled + 16
        of_one = 6 * self.top_k + 4 if self.top_k else 4 * self.num_outputs
        of_logits = of_one * (num_tokens if self.predicts_tokens else num_rows)
        return of_logits + num_rows * per_row + num_tokens * 2 * self.width * self.states_per_token


@dataclass(frozen=True)
class CachePlan:
    """What will be cached of a teacher, and where; or why nothing."""

    layout: Layout | None
    lengths: NDArray
    size: int
    """Bytes on disk."""
    root: Path
    """Of all caches."""
    limit: float
    """Bytes of all caches."""
    reason: str = ""

    def __str__(self) -> str:
        if self.layout is None:
            return f"the teacher runs in every step: {self.reason}"
        return f"caching the teacher's {_LEVELS[level(self.layout.wanted)]}: {show_bytes(self.size)} in {self.root}"


def plan_cache(
    config: DistillationConfig, layout: Layout | None, lengths: NDArray | None, *, passes: float, unfit: str | None
) -> CachePlan:
    """Decide whether a teacher is cached.

    Args:
        layout: of what the losses compare; None where attention maps are among it.
        lengths: tokens of each training row.
        passes: over the training rows.
        unfit: why these rows can't be cached.

    Raises:
        InputError: `config.cache_teacher` asks for what can't be.
    """
    mode, limit = config.cache_teacher, config.cache_limit_gb * 1e9
    root = Path(config.cache_dir) if config.cache_dir else Path(constants.HF_HOME) / "distill"
    lengths = np.zeros(0, dtype=np.int64) if lengths is None else lengths
    if layout is None:
        unfit = "attention maps, masks that are drawn anew, and a whole vocabulary for every token are not cached"
    elif not is_writable(root):
        unfit = f"nothing can be written to {root} (cache_dir)"
    size = layout.size(len(lengths), int(lengths.sum())) if layout is not None else 0
    nothing = CachePlan(None, lengths, 0, root, limit)
    if mode == "none":
        return replace(nothing, reason="cache_teacher is none")
    if mode == "auto":
        free = _free_bytes(root)
        if unfit is None and passes < _FEWEST_PASSES:
            unfit = f"{passes:.1f} passes over the rows are too few for a cache to pay"
        elif unfit is None and size > min(limit, free / 2):
            allowed = f"{show_bytes(free)} are free, and cache_limit_gb is {limit / 1e9:g}"
            unfit = f"a cache would take {show_bytes(size)}; {allowed}"
        return replace(nothing, reason=unfit) if unfit is not None else CachePlan(layout, lengths, size, root, limit)
    if unfit is not None or layout is None:
        raise InputError(f"cache_teacher: {mode} can't be: {unfit}; say auto or none")
    needed = level(layout.wanted)
    if list(_LEVELS).index(mode) < list(_LEVELS).index(needed):
        raise InputError(f"cache_teacher: {mode}, but the losses compare {_LEVELS[needed]}; say {needed}, auto or none")
    if size > limit:
        raise InputError(
            f"cache_teacher: {mode} would take {show_bytes(size)} on disk, above cache_limit_gb: {limit / 1e9:g}; "
            "raise it, or say none"
        )
    return CachePlan(layout, lengths, size, root, limit)


def passes_over_rows(args: DistillationConfig, batch_size: int, num_rows: int | None) -> float:
    """How often a training reads each of its rows.

    Args:
        batch_size: rows of a batch of this process.
        num_rows: of the training set; None where it is not known.
    """
    if args.max_steps > 0 and num_rows is not None:
        rows_of_a_step = batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps * min(rows_of_a_step, num_rows) / num_rows
    return args.num_train_epochs


_FEWEST_PASSES = 1.5  # storing and reading cost less than half of the teacher's forward

_LEVELS = {"logits": "logits", "hidden": "logits and hidden states", "relations": "logits, queries, keys and values"}


def level(wanted: FeatureSpec) -> str:
    """What `cache_teacher` calls a cache that holds all of this."""
    return "relations" if wanted.relations else "hidden" if wanted.hidden_states else "logits"


def show_bytes(size: float) -> str:
    """In GB, MB or kB."""
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:.1f} {name}"


def _free_bytes(folder: Path) -> int:
    """Of the disk that a folder, which need not exist yet, would be on."""
    return shutil.disk_usage(nearest_existing(folder)).free
