"""Parts of the loss where student and teacher read some rows as other tokens."""

import pytest
import torch

from distill import DistillationConfig, DistillationTrainer, InputError
from tests.conftest import make_tokenizer, tiny_bert
from tests.training.test_exactness import OFF, make_models, make_rows, train

KIND = "some rows of other tokens"


def make_trainer(folder, rows, teacher=None, **options):
    made = make_models(KIND)
    return DistillationTrainer(
        model=made[1], teacher=teacher or made[0], train_dataset=rows, processing_class=make_tokenizer(),
        args=DistillationConfig(
            output_dir=str(folder), per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True,
            bf16=False, learning_rate=1e-2, logging_steps=1, **{"max_steps": 2, **options},
        ),
    )  # fmt: skip


def by_hand(rows, name):
    """For each row of the same tokens, what `name` compares of it, by transformers alone: a row at a time, unpadded."""
    teacher, student = make_models(KIND)
    distances, tokens = [], 0
    for row in rows:
        if not row["teacher1_same_tokens"]:
            continue
        tokens += len(row["input_ids"])
        found = [
            model(input_ids=torch.tensor([row[column]]), output_hidden_states=True, output_attentions=True)
            for model, column in ((student.eval(), "input_ids"), (teacher, "teacher1_input_ids"))
        ]
        if name == "attention":
            pairs = [(0, 1), (1, 3)]
            maps = [(found[0].attentions[s][0], found[1].attentions[t][0]) for s, t in pairs]
            distances += [(ours - theirs).square().mean((0, 2)).sum() / 2 for ours, theirs in maps]
        elif name == "embedding":
            distances.append((found[0].hidden_states[0] - found[1].hidden_states[0]).square().mean(-1).sum())
        else:
            pairs = [(1, 2), (2, 4)]
            states = [(found[0].hidden_states[s][0], found[1].hidden_states[t][0]) for s, t in pairs]
            distances += [(ours - theirs).square().mean(-1).sum() / 2 for ours, theirs in states]
    return (sum(distances) / tokens).item()


@pytest.fixture
def eager(monkeypatch):
    """Models whose attention can be read outside of a trainer."""
    import tests.training.test_exactness as exactness

    made = exactness.make_models

    def models(*arguments):
        found = made(*arguments)
        for model in found:
            model.set_attn_implementation("eager")
        return found

    monkeypatch.setattr("tests.training.test_parts.make_models", models)


@pytest.mark.parametrize("name", ["hidden", "embedding", "attention"])
def test_losses_of_tokens_are_means_over_the_rows_of_the_same_tokens(tmp_path, name, eager):
    rows = make_rows(KIND)
    maps = {"layer_map": "uniform", "attention_layer_map": "uniform"}
    trainer = make_trainer(tmp_path, rows, **{**OFF, f"{name}_weight": 1.0, "soft_weight": 0.5, **maps})
    evaluated = trainer.evaluate(rows)
    assert evaluated[f"eval_loss/{name}"] == pytest.approx(by_hand(rows, name), rel=1e-4)
    trainer.train()
    assert trainer.state.log_history[1][f"loss/{name}"] == pytest.approx(by_hand(rows, name), rel=1e-3)


def test_all_rows_count_in_the_soft_loss(tmp_path):
    rows = make_rows(KIND)
    without = rows.remove_columns("teacher1_same_tokens")
    found = [make_trainer(tmp_path, each).evaluate(each)["eval_loss/soft"] for each in (rows, without)]
    assert found[0] == found[1]


def test_a_teacher_that_reads_all_rows_alike_teaches_as_one_with_the_same_tokenizer(tmp_path):
    options = {f"{part}_weight": 0.3 for part in ("hidden", "relation", "embedding", "attention", "contrastive")}
    rows = make_rows()
    beside = rows.add_column("teacher1_input_ids", rows["input_ids"])
    beside = beside.add_column("teacher1_token_type_ids", rows["token_type_ids"])
    beside = beside.add_column("teacher1_attention_mask", rows["attention_mask"])
    beside = beside.add_column("teacher1_same_tokens", [True] * len(rows))
    weights = []
    for each in (rows, beside):
        trainer = make_trainer(tmp_path, each, teacher=tiny_bert(), **options)
        trainer.train()
        weights.append(trainer.student.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("cache", ["hidden", "relations"])
def test_a_cached_teacher_teaches_as_a_live_one(tmp_path, cache):
    options = {"hidden_weight": 0.5, "embedding_weight": 0.5, "contrastive_weight": 0.1}
    options |= {"relation_weight": 0.5} if cache == "relations" else {}
    options |= {"optim": "sgd", "max_steps": 3}
    weights = []
    for how in ("none", cache):
        trainer = make_trainer(tmp_path, make_rows(KIND), cache_teacher=how, cache_dir=str(tmp_path / "c"), **options)
        trainer.train()
        weights.append(trainer.student.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)


def test_two_teachers_weigh_what_each_compares(tmp_path):
    """The mean over pairs of a token and a teacher, each weighing as its teacher does."""
    rows = make_rows(KIND)
    theirs, ours = make_models(KIND)[0], tiny_bert(seed=7)
    weights = {**OFF, "hidden_weight": 1.0, "soft_weight": 0.1, "teacher_weights": [1, 3]}
    both = make_trainer(tmp_path, rows, teacher=[theirs, ours], **weights).evaluate(rows)["eval_loss/hidden"]
    own = {**OFF, "hidden_weight": 1.0, "soft_weight": 0.1}
    alone = [
        make_trainer(tmp_path, each, teacher=teacher, **own).evaluate(each)["eval_loss/hidden"]
        for teacher, each in ((theirs, rows), (ours, rows.select_columns(make_rows().column_names)))
    ]
    tokens = [sum(row["length"] for row in rows if row["teacher1_same_tokens"]), sum(rows["length"])]
    expected = (alone[0] * tokens[0] + 3 * alone[1] * tokens[1]) / (tokens[0] + 3 * tokens[1])
    assert both == pytest.approx(expected, rel=1e-4)


def test_without_a_word_on_the_rows_tokens_are_not_compared(tmp_path):
    rows = make_rows(KIND).remove_columns("teacher1_same_tokens")
    with pytest.raises(InputError, match="hidden_weight: compares token with token"):
        make_trainer(tmp_path, rows, hidden_weight=1.0)


def test_a_step_of_such_rows_is_the_same_however_it_is_cut(tmp_path):
    """One batch of 8 against 8 of one row, half of which compare nothing."""
    whole, parts = train(tmp_path, KIND), train(tmp_path, KIND, batch_size=1, accumulation=8)
    assert parts[1]["loss/hidden"] == pytest.approx(whole[1]["loss/hidden"], rel=1e-4)
