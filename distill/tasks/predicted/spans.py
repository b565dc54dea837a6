"""The best span of a context's windows, and lines of answers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from distill.tasks.base import EngineUsage, Task
from distill.tasks.predicted.rows import shown

LONGEST_ANSWER = 30
"""Tokens; SQuAD's answers are shorter (as in BERT's script for it)."""

_BEST = 20

SPAN_USAGE = EngineUsage(
    '[("Where do bees live?", "Bees live in hives.")]',
    """in_context = [number == 1 for number in rows[0].sequence_ids]
starts, ends = (np.where(in_context, each[0], -np.inf) for each in (start_logits, end_logits))
scores = np.where(np.tri(len(starts)).T, starts[:, None] + ends, -np.inf)  # no answer ends before it starts
start, end = divmod(int(scores.argmax()), len(starts))
print(tokenizer.decode(rows[0].ids[start : end + 1]))""",
)
"""How the answer is read from an engine's `start_logits` and `end_logits`."""


class Span(NamedTuple):
    """A span of a window's tokens."""

    score: float
    """The sum of its start's and its end's logit; −∞ where the window holds none."""
    first: int
    last: int


def best_span(starts: Sequence[int], logits: NDArray) -> Span:
    """Find the span of a window with the largest sum of a start's and an end's logit.

    Args:
        starts: of each token its first character in the context, −1 for tokens that are none of it.
        logits: 2×T of the window, perhaps padded.
    """
    known = np.array(starts) >= 0
    begin, end = (np.where(known, values[: len(starts)], -np.inf) for values in logits)
    first, last = (np.argsort(-values)[:_BEST] for values in (begin, end))
    length = last[None, :] - first[:, None]
    sums = begin[first][:, None] + end[last][None, :]
    scores = np.where((length >= 0) & (length < LONGEST_ANSWER), sums, -np.inf)
    place = np.unravel_index(scores.argmax(), scores.shape)
    return Span(float(scores[place]), int(first[place[0]]), int(last[place[1]]))


def answer_line(
    task: Task,
    tokenizer: Any,
    texts: Sequence[Any],
    windows: Sequence[Mapping[str, Any]],
    found: Sequence[NDArray],
) -> dict[str, Any]:
    """Say the best span of a row's context: its text, characters and score, and the score of there being no answer.

    A score is the probability of a start times that of an end, over the tokens of the window's context and its first
    token, which stands for no answer (Devlin et al. 2019, section 4.3); of no answer it is the least of all windows.

    Args:
        task: of the row; it changes nothing here.
        tokenizer: changes nothing here.
        texts: the row's question and context.
        windows: of each its tokens' first and last characters in the context, −1 outside of it: `starts`, `ends`.
        found: their logits 2×T.
    """
    line: dict[str, Any] = {"answer": "", "start": None, "end": None, "score": 0.0, "no_answer_score": 1.0}
    best = -np.inf
    for window, logits in zip(windows, found, strict=True):
        starts, span = window["starts"], best_span(window["starts"], logits)
        places = [0, *(place for place in range(1, len(starts)) if starts[place] >= 0)]
        first, last = (softmax(values[places].astype(np.float64)) for values in logits)
        line["no_answer_score"] = min(line["no_answer_score"], shown(float(first[0] * last[0])))
        if span.score > best:
            best, start, end = span.score, starts[span.first], window["ends"][span.last]
            score = first[places.index(span.first)] * last[places.index(span.last)]
            line |= {"answer": texts[1][start:end], "start": start, "end": end, "score": shown(float(score))}
    return line
