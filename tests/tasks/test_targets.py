"""Labels and predictions of every kind, against the losses that transformers computes by itself, and by hand."""

from dataclasses import fields

import pytest
import torch
from transformers import (
    BertForNextSentencePrediction,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from distill.errors import InputError
from distill.tasks.classification import CLASSES, LABEL_SETS, SCORES
from distill.tasks.kinds import targets_of
from distill.tasks.language_modeling import MASKED_WORDS, NEXT_WORDS
from distill.tasks.outputs import logits_of
from distill.tasks.question_answering import ENDS
from distill.tasks.targets import Targets, mask_classes
from distill.tasks.token_classification import TAGS
from distill.training.config import TrainingConfig
from distill.training.parts import against_labels, count
from tests.conftest import make_tokenizer, tiny_bert, tiny_config
from tests.training.test_exactness import MODELS, make_models, make_rows

TARGETS = {"classes": CLASSES, "tokens": TAGS, "spans": ENDS, "masked": MASKED_WORDS, "causal": NEXT_WORDS}


def batch_of(kind):
    rows = make_rows(kind).remove_columns("length")
    if kind == "causal":
        rows = rows.remove_columns("token_type_ids")
    rows = list(rows)
    if kind == "spans":  # transformers lets padding be an end, so that a row's loss depends on its neighbours
        longest = max(len(row["input_ids"]) for row in rows)
        rows = [row for row in rows if len(row["input_ids"]) == longest]
    collator = DataCollatorWithPadding if kind == "classes" else DataCollatorForTokenClassification
    return dict(collator(make_tokenizer())(rows))


@pytest.mark.parametrize("kind", TARGETS)
def test_the_hard_loss_is_the_models_own(tmp_path, kind):
    teacher, model = make_models(kind)
    assert targets_of(teacher) is TARGETS[kind]
    batch = batch_of(kind)
    with torch.no_grad():
        outputs = model(**batch)
    counted = torch.ones(len(batch["input_ids"]), dtype=torch.bool)
    args = TrainingConfig(output_dir=str(tmp_path))
    part = against_labels(args, TARGETS[kind], logits_of(outputs), batch, counted)["hard"]
    counts = count(args, TARGETS[kind], batch, counted)
    assert (part.total / counts[part.counted]).item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_what_counts_by_hand():
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 9], [-100, 5, 6, 7]]),
    }
    counted = torch.tensor([True, True, False])
    tokens = TAGS.batch_targets(batch, counted)
    assert tokens.labels.tolist() == [[-100, 5, 6, -100], [-100] * 4, [-100] * 4]  # padding has no label
    assert tokens.mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]  # none: every token but padding
    words = NEXT_WORDS.batch_targets(batch, counted)
    assert words.labels.tolist() == [[5, 6, -100], [-100] * 3, [-100] * 3]
    assert words.mask.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert NEXT_WORDS.aligned(torch.zeros(3, 4, 2)).shape == (3, 3, 2)
    spans = {
        "attention_mask": batch["attention_mask"],
        "start_positions": torch.tensor([1, 4, 1]),
        "end_positions": torch.tensor([2, 2, 2]),
    }
    ends = ENDS.batch_targets(spans, counted)
    assert ends.labels.tolist() == [[1, 2], [-100, 2], [-100, -100]]  # 4 is beyond the row
    assert ends.mask.int().tolist() == [[1, 1], [1, 1], [0, 0]]


def test_classes_that_do_not_exist_take_no_part():
    classes = torch.tensor([[[True, True, False]]])
    logits = torch.tensor([[[1.0, 3.0, 50.0]]])
    assert mask_classes(logits, classes, as_values=False).softmax(-1)[0, 0, 2] == 0
    values = mask_classes(logits, classes, as_values=True)
    assert values.square().mean(-1).item() == pytest.approx((1 + 9) / 2)
    assert mask_classes(logits, None, as_values=True) is logits


def test_a_class_that_cannot_be_distilled_is_told():
    model = BertForNextSentencePrediction(tiny_config())
    with pytest.raises(InputError, match="BertForNextSentencePrediction: not a class that can be distilled; these can"):
        targets_of(model)
    assert set(MODELS) - {"masked anew"} <= set(TARGETS)  # whose rows have no labels


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({}, CLASSES),
        ({"num_labels": 1}, SCORES),
        ({"num_labels": 1, "problem_type": "regression"}, SCORES),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, LABEL_SETS),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, LABEL_SETS),
        ({"num_labels": 2, "problem_type": "regression"}, "BertForSequenceClassification: a regression with 2 outputs"),
        ({"problem_type": "ranking"}, "its problem_type, 'ranking', is not one that can be distilled"),
    ],
)
def test_what_a_classifier_predicts_follows_from_its_config(changes, targets):
    model = tiny_bert()
    for name, value in changes.items():
        setattr(model.config, name, value)
    if isinstance(targets, Targets):
        assert targets_of(model) is targets
    else:
        with pytest.raises(InputError, match=targets):
            targets_of(model)


@pytest.mark.parametrize("field", [field.name for field in fields(Targets)])
def test_targets_that_leave_something_out_cannot_be_made(field):
    given = {each.name: getattr(CLASSES, each.name) for each in fields(Targets)}
    assert Targets(**given) == CLASSES
    del given[field]
    with pytest.raises(TypeError, match=field):
        Targets(**given)
