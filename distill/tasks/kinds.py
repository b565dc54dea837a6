"""The kinds of task: of each what its rows and models are called, and what it is scored by."""

from collections.abc import Callable
from dataclasses import dataclass
from string import Template

import numpy as np

from distill.tasks.base import Task, TaskKind
from distill.tasks.language import (
    language_predictions,
    language_scorer,
    language_scores,
    language_while_training,
    read_language,
    token_agreement,
)
from distill.tasks.questions import (
    answer_agreement,
    answers_to,
    read_spans,
    span_scorer,
    span_scores,
    spans_while_training,
)
from distill.tasks.rows import (
    correlation,
    label_sets,
    most_likely,
    read_rows,
    row_agreement,
    row_predictions,
    row_scorer,
    row_scores,
    rows_while_training,
    scores_of,
)
from distill.tasks.scorers import Scorer
from distill.tasks.words import (
    read_tags,
    tag_agreement,
    tag_predictions,
    tag_scorer,
    tag_scores,
    tags_while_training,
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between kinds of task. Nothing has a default: a kind that leaves something out can't be made."""

    columns: tuple[str, ...]
    """Those that are read, unless the user names others."""
    label: str
    """The label's column; empty where there is none."""
    metrics: tuple[str, ...]
    """Names of `distill.tasks.rows.METRICS` or of its kind, for a user's own data."""
    primary_metric: str
    further_metrics: tuple[str, ...]
    """Keys that are computed beside the metrics'."""
    predict: Callable[[np.ndarray], np.ndarray]
    """Logits …×C of rows, tokens or ends of a span → what they predict."""
    read: Callable[..., list]
    """(model, batch, labels of its rows, the model's name) → of each row what `predictions` is made of."""
    predictions: Callable[..., list]
    """(task, tokenized rows, what `read` gave of each, the split) → predictions as in `Evaluation`."""
    scores: Callable[..., dict[str, float]]
    """(task, predictions, labels, logits B×C or None) → the metrics."""
    while_training: Callable[..., dict[str, Callable]]
    """(task, tokenized rows, the split) → what a Trainer takes: `compute_metrics`, and what goes before it."""
    scorer: Callable[..., Scorer]
    """(task, predictions, labels), one of each a row → the primary metric, for the score and for its bootstrap."""
    agreement: Callable[..., float]
    """The predictions of two models → how far they are the same."""
    names_labels: bool
    """Whether a model's config says what its outputs are (classes, tags, or the score)."""
    problem_type: str | None
    """transformers' name, as a config has it; None where its class says it all."""
    auto_class: str
    """The Auto class of transformers that loads models."""
    peft_task: str | None
    """PEFT's name for what is predicted; None where it has none."""
    heads: tuple[str, ...] | None
    """Layers that PEFT puts adapters into where it should train them as a whole; None where it knows them."""
    pipeline_tag: str
    """The Hub's name of the kind."""
    usage: str
    """Python that prints a prediction of `$model` for `$example`, for `string.Template`."""


def _pipeline(tag: str, example: str, more: str = "") -> str:
    return (
        f'from transformers import pipeline\n\npredict = pipeline("{tag}", "$model"{more})\nprint(predict({example}))'
    )


# transformers 5 has no pipeline that answers questions.
_ANSWER = """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$model")
model = AutoModelForQuestionAnswering.from_pretrained("$model").eval()
inputs = tokenizer("Where do bees live?", "Bees live in hives.", truncation="only_second", return_tensors="pt")
outputs = model(**inputs)
start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""

_TEXT, _PAIR = '"The plot is thin, but the cast was great."', '{"text": "A man is asleep.", "text_pair": "He sleeps."}'

KINDS: dict[TaskKind, Kind] = {
    "classification": Kind(
        columns=("text",),
        label="label",
        metrics=("accuracy", "f1_macro", "roc_auc"),
        primary_metric="accuracy",
        further_metrics=(),
        predict=most_likely,
        read=read_rows,
        predictions=row_predictions(most_likely),
        scores=row_scores,
        while_training=rows_while_training(most_likely),
        scorer=row_scorer,
        agreement=row_agreement,
        names_labels=True,
        problem_type="single_label_classification",
        auto_class="AutoModelForSequenceClassification",
        peft_task="SEQ_CLS",
        heads=None,
        pipeline_tag="text-classification",
        usage=_pipeline("text-classification", "$example, truncation=True"),
    ),
    "multi-label": Kind(
        columns=("text",),
        label="label",
        metrics=("f1_micro", "f1_macro", "accuracy"),
        primary_metric="f1_micro",
        further_metrics=(),
        predict=label_sets,
        read=read_rows,
        predictions=row_predictions(label_sets),
        scores=row_scores,
        while_training=rows_while_training(label_sets),
        scorer=row_scorer,
        agreement=row_agreement,
        names_labels=True,
        problem_type="multi_label_classification",
        auto_class="AutoModelForSequenceClassification",
        peft_task="SEQ_CLS",
        heads=None,
        pipeline_tag="text-classification",
        usage=_pipeline("text-classification", "$example, truncation=True, top_k=None"),
    ),
    "regression": Kind(
        columns=("text",),
        label="label",
        metrics=("pearson", "spearmanr"),
        primary_metric="pearson",
        further_metrics=(),
        predict=scores_of,
        read=read_rows,
        predictions=row_predictions(scores_of),
        scores=row_scores,
        while_training=rows_while_training(scores_of),
        scorer=row_scorer,
        agreement=correlation,
        names_labels=True,
        problem_type="regression",
        auto_class="AutoModelForSequenceClassification",
        peft_task="SEQ_CLS",
        heads=None,
        pipeline_tag="text-classification",
        usage=_pipeline("text-classification", '$example, truncation=True, function_to_apply="none"'),
    ),
    "token-classification": Kind(
        columns=("tokens",),
        label="label",
        metrics=("entity_f1", "accuracy"),
        primary_metric="entity_f1",
        further_metrics=("entity_precision", "entity_recall"),
        predict=most_likely,
        read=read_tags,
        predictions=tag_predictions,
        scores=tag_scores,
        while_training=tags_while_training,
        scorer=tag_scorer,
        agreement=tag_agreement,
        names_labels=True,
        problem_type=None,
        auto_class="AutoModelForTokenClassification",
        peft_task="TOKEN_CLS",
        heads=("classifier", "score"),
        pipeline_tag="token-classification",
        usage=_pipeline("token-classification", _TEXT, ', aggregation_strategy="first"'),
    ),
    "question-answering": Kind(
        columns=("question", "context"),
        label="answers",
        metrics=("f1", "exact_match"),
        primary_metric="f1",
        further_metrics=(),
        predict=most_likely,
        read=read_spans,
        predictions=answers_to,
        scores=span_scores,
        while_training=spans_while_training,
        scorer=span_scorer,
        agreement=answer_agreement,
        names_labels=False,
        problem_type=None,
        auto_class="AutoModelForQuestionAnswering",
        peft_task="QUESTION_ANS",
        heads=("qa_outputs", "classifier"),
        pipeline_tag="question-answering",
        usage=_ANSWER,
    ),
    "masked-lm": Kind(
        columns=("text",),
        label="",
        metrics=("perplexity", "accuracy"),
        primary_metric="perplexity",
        further_metrics=(),
        predict=most_likely,
        read=read_language,
        predictions=language_predictions,
        scores=language_scores,
        while_training=language_while_training("masked_lm"),
        scorer=language_scorer,
        agreement=token_agreement,
        names_labels=False,
        problem_type=None,
        auto_class="AutoModelForMaskedLM",
        peft_task=None,
        heads=None,
        pipeline_tag="fill-mask",
        usage=_pipeline("fill-mask", 'f"The cast was {predict.tokenizer.mask_token}."'),
    ),
    "causal-lm": Kind(
        columns=("text",),
        label="",
        metrics=("perplexity", "accuracy"),
        primary_metric="perplexity",
        further_metrics=(),
        predict=most_likely,
        read=read_language,
        predictions=language_predictions,
        scores=language_scores,
        while_training=language_while_training("causal_lm"),
        scorer=language_scorer,
        agreement=token_agreement,
        names_labels=False,
        problem_type=None,
        auto_class="AutoModelForCausalLM",
        peft_task="CAUSAL_LM",
        heads=None,
        pipeline_tag="text-generation",
        usage=_pipeline("text-generation", '"The plot", max_new_tokens=20'),
    ),
    "image-classification": Kind(
        columns=("image",),
        label="label",
        metrics=("accuracy", "f1_macro"),
        primary_metric="accuracy",
        further_metrics=(),
        predict=most_likely,
        read=read_rows,
        predictions=row_predictions(most_likely),
        scores=row_scores,
        while_training=rows_while_training(most_likely),
        scorer=row_scorer,
        agreement=row_agreement,
        names_labels=True,
        problem_type="single_label_classification",
        auto_class="AutoModelForImageClassification",
        peft_task=None,
        heads=("classifier",),
        pipeline_tag="image-classification",
        usage=_pipeline("image-classification", '"photo.jpg"'),
    ),
}
"""In the order in which they are told."""


def own_task(kind: TaskKind, text: tuple[str, ...], label: str) -> Task:
    """A task on a user's own columns; its label names are read from the data."""
    its = KINDS[kind]
    return Task("own", kind, text, label, metrics=its.metrics, primary_metric=its.primary_metric)


def usage_code(kind: TaskKind, model: str, *, pairs: bool, quantized: bool) -> str:
    """Python that loads a model and prints a prediction.

    Args:
        kind: of the task.
        model: what `from_pretrained` is given.
        pairs: whether the model reads two texts.
        quantized: whether it has a format that `import distill` registers.
    """
    code = Template(KINDS[kind].usage).safe_substitute(model=model, example=_PAIR if pairs else _TEXT)
    return f"import distill  # registers the quantized format\n{code}" if quantized else code
