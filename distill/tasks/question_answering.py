"""Answers from the logits of a context's windows, and how SQuAD scores them."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from distill.tasks import scorers
from distill.tasks.base import Batch, EncodeOptions, Kind, LabelRule, PredictionRule, RowMetric, ScoringArguments, Task
from distill.tasks.classification import CLASSES
from distill.tasks.outputs import finite_logits
from distill.tasks.predicted.spans import SPAN_USAGE, answer_line, best_span
from distill.tasks.rows import most_likely, no_classes
from distill.tasks.scorers import Scorer
from distill.tasks.targets import IGNORED, SPAN_LABELS, BatchTargets, any_config

_LONGEST_QUESTION = 64
_IMPOSSIBLE = "is_impossible"
"""SQuAD 2's column of whether a question has no answer."""


def encode_windows(
    batch: Batch, numbers: Sequence[int], task: Task, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Batch:
    """Tokenize questions, each with overlapping windows of its context.

    The label of a window that does not hold the answer is its first token.

    `row` is the number of the row, `starts` and `ends` are the characters of the context under each token, −1 for
    tokens that are none of it. Windows share a third of their tokens, unless the options say otherwise.

    Args:
        batch: the task's columns (questions, contexts) and `label`.
        numbers: of the rows in their split.
        task: which columns are read.
        tokenizer: a fast one, of the model that will read the rows.
        options: `max_length` and `stride` in tokens.
    """
    max_length, stride = options.max_length, options.stride
    stride = max_length // 3 if stride is None else stride
    room = max_length - stride - tokenizer.num_special_tokens_to_add(pair=True) - 1
    longest = max(1, min(_LONGEST_QUESTION, room))
    questions = [_shortened(question, tokenizer, longest) for question in batch[task.text[0]]]
    encoded = tokenizer(
        questions,
        batch[task.text[1]],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    rows, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    is_cut = [short != question for short, question in zip(questions, batch[task.text[0]], strict=True)]
    more: Batch = {name: [] for name in ("row", "starts", "ends", "start_positions", "end_positions", "cut")}
    for window, row in enumerate(rows):
        of_context = [part == 1 for part in encoded.sequence_ids(window)]
        places = np.where(np.array(of_context)[:, None], np.array(offsets[window]), -1)
        first, last = _tokens_of_answer(places, batch["label"][row])
        values = (numbers[row], places[:, 0].tolist(), places[:, 1].tolist(), first, last, is_cut[row])
        for name, value in zip(more, values, strict=True):
            more[name].append(value)
    return {**encoded, **more}


def _shortened(question: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
    """The first tokens of a question, as a longer one would leave no room for its context."""
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return question if len(offsets) <= longest else question[: offsets[longest - 1][1]]


def _tokens_of_answer(places: np.ndarray, answers: dict[str, list]) -> tuple[int, int]:
    """First and last token of the first answer; the first token of all where it has none or does not stand here.

    Args:
        places: T×2 first and last character of each token, −1 outside of the context.
    """
    if not answers["text"]:
        return 0, 0
    begins = answers["answer_start"][0]
    ends = begins + len(answers["text"][0])
    touched = np.flatnonzero((places[:, 0] < ends) & (places[:, 1] > begins))
    known = places[:, 0] >= 0
    if not len(touched) or places[known, 0].min() > begins or places[known, 1].max() < ends:
        return 0, 0
    return int(touched[0]), int(touched[-1])


def targets_of_ends(batch: Mapping[str, Tensor], counted_rows: Tensor) -> BatchTargets:
    """Find the labels and mask of a batch of spans: their first and last tokens, B×2; padding can be no end.

    Args:
        batch: `attention_mask`, and B of each of `SPAN_LABELS` where there are labels.
        counted_rows: B booleans.
    """
    both, classes = counted_rows.unsqueeze(-1).expand(-1, 2), batch["attention_mask"].bool().unsqueeze(1)
    if not set(SPAN_LABELS) <= batch.keys():
        return BatchTargets(None, both, classes)
    ends = torch.stack([batch[name] for name in SPAN_LABELS], dim=1)
    known = both & (ends >= 0) & (ends < classes.shape[-1])
    return BatchTargets(ends.masked_fill(~known, IGNORED), both, classes)


def read_spans(model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence, name: str) -> list[NDArray]:
    """Compute the logits 2×T of each window of a batch: those of starts and of ends.

    Args:
        model: in evaluation mode.
        batch: its inputs, B×T.
        labels: of the windows; they change nothing here.
        name: of the model, for messages.

    Raises:
        InputError: logits that are NaN or infinite.
    """
    return list(finite_logits(model, batch, name).numpy())


def answers_to(task: Task, windows: datasets.Dataset, logits: Sequence[NDArray], split: datasets.Dataset) -> list[str]:
    """Find a model's answer to each question of a split.

    Args:
        task: which column holds the contexts.
        windows: as `distill.data.tokenized.tokenize` makes them of the split.
        logits: 2×T of each window.
        split: its rows; where one has no answer, "" is an answer too.
    """
    may_be_none = any(not answers["text"] for answers in split["label"])
    of_windows = zip(windows["row"], windows["starts"], windows["ends"], logits, strict=True)
    return answers_of(split[task.text[1]], of_windows, may_be_none=may_be_none)


def spans_while_training(task: Task, windows: datasets.Dataset, split: datasets.Dataset) -> ScoringArguments:
    """Make the arguments with which a Trainer scores answers.

    Args:
        task: which column holds the contexts.
        windows: as `distill.data.tokenized.tokenize` makes them of the split.
        split: its rows.
    """

    def of_spans(output: EvalPrediction) -> dict[str, float]:
        answers = answers_to(task, windows, list(np.stack(output.predictions, axis=1)), split)
        return span_scores(task, answers, split["label"])

    return {"compute_metrics": of_spans}


def answers_of(
    contexts: Sequence[str], windows: Iterable[tuple[int, list[int], list[int], NDArray]], *, may_be_none: bool
) -> list[str]:
    """Choose the best answer to each question: the span with the largest sum of a start's and an end's logit.

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
        none[row] = min(none[row], logits[0, 0] + logits[1, 0])
        span = best_span(starts, logits)
        if span.score > best[row][0]:
            best[row] = (span.score, contexts[row][starts[span.first] : ends[span.last]])
    return ["" if may_be_none and none[row] > score else answer for row, (score, answer) in enumerate(best)]


def answer_scores(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Compute for each of N answers its F1, and whether it matches exactly, against the nearest accepted answer: N×2.

    Both after case, punctuation and articles are dropped, F1 over words (Rajpurkar et al. 2016, section 6.1).

    Args:
        answers: one a question.
        accepted: the answers to each question that are right; none of which something is left means that "" is right,
            as in SQuAD 2's script.
    """
    scores = [
        [max(score(answer, each) for each in _that_say_something(known)) for score in (_f1, _exact_match)]
        for answer, known in zip(answers, accepted, strict=True)
    ]
    return np.array(scores, dtype=np.float64).reshape(-1, 2)


def span_scores(task: Task, answers: Sequence[str], labels: Sequence[dict], logits: None = None) -> dict[str, float]:
    """Compute F1 and exact match of answers, from 0 to 1.

    Args:
        task: of these rows; it changes nothing here.
        answers: one a question.
        labels: SQuAD's `answers` of each question, with its `text`s.
        logits: none are kept.
    """
    of_rows = answer_scores(answers, [label["text"] for label in labels])
    f1, exact = (scorers.whole(scorers.mean(values), len(values)) for values in of_rows.T)
    return {"f1": f1, "exact_match": exact}


def span_scorer(task: Task, answers: Sequence[str], labels: Sequence[dict]) -> Scorer:
    """Make a function of row weights that gives the F1 of answers.

    Args:
        task: of these rows; it changes nothing here.
        answers: one a question.
        labels: as in `span_scores`.
    """
    return scorers.mean(answer_scores(answers, [label["text"] for label in labels])[:, 0])


def rows_answered_right(task: Task, answers: Sequence[str], labels: Sequence[dict]) -> np.ndarray:
    """Find the questions whose answer matches an accepted one exactly, as `answer_scores` compares them: N booleans.

    Args:
        task: of the questions; it changes nothing here.
        answers: predicted, one a question.
        labels: for each question its accepted answers, under `text`.
    """
    return answer_scores(answers, [label["text"] for label in labels])[:, 1] == 1


def answers_in_words(task: Task, label: str | dict[str, list]) -> str | list[str]:
    """Show an answer as it is, or of a label the accepted ones: the `Kind.in_words` of question answering.

    Args:
        task: of the question; it changes nothing here.
        label: a predicted answer, or a label that holds the accepted ones under `text`.
    """
    return label if isinstance(label, str) else label["text"]


def answer_agreement(answers: Sequence[str], baseline: Sequence[str]) -> float:
    """Compute the share of questions that two models answer alike, after `normalised`.

    Args:
        answers: of one model, one a question.
        baseline: of the other.
    """
    return float(np.mean([normalised(one) == normalised(other) for one, other in zip(answers, baseline, strict=True)]))


def _that_say_something(known: Sequence[str]) -> list[str]:
    return [answer for answer in known if normalised(answer)] or [""]


def normalised(answer: str) -> str:
    """Write an answer in lower case without ASCII's punctuation, articles, and spaces that say nothing.

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


def _accepted_answers(
    rows: datasets.Dataset, task: Task, labels: Sequence | None
) -> tuple[Sequence | None, str | None]:
    """`LabelRule.complete`: the accepted answers of each question, from the columns themselves."""
    impossible = rows[_IMPOSSIBLE] if _IMPOSSIBLE in rows.column_names else [None] * len(rows)
    return _encode_answers(rows[task.text[1]], rows[task.label], impossible)


def _encode_answers(contexts: list[str], values: list[Any], impossible: list[bool | None]) -> tuple[list, str | None]:
    """The accepted answers of each question: `text`, and `answer_start` in characters of the context.

    A question has no answer where the lists are empty, hold the empty text alone, or are missing, and where SQuAD 2's
    `is_impossible` says so: `text` is then empty.
    """
    if values and all(given is None for given in values) and not any(impossible):
        return [], "has no answer in any row; SQuAD's form is text and answer_start, empty lists for no answer"
    encoded: list[dict[str, list]] = []
    for row, (context, given) in enumerate(zip(contexts, values, strict=True)):
        if isinstance(given, list):  # one answer each, as in SQuAD's own file
            given = {key: [each[key] for each in given if key in each] for key in ("text", "answer_start")}
        if given is None or impossible[row] in (True, 1):
            encoded.append({"text": [], "answer_start": []})
            continue
        if not isinstance(given, dict) or not {"text", "answer_start"} <= given.keys():
            return [], f"has no text and answer_start in row {row} (SQuAD's form)"
        texts, starts = (_as_list(given[key]) for key in ("text", "answer_start"))
        if not any(texts):  # [""], with a place or without
            texts, starts = [], []
        if len(texts) != len(starts):
            return [], f"has {len(texts)} answers but {len(starts)} places in row {row}"
        pairs = [(text, start) for text, start in zip(texts, starts, strict=True) if text]
        texts, starts = [text for text, _ in pairs], [start for _, start in pairs]
        wrong = [text for text, start in zip(texts, starts, strict=True) if context[start : start + len(text)] != text]
        if wrong:
            return [], f"says where {wrong[0]!r} stands in the context of row {row}, but it does not stand there"
        encoded.append({"text": texts, "answer_start": starts})
    return encoded, None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _no_answers(task: Task, text: Any) -> dict[str, list]:
    return {"text": [], "answer_start": []}


ENDS = replace(
    CLASSES,
    name="question_answering",
    problem_type=None,
    fits=any_config,
    label_columns=SPAN_LABELS,
    output_names=("start_logits", "end_logits"),
    token_axis=2,
    batch_targets=targets_of_ends,
)

# transformers 5 has no pipeline that answers questions.
_USAGE = """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$model")
model = AutoModelForQuestionAnswering.from_pretrained("$model").eval()
inputs = tokenizer("Where do bees live?", "Bees live in hives.", truncation="only_second", return_tensors="pt")
outputs = model(**inputs)
start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""

QUESTION_ANSWERING = Kind(
    columns=("question", "context"),
    pairs=False,
    reads="text",
    grouped_by=slice(1, None),
    label="answers",
    labels=LabelRule(
        named=False, sets=False, tags=False, scores=False, unknown=_no_answers, complete=_accepted_answers
    ),
    unlabelled=False,
    stored_predictions=False,
    encode=encode_windows,
    needs_offsets=True,
    strides=True,
    metrics=("f1", "exact_match"),
    primary_metric="f1",
    further_metrics=(),
    targets=ENDS,
    predict=most_likely,
    read=read_spans,
    predictions=answers_to,
    scores=span_scores,
    while_training=spans_while_training,
    scorer=span_scorer,
    agreement=answer_agreement,
    row_metric=RowMetric("exact_match", rows_answered_right),
    classes=no_classes,
    outcomes=None,
    in_words=answers_in_words,
    prediction=PredictionRule(
        label=_no_answers,
        encode=encode_windows,
        read=read_spans,
        window_columns=("starts", "ends"),
        reads_text=True,
        line=answer_line,
    ),
    names_labels=False,
    auto_class="AutoModelForQuestionAnswering",
    architectures=("ForQuestionAnswering",),
    peft_task="QUESTION_ANS",
    heads=("qa_outputs", "classifier"),
    pipeline_tag="question-answering",
    usage=_USAGE,
    engine_usage=SPAN_USAGE,
)
