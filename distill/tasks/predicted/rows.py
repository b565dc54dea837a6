"""Lines of kinds with one prediction a row: a class, labels, or a score."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, softmax

from distill.tasks.base import Task


def shown(value: float) -> float:
    """Round a number to six significant digits; float32 has hardly more."""
    return float(f"{value:.6g}")


def class_line(
    task: Task, tokenizer: Any, texts: Sequence[Any], windows: Sequence[Mapping[str, Any]], found: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Say the likeliest class of a row, and the probability of each.

    Args:
        task: holds the names.
        tokenizer: changes nothing here; texts and windows neither.
        texts: of the row.
        windows: of the row, one.
        found: its logits C.
    """
    logits = np.asarray(found[0], dtype=np.float64)
    names = task.label_names or ()
    return {"label": names[int(logits.argmax())], "probabilities": _by_name(names, softmax(logits))}


def labels_line(
    task: Task, tokenizer: Any, texts: Sequence[Any], windows: Sequence[Mapping[str, Any]], found: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Say the labels of a row whose probability is above a half, and the probability of each.

    Args:
        task: holds the names.
        tokenizer: changes nothing here; texts and windows neither.
        texts: of the row.
        windows: of the row, one.
        found: its logits C.
    """
    logits = np.asarray(found[0], dtype=np.float64)
    names = task.label_names or ()
    labels = [name for name, logit in zip(names, logits, strict=True) if logit > 0]
    return {"labels": labels, "probabilities": _by_name(names, expit(logits))}


def score_line(
    task: Task, tokenizer: Any, texts: Sequence[Any], windows: Sequence[Mapping[str, Any]], found: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Say the score of a row.

    Args:
        task: of the row; it changes nothing here, nor do tokenizer, texts and windows.
        tokenizer: of the model.
        texts: of the row.
        windows: of the row, one.
        found: its output, of one number.
    """
    return {"score": shown(float(np.ravel(found[0])[0]))}


def _by_name(names: Sequence[str], values: ArrayLike) -> dict[str, float]:
    return {name: shown(value) for name, value in zip(names, np.asarray(values).tolist(), strict=True)}
