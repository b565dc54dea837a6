"""Kinds with one prediction a text or pair of texts: classes, sets of labels (multi-label), and scores (regression)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from distill import losses
from distill.tasks.base import (
    STORED_COLUMNS,
    Batch,
    EncodeOptions,
    EngineUsage,
    Kind,
    LabelRule,
    PredictionRule,
    RowMetric,
    Task,
    labels_as_read,
    pipeline_usage,
)
from distill.tasks.predicted.rows import class_line, labels_line, score_line
from distill.tasks.rows import (
    as_predicted,
    class_in_words,
    class_outcomes,
    correlation,
    label_outcomes,
    label_sets,
    labels_in_words,
    most_likely,
    no_classes,
    read_rows,
    row_agreement,
    row_predictions,
    row_scorer,
    row_scores,
    rows_of_classes,
    rows_right,
    rows_while_training,
    scores_of,
    squared_errors,
)
from distill.tasks.targets import (
    IGNORED,
    Targets,
    as_they_are,
    kl_of_classes,
    kl_of_labels,
    likelihood_of_drawn_classes,
    likelihood_of_drawn_labels,
    log_odds,
    log_of_probabilities,
    squared_differences,
    sum_of_values,
    targets_of_rows,
)


def encode_texts(
    batch: Batch, numbers: Sequence[int], task: Task, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Batch:
    """Tokenize texts, or pairs of them, with their labels and the teacher's predictions that are stored beside them.

    Args:
        batch: the task's text columns and `label`.
        numbers: of the rows; they change nothing here.
        task: which columns are read.
        tokenizer: of the model that will read the rows.
        options: `max_length` in tokens, at which rows are cut.
    """
    columns = [batch[column] for column in task.text]
    if tokenizer.is_fast:
        encoded = tokenizer(*columns, truncation=True, max_length=options.max_length, return_attention_mask=False)
        cut = [bool(row.overflowing) for row in encoded.encodings or ()]
    else:  # those of Python don't tell what they cut
        encoded = tokenizer(*columns, verbose=False)
        cut = [len(ids) > options.max_length for ids in encoded["input_ids"]]
        for row in np.flatnonzero(cut):
            shorter = tokenizer(*(column[row] for column in columns), truncation=True, max_length=options.max_length)
            for name, values in shorter.items():
                encoded[name][row] = values
    stored = {name: batch[name] for name in STORED_COLUMNS if name in batch}
    return {**encoded, "labels": batch["label"], "cut": cut, **stored}


def _of_classes(config: PretrainedConfig) -> bool:
    return config.problem_type in (None, "single_label_classification") and config.num_labels > 1


def _of_label_sets(config: PretrainedConfig) -> bool:
    return config.problem_type == "multi_label_classification"


def _of_scores(config: PretrainedConfig) -> bool:
    of_one = config.num_labels == 1 and config.problem_type in (None, "single_label_classification")
    return of_one or config.problem_type == "regression"


CLASSES = Targets(
    name="single_label_classification",
    problem_type="single_label_classification",
    fits=_of_classes,
    label_columns=("labels",),
    output_names=("logits",),
    token_axis=None,
    one_output=False,
    over_vocabulary=False,
    masks_inputs=False,
    inputs_are_labels=False,
    float_labels=False,
    batch_targets=targets_of_rows,
    aligned=as_they_are,
    hard_loss=losses.hard_loss,
    distributions=as_they_are,
    from_probabilities=log_of_probabilities,
    divergences=kl_of_classes,
    drawn_likelihood=likelihood_of_drawn_classes,
)

LABEL_SETS = replace(
    CLASSES,
    name="multi_label_classification",
    problem_type="multi_label_classification",
    fits=_of_label_sets,
    float_labels=True,
    distributions=losses.per_label,
    from_probabilities=log_odds,
    divergences=kl_of_labels,
    drawn_likelihood=likelihood_of_drawn_labels,
)

SCORES = replace(
    CLASSES,
    name="regression",
    problem_type="regression",
    fits=_of_scores,
    one_output=True,
    float_labels=True,
    distributions=None,
    divergences=squared_differences,
    drawn_likelihood=sum_of_values,
)


def _no_class(task: Task, text: Any) -> int:
    return IGNORED


def _no_labels(task: Task, text: Any) -> list[float]:
    return [float("nan")] * task.num_labels


def _no_score(task: Task, text: Any) -> float:
    return float("nan")


ONE_CLASS = LabelRule(named=True, sets=False, tags=False, scores=False, unknown=_no_class, complete=labels_as_read)

_READ_CLASS = """scores = np.exp(logits - logits.max(-1, keepdims=True))
scores /= scores.sum(-1, keepdims=True)
for row in scores:
    print(names[str(row.argmax())], float(row.max()))"""
_READ_LABELS = """for row in 1 / (1 + np.exp(-logits)):
    print({names[str(number)]: score for number, score in enumerate(row.tolist())})"""
CLASS_LINES = PredictionRule(
    label=_no_class, encode=encode_texts, read=read_rows, window_columns=(), reads_text=False, line=class_line
)

CLASSIFICATION = Kind(
    columns=("text",),
    pairs=True,
    reads="text",
    grouped_by=slice(None),
    label="label",
    labels=ONE_CLASS,
    unlabelled=True,
    stored_predictions=True,
    encode=encode_texts,
    needs_offsets=False,
    strides=False,
    metrics=("accuracy", "f1_macro", "roc_auc"),
    primary_metric="accuracy",
    further_metrics=(),
    targets=CLASSES,
    predict=most_likely,
    read=read_rows,
    predictions=row_predictions(most_likely),
    scores=row_scores,
    while_training=rows_while_training(most_likely),
    scorer=row_scorer,
    agreement=row_agreement,
    row_metric=RowMetric("accuracy", rows_right),
    classes=rows_of_classes,
    outcomes=class_outcomes,
    in_words=class_in_words,
    prediction=CLASS_LINES,
    names_labels=True,
    auto_class="AutoModelForSequenceClassification",
    architectures=("ForSequenceClassification",),
    peft_task="SEQ_CLS",
    heads=None,
    pipeline_tag="text-classification",
    usage=pipeline_usage("text-classification", "$example, truncation=True"),
    engine_usage=EngineUsage("[$example]", _READ_CLASS),
)

_OF_TEXTS_OR_IMAGES = ("ForSequenceClassification", "ForImageClassification")
"""In Python; recipes name kinds of text alone."""

MULTI_LABEL = replace(
    CLASSIFICATION,
    labels=replace(ONE_CLASS, sets=True, unknown=_no_labels),
    metrics=("f1_micro", "f1_macro", "accuracy"),
    primary_metric="f1_micro",
    targets=LABEL_SETS,
    predict=label_sets,
    predictions=row_predictions(label_sets),
    while_training=rows_while_training(label_sets),
    outcomes=label_outcomes,
    in_words=labels_in_words,
    prediction=replace(CLASS_LINES, label=_no_labels, line=labels_line),
    architectures=_OF_TEXTS_OR_IMAGES,
    usage=pipeline_usage("text-classification", "$example, truncation=True, top_k=None"),
    engine_usage=EngineUsage("[$example]", _READ_LABELS),
)

REGRESSION = replace(
    CLASSIFICATION,
    labels=replace(ONE_CLASS, named=False, scores=True, unknown=_no_score),
    metrics=("pearson", "spearmanr"),
    primary_metric="pearson",
    targets=SCORES,
    predict=scores_of,
    predictions=row_predictions(scores_of),
    while_training=rows_while_training(scores_of),
    architectures=_OF_TEXTS_OR_IMAGES,
    agreement=correlation,
    row_metric=RowMetric("squared_error", squared_errors),
    classes=no_classes,
    outcomes=None,
    in_words=as_predicted,
    prediction=replace(CLASS_LINES, label=_no_score, line=score_line),
    usage=pipeline_usage("text-classification", '$example, truncation=True, function_to_apply="none"'),
    engine_usage=EngineUsage("[$example]", "print(logits[:, 0].tolist())"),
)
