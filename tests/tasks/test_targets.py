"""Labels and predictions of every kind, against the losses that transformers computes by itself, and by hand."""

import pytest
import torch
from transformers import (
    BertForNextSentencePrediction,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from distill.errors import InputError
from distill.tasks.targets import (
    among,
    labels_of,
    logits_of,
    problem_type,
    shifted,
)
from distill.training.config import TrainingConfig
from distill.training.parts import against_labels, count
from tests.conftest import make_tokenizer, tiny_bert, tiny_config
from tests.training.test_exactness import MODELS, make_models, make_rows

KINDS = {
    "classes": "single_label_classification", "tokens": "token_classification", "spans": "question_answering",
    "masked": "masked_lm", "causal": "causal_lm",
}  # fmt: skip


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_hard_loss_is_the_models_own(tmp_path, kind):
    teacher, model = make_models(kind)
    assert problem_type(teacher) == KINDS[kind]
    batch = batch_of(kind)
    with torch.no_grad():
        outputs = model(**batch)
    counted = torch.ones(len(batch["input_ids"]), dtype=torch.bool)
    args = TrainingConfig(output_dir=str(tmp_path))
    part = against_labels(args, KINDS[kind], logits_of(outputs), batch, counted)["hard"]
    counts = count(args, KINDS[kind], batch, counted)
    assert (part.total / counts[part.counted]).item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_what_counts_by_hand():
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 9], [-100, 5, 6, 7]]),
    }
    counted = torch.tensor([True, True, False])
    tokens = labels_of("token_classification", batch, counted)
    assert tokens.labels.tolist() == [[-100, 5, 6, -100], [-100] * 4, [-100] * 4]  # padding has no label
    assert tokens.counted.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]  # none: every token but padding
    words = labels_of("causal_lm", batch, counted)
    assert words.labels.tolist() == [[5, 6, -100], [-100] * 3, [-100] * 3]
    assert words.counted.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert shifted("causal_lm", torch.zeros(3, 4, 2)).shape == (3, 3, 2)
    spans = {
        "attention_mask": batch["attention_mask"],
        "start_positions": torch.tensor([1, 4, 1]),
        "end_positions": torch.tensor([2, 2, 2]),
    }
    ends = labels_of("question_answering", spans, counted)
    assert ends.labels.tolist() == [[1, 2], [-100, 2], [-100, -100]]  # 4 is beyond the row
    assert ends.counted.int().tolist() == [[1, 1], [1, 1], [0, 0]]


def test_classes_that_do_not_exist_take_no_part():
    classes = torch.tensor([[[True, True, False]]])
    logits = torch.tensor([[[1.0, 3.0, 50.0]]])
    assert among(classes, logits, as_values=False).softmax(-1)[0, 0, 2] == 0
    values = among(classes, logits, as_values=True)
    assert values.square().mean(-1).item() == pytest.approx((1 + 9) / 2)
    assert among(None, logits, as_values=True) is logits


def test_a_class_that_cannot_be_distilled_is_told():
    model = BertForNextSentencePrediction(tiny_config())
    with pytest.raises(InputError, match="BertForNextSentencePrediction: not a class that can be distilled; these can"):
        problem_type(model)
    assert set(MODELS) - {"masked anew"} <= set(KINDS)  # whose rows have no labels
    assert problem_type(tiny_bert(num_labels=1)) == "regression"
