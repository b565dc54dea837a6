"""Answers from the logits of a context's windows, and how SQuAD scores them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from distill.tasks import scorers
from distill.tasks.base import Task
from distill.tasks.scorers import Scorer
from distill.tasks.targets import finite_logits

LONGEST_ANSWER = 30
"""Tokens; SQuAD's answers are shorter (as in BERT's script for it)."""

_BEST = 20


def read_spans(model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence, name: str) -> list[NDArray]:
    """The logits 2×T of each window of a batch: of starts and of ends."""
    return list(finite_logits(model, batch, name).numpy())


def answers_to(task: Task, windows: datasets.Dataset, logits: Sequence[NDArray], split: datasets.Dataset) -> list[str]:
    """A model's answer to each question.

    Args:
        windows: as `distill.data.tokenized.tokenize` makes them of the split.
        logits: 2×T of each window.
    """
    may_be_none = any(not answers["text"] for answers in split["label"])
    of_windows = zip(windows["row"], windows["starts"], windows["ends"], logits, strict=True)
    return answers_of(split[task.text[1]], of_windows, may_be_none=may_be_none)


def spans_while_training(task: Task, windows: datasets.Dataset, split: datasets.Dataset) -> dict[str, Callable]:
    """What a Trainer takes to score answers."""

    def of_spans(output: EvalPrediction) -> dict[str, float]:
        answers = answers_to(task, windows, list(np.stack(output.predictions, axis=1)), split)
        return span_scores(task, answers, split["label"])

    return {"compute_metrics": of_spans}


def answers_of(
    contexts: Sequence[str], windows: Iterable[tuple[int, list[int], list[int], NDArray]], *, may_be_none: bool
) -> list[str]:
    """The best answer to each question: the span with the largest sum of a start's and an end's logit.

    Args:
        contexts: one a question.
        windows: for each window its question's number, the first and last characters of its tokens in the context (−1
            for tokens that are none of it), and its logits 2×T.
        may_be_none: whether "" is an answer; it then is where the first token's logits are larger (Devlin et al. 2019,
            section 4.3).
    """
    best = [(-np.inf, "")] * len(contexts)
    none = np.full(len(contexts), np.inf)
    for row, starts, ends, logits in windows:
        size = len(starts)
        none[row] = min(none[row], logits[0, 0] + logits[1, 0])
        known = np.array(starts) >= 0
        begin, end = (np.where(known, values[:size], -np.inf) for values in logits)
        first, last = (np.argsort(-values)[:_BEST] for values in (begin, end))
        length = last[None, :] - first[:, None]
        sums = begin[first][:, None] + end[last][None, :]
        scores = np.where((length >= 0) & (length < LONGEST_ANSWER), sums, -np.inf)
        place = np.unravel_index(scores.argmax(), scores.shape)
        if scores[place] > best[row][0]:
            span = contexts[row][starts[first[place[0]]] : ends[last[place[1]]]]
            best[row] = (float(scores[place]), span)
    return ["" if may_be_none and none[row] > score else answer for row, (score, answer) in enumerate(best)]


def answer_scores(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """N×2: for each answer its F1 and whether it matches exactly, against the accepted one that is nearest.

    Both after case, punctuation and articles are dropped, F1 over words (Rajpurkar et al. 2016, section 6.1). No
    accepted answer of which something is left means that "" is right, as in SQuAD 2's script.
    """
    scores = [
        [max(score(answer, each) for each in _that_say_something(known)) for score in (_f1, _exact_match)]
        for answer, known in zip(answers, accepted, strict=True)
    ]
    return np.array(scores, dtype=np.float64).reshape(-1, 2)


def span_scores(task: Task, answers: Sequence[str], labels: Sequence[dict], logits: None = None) -> dict[str, float]:
    """F1 and exact match of answers, from 0 to 1; no logits are kept."""
    of_rows = answer_scores(answers, [label["text"] for label in labels])
    f1, exact = (scorers.whole(scorers.mean(values), len(values)) for values in of_rows.T)
    return {"f1": f1, "exact_match": exact}


def span_scorer(task: Task, answers: Sequence[str], labels: Sequence[dict]) -> Scorer:
    """F1 of answers of which each counts so often."""
    return scorers.mean(answer_scores(answers, [label["text"] for label in labels])[:, 0])


def answer_agreement(answers: Sequence[str], baseline: Sequence[str]) -> float:
    """The share of questions that two models answer alike, after `normalised`."""
    return float(np.mean([normalised(one) == normalised(other) for one, other in zip(answers, baseline, strict=True)]))


def _that_say_something(known: Sequence[str]) -> list[str]:
    return [answer for answer in known if normalised(answer)] or [""]


def normalised(answer: str) -> str:
    """An answer in lower case without ASCII's punctuation, articles, and spaces that say nothing.

    Exactly as SQuAD's script does it: other punctuation stays.
    """
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _exact_match(answer: str, accepted: str) -> float:
    return float(normalised(answer) == normalised(accepted))


def _f1(answer: str, accepted: str) -> float:
    found, right = normalised(answer).split(), normalised(accepted).split()
    if not found or not right:
        return float(found == right)
    same = sum((Counter(found) & Counter(right)).values())
    return 2 * same / (len(found) + len(right))
