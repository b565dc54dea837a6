"""Tagged words: the tags of a row's words, how they are scored, and how far two models agree on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import datasets
import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from distill.tasks import entities, scorers
from distill.tasks.base import (
    Batch,
    EncodeOptions,
    EngineUsage,
    Kind,
    LabelRule,
    PredictionRule,
    RowMetric,
    ScoringArguments,
    Task,
    pipeline_usage,
)
from distill.tasks.classification import CLASSES
from distill.tasks.outputs import finite_logits
from distill.tasks.predicted.tags import read_tag_probabilities, tags_line
from distill.tasks.rows import most_likely
from distill.tasks.scorers import Scorer
from distill.tasks.targets import IGNORED, any_config, targets_of_tokens


def encode_words(
    batch: Batch, numbers: Sequence[int], task: Task, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Batch:
    """Tokenize words: a word's label stands on its first token, −100 on the others; `words` numbers those with a label.

    Words beyond `max_length` and words that become no token (empty ones, zero-width characters) are not among them.

    Args:
        batch: the task's column of words and `label`.
        numbers: of the rows; they change nothing here.
        task: which column is read.
        tokenizer: a fast one, of the model that will read the rows.
        options: `max_length` in tokens, at which rows are cut.
    """
    words = batch[task.text[0]]
    encoded = tokenizer(
        words, is_split_into_words=True, truncation=True, max_length=options.max_length, return_attention_mask=False
    )
    labels, read = [], []
    for row, of_words in enumerate(batch["label"]):
        places = encoded.word_ids(row)
        first = [
            word if word is not None and word != before else None
            for word, before in zip(places, [None, *places], strict=False)
        ]
        labels.append([IGNORED if word is None else of_words[word] for word in first])
        read.append([word for word in first if word is not None and of_words[word] != IGNORED])
    cut = [bool(row.overflowing) for row in encoded.encodings or ()]
    return {**encoded, "labels": labels, "words": read, "cut": cut}


def read_tags(
    model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence[Sequence[int]], name: str
) -> list[list[int]]:
    """Predict the label ids of the words of each row of a batch that the model reads.

    Args:
        model: in evaluation mode.
        batch: its inputs, B×T.
        labels: of each row's tokens, −100 for those that stand for no word; padding is on the right.
        name: of the model, for messages.

    Raises:
        InputError: logits that are NaN or infinite.
    """
    found = finite_logits(model, batch, name).argmax(-1).numpy()
    known = [np.array(of_row) != IGNORED for of_row in labels]
    return [tags[: len(of_row)][of_row].tolist() for tags, of_row in zip(found, known, strict=True)]


def tag_predictions(
    task: Task, rows: datasets.Dataset, found: Sequence[Sequence[int]], split: datasets.Dataset
) -> list[list[int]]:
    """Spread the label ids that `read_tags` predicted over all words of each row, −100 for words that were not read.

    Args:
        task: of these rows; it changes nothing here.
        rows: the split as `encode_words` tokenized it.
        found: label ids of each row's words that were read.
        split: the rows with all of their words.
    """
    return tags_of_words(found, rows["words"], split["label"])


def tags_while_training(task: Task, rows: datasets.Dataset, split: datasets.Dataset) -> ScoringArguments:
    """Make the arguments with which a Trainer scores tagged words.

    Args:
        task: whose label names tell which tags make an entity.
        rows: the split as `encode_words` tokenized it.
        split: the rows with the labels of all their words.
    """

    def of_words(output: EvalPrediction) -> dict[str, float]:
        found = words_of(output.predictions, output.label_ids)
        return tag_scores(task, tags_of_words(found, rows["words"], split["label"]), split["label"])

    return {"preprocess_logits_for_metrics": lambda logits, _: logits.argmax(-1), "compute_metrics": of_words}


def words_of(values: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Select from values of tokens those of tokens that stand for words, row by row.

    Args:
        values: B×T.
        labels: B×T, −100 for tokens that stand for no word.
    """
    return [row[known].tolist() for row, known in zip(values, labels != IGNORED, strict=True)]


def tags_of_words(
    found: Sequence[Sequence[int]], words: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Spread label ids of the words that a model read over all words of each row, −100 for the others.

    Args:
        found: label ids of each row's words that were read.
        words: numbers of these words in their row; the others are beyond its length, or became no token.
        labels: of all words of each row.
    """
    predicted = []
    for tags, numbers, of_row in zip(found, words, labels, strict=True):
        read = dict(zip(numbers, tags, strict=True))
        predicted.append([read.get(number, IGNORED) for number in range(len(of_row))])
    return predicted


def tag_scores(
    task: Task, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], logits: None = None
) -> dict[str, float]:
    """Compute precision, recall and F1 of entities, and the share of words whose tag is right.

    Args:
        task: whose label names tell which tags make an entity.
        predictions: label ids of each row's words; −100 for words that the model did not read, which are not right.
        labels: of every word, −100 for words without one.
        logits: none are kept.
    """
    results = entities.scores(entities.entity_counts(predictions, labels, task.label_names or ()))
    pairs = [pair for rows in zip(predictions, labels, strict=True) for pair in zip(*rows, strict=True)]
    right = [found == truth for found, truth in pairs if truth != IGNORED]
    return results | {"accuracy": float(np.mean(right)) if right else 0.0}


def tag_scorer(task: Task, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Scorer:
    """Make a function of row weights that gives the entity F1 of the rows.

    Args:
        task: whose label names tell which tags make an entity.
        predictions: as in `tag_scores`.
        labels: as in `tag_scores`.
    """
    return scorers.f1(entities.entity_counts(predictions, labels, task.label_names or ()))


def tag_agreement(predictions: Sequence[Sequence[int]], baseline: Sequence[Sequence[int]]) -> float:
    """Compute the share of words that two models tag alike, without those that neither model read (−100).

    Args:
        predictions: label ids of each row's words, of one model.
        baseline: of the other.
    """
    pairs = [pair for rows in zip(predictions, baseline, strict=True) for pair in zip(*rows, strict=False)]
    return float(np.mean([first == second for first, second in pairs if (first, second) != (IGNORED, IGNORED)]))


def rows_tagged_right(task: Task, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> np.ndarray:
    """Find the rows all of whose words with a label are tagged right: N booleans.

    Args:
        task: of the rows; it changes nothing here.
        predictions: for each row its words' class ids, −100 for words that were not read; these are wrong.
        labels: for each row its words' class ids, −100 for words without a label.
    """
    pairs = [zip(*row, strict=True) for row in zip(predictions, labels, strict=True)]
    return np.array([all(truth in (found, IGNORED) for found, truth in row) for row in pairs], dtype=bool)


def rows_with_tags(task: Task, labels: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Find, for each tag, the rows that hold it: N booleans by the tag's name.

    Args:
        task: holds the names.
        labels: for each row its words' class ids, −100 for words without a label.
    """
    names = task.label_names or ()
    return {name: np.array([tag in row for row in labels], dtype=bool) for tag, name in enumerate(names)}


def tags_in_words(task: Task, tags: Sequence[int]) -> list[str | None]:
    """Name the tags of a row's words; None for words that were not read, or have none.

    Args:
        task: holds the names.
        tags: predicted or labelled, a class id for each word; −100 for those that get None.
    """
    return [None if tag == IGNORED else (task.label_names or ())[tag] for tag in tags]


def _a_label_a_word(rows: datasets.Dataset, task: Task, labels: Sequence | None) -> tuple[Sequence | None, str | None]:
    """The labels as read, and what is wrong where a row has not as many as words."""
    texts = rows[task.text[0]] if labels is not None else []
    for row, (words, of_words) in enumerate(zip(texts, labels or (), strict=True)):
        if len(of_words) != len(words or []):
            return labels, f"has {len(of_words)} labels in row {row}, which has {len(words or [])} words"
    return labels, None


def _no_tags(task: Task, words: Sequence[str]) -> list[int]:
    return [IGNORED] * len(words)


def _a_tag_a_word(task: Task, words: Sequence[str]) -> list[int]:
    return [0] * len(words)


TAGS = replace(
    CLASSES,
    name="token_classification",
    problem_type=None,
    fits=any_config,
    token_axis=1,
    batch_targets=targets_of_tokens,
)

_READ_TAGS = """for row, tags in zip(rows, logits.argmax(-1)):
    for token, tag, is_special in zip(row.tokens, tags, row.special_tokens_mask):
        if not is_special:
            print(token, names[str(tag)])"""

TOKEN_CLASSIFICATION = Kind(
    columns=("tokens",),
    pairs=False,
    reads="words",
    grouped_by=slice(None),
    label="label",
    labels=LabelRule(named=True, sets=False, tags=True, scores=False, unknown=_no_tags, complete=_a_label_a_word),
    unlabelled=True,
    stored_predictions=False,
    encode=encode_words,
    needs_offsets=True,
    strides=False,
    metrics=("entity_f1", "accuracy"),
    primary_metric="entity_f1",
    further_metrics=("entity_precision", "entity_recall"),
    targets=TAGS,
    predict=most_likely,
    read=read_tags,
    predictions=tag_predictions,
    scores=tag_scores,
    while_training=tags_while_training,
    scorer=tag_scorer,
    agreement=tag_agreement,
    row_metric=RowMetric("rows_right", rows_tagged_right),
    classes=rows_with_tags,
    outcomes=None,
    in_words=tags_in_words,
    prediction=PredictionRule(
        label=_a_tag_a_word,
        encode=encode_words,
        read=read_tag_probabilities,
        window_columns=("words",),
        reads_text=True,
        line=tags_line,
    ),
    names_labels=True,
    auto_class="AutoModelForTokenClassification",
    architectures=("ForTokenClassification",),
    peft_task="TOKEN_CLS",
    heads=("classifier", "score"),
    pipeline_tag="token-classification",
    usage=pipeline_usage(
        "token-classification", '"The plot is thin, but the cast was great."', ', aggregation_strategy="first"'
    ),
    engine_usage=EngineUsage('["The plot is thin, but the cast was great."]', _READ_TAGS),
)
