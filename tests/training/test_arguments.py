"""What a trainer is given from Python: each kind works, or is told in one message before anything runs."""

import copy
import dataclasses

import datasets
import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from distill import (
    DataOptions,
    DistillationConfig,
    DistillationTrainer,
    InputError,
    build_student,
    load_data,
    prune_model,
)
from distill.training.config import TrainingConfig
from tests.conftest import make_tokenizer, sentences, tiny_bert, write_rows
from tests.training.test_exactness import make_rows


def config(folder, **options):
    return DistillationConfig(output_dir=str(folder), max_steps=2, save_strategy="no", disable_tqdm=True, **options)


def make_trainer(args, **changes):
    given = {
        "model": tiny_bert(seed=1, num_hidden_layers=2),
        "teacher": tiny_bert(),
        "train_dataset": make_rows(),
        "processing_class": make_tokenizer(),
        **changes,
    }
    return DistillationTrainer(args=args, **given)


# --- arguments of other classes, and used twice ---------------------------------------------------------------------


def test_plain_arguments_keep_every_value_they_hold(tmp_path, capsys):
    plain = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=3e-4, weight_decay=0.2, use_cpu=True, disable_tqdm=True,
        lr_scheduler_kwargs={}, save_strategy="no", seed=7, logging_steps=1,
    )  # fmt: skip
    trainer = make_trainer(plain)
    assert isinstance(trainer.args, DistillationConfig)
    kept = {each.name: getattr(plain, each.name) for each in dataclasses.fields(TrainingArguments)}
    changed = {name for name, value in kept.items() if getattr(trainer.args, name) != value}
    assert changed <= {"accelerator_config"}  # objects that are compared by identity
    assert trainer.args.loss_weights == config(tmp_path).loss_weights
    assert "args: of TrainingArguments every value is kept (learning rate 0.0003" in capsys.readouterr().err
    trainer.train()
    assert trainer.state.log_history[-1]["step"] == 2
    assert "loss/soft" in trainer.state.log_history[0]


def test_plain_arguments_keep_the_checkpoint_of_least_perplexity(tmp_path):
    plain = TrainingArguments(output_dir=str(tmp_path), metric_for_best_model="perplexity", use_cpu=True)
    assert plain.greater_is_better is True  # Trainer's guess
    assert make_trainer(plain).args.greater_is_better is False


def test_plain_arguments_without_a_teacher_train_on_the_labels(tmp_path):
    plain = TrainingArguments(output_dir=str(tmp_path), max_steps=1, save_strategy="no", use_cpu=True, logging_steps=1)
    trainer = make_trainer(plain, teacher=None)
    trainer.train()
    assert type(trainer.args) is TrainingConfig
    assert "loss/hard" in trainer.state.log_history[0]


def test_a_teacher_beside_a_config_for_labels_alone_is_not_passed_over(tmp_path):
    args = TrainingConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", logging_steps=1)
    trainer = make_trainer(args)
    trainer.train()
    assert "loss/soft" in trainer.state.log_history[0]


def test_options_of_another_class_of_arguments_are_not_passed_over(tmp_path):
    args = transformers.Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="args: Seq2SeqTrainingArguments has options that are not read here"):
        make_trainer(args)


def test_a_config_serves_two_trainers(tmp_path):
    """Each gets the learning rate of its own student's width, and the config itself none."""
    args = config(tmp_path, lr_scheduler_kwargs={})
    before = copy.deepcopy({each.name: getattr(args, each.name) for each in dataclasses.fields(args)})
    narrow = tiny_bert(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    trainers = [make_trainer(args), make_trainer(args, model=narrow)]
    for trainer in trainers:
        trainer.train()
    assert [trainer.args.learning_rate for trainer in trainers] == pytest.approx([2e-4 * 384 / 64, 2e-4 * 384 / 32])
    after = {each.name: getattr(args, each.name) for each in dataclasses.fields(args)}
    assert after == before
    assert after["learning_rate"] is None
    assert trainers[0].args.lr_scheduler_kwargs is not args.lr_scheduler_kwargs


def test_trainers_of_several_precisions_stand_side_by_side(tmp_path):
    """Accelerate keeps one state for the process, and a config's making alone resets it."""
    seen = {True: set(), False: set()}
    trainers = {}
    for bf16 in (True, False):
        trainers[bf16] = make_trainer(config(tmp_path, bf16=bf16))
        layer = trainers[bf16].student.bert.encoder.layer[0].output.dense
        layer.register_forward_hook(lambda module, inputs, output, bf16=bf16: seen[bf16].add(output.dtype))
    config(tmp_path, bf16=False)
    for trainer in trainers.values():
        trainer.train()
    trainers[True].evaluate(make_rows())
    trainers[True].save_model(tmp_path / "student")
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}


# --- what is no model, no rows, no arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": None}, "model: missing; give the student"),
        ({"model": "bert-base-uncased"}, "model: 'bert-base-uncased'; give a loaded transformers model"),
        ({"teacher": "bert-base-uncased"}, "teacher: 'bert-base-uncased' is no model; give a loaded one"),
        ({"teacher": [torch.nn.Linear(2, 2)]}, "teacher: a Linear is no model; give a loaded one"),
        ({"model": None, "model_init": tiny_bert}, "model_init: a student is matched with its teacher once"),
        ({"compute_loss_func": max}, "compute_loss_func: the losses are those that args gives a weight; leave it out"),
        ({"processing_class": None}, "processing_class: missing, and train_dataset has rows of 8 to 14 tokens"),
        ({"processing_class": "bert"}, "processing_class: 'bert'; give the loaded tokenizer"),
        (
            {"train_dataset": datasets.DatasetDict(train=make_rows())},
            "train_dataset: a DatasetDict; give one of its splits (train)",
        ),
        ({"train_dataset": make_rows().to_pandas()}, "train_dataset: a DataFrame; give datasets.Dataset.from_pandas"),
        ({"train_dataset": "sst2"}, "train_dataset: 'sst2'; give the tokenized rows"),
        ({"train_dataset": make_rows().select([])}, "train_dataset: has no rows"),
        (
            {"eval_dataset": {"a": make_rows(), "b": datasets.Dataset.from_list(sentences(2))}},
            "eval_dataset['b']: has no column input_ids, which the model reads, only sentence, label; tokenize it",
        ),
    ],
)
def test_what_can_not_be_used_is_told_in_one_message(tmp_path, changes, problem):
    with pytest.raises(InputError) as error:
        make_trainer(config(tmp_path / "out"), **changes)
    assert len(error.value.problems) == 1
    assert problem in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        make_trainer({"output_dir": str(tmp_path)}, model="a", teacher="b", train_dataset="c")
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "args", "model", "teacher", "train_dataset",
    ]  # fmt: skip


def test_labels_under_another_name_are_not_taken_for_missing(tmp_path):
    args = config(tmp_path, label_names=["gold"], hard_weight=1.0)
    with pytest.raises(InputError, match="label_names: labels are read from labels; rename the rows' column gold"):
        make_trainer(args, train_dataset=make_rows().rename_column("labels", "gold"))
    for names in (["labels"], ["label"]):
        trainer = make_trainer(config(tmp_path, label_names=names, hard_weight=1.0))
        assert trainer.predict(make_rows()).label_ids.tolist() == make_rows()["labels"]


def test_an_optimizer_that_lacks_the_projections_is_refused(tmp_path):
    narrow = tiny_bert(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.1)
    with pytest.raises(InputError, match="optimizers: they lack the projections"):
        make_trainer(config(tmp_path, hidden_weight=1.0), model=narrow, optimizers=(optimizer, None))
    make_trainer(config(tmp_path), model=narrow, optimizers=(optimizer, None)).train()


def test_a_search_of_trainers_own_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"hyperparameter_search: .* make a DistillationTrainer, with a new student"):
        make_trainer(config(tmp_path)).hyperparameter_search(n_trials=1)


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        make_rows().to_iterable_dataset(),
        make_rows().with_format("torch"),
        list(make_rows().remove_columns("length")),
        make_rows().add_column("sentence", ["a"] * 8),
    ],
    ids=["iterable", "torch format", "list", "more columns"],
)
def test_any_rows_that_trainer_takes_train_the_same(tmp_path, rows):
    """One batch of all 8 rows, so that their order does not matter."""
    losses = []
    for data in (make_rows(), rows):
        args = config(tmp_path, hard_weight=0.5, logging_steps=1)
        trainer = make_trainer(args, model=tiny_bert(seed=1), train_dataset=data)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_predict_and_evaluate_before_and_after_training(tmp_path):
    """Against the models themselves, by torch alone."""
    student, teacher, rows = tiny_bert(seed=1), tiny_bert(), make_rows()
    batch = make_tokenizer().pad(list(rows.remove_columns(["length", "labels"])), return_tensors="pt")
    args = config(tmp_path, soft_loss="mse", learning_rate=1e-3, warmup_steps=0)
    trainer = make_trainer(args, model=student, teacher=teacher, eval_dataset={"a": rows, "b": rows.select([0, 1])})
    for _ in range(2):
        with torch.no_grad():
            expected = [model.eval()(**batch).logits for model in (student, teacher)]
        found = trainer.predict(rows)  # in the order of the rows, which training groups by their length
        torch.testing.assert_close(torch.from_numpy(found.predictions), expected[0], atol=1e-5, rtol=1e-4)
        errors = (expected[0] - expected[1]).square().mean(1)
        assert found.metrics["test_loss"] == pytest.approx(errors.mean().item(), rel=1e-4)
        metrics = trainer.evaluate()
        assert metrics["eval_a_loss"] == pytest.approx(errors.mean().item(), rel=1e-4)
        assert metrics["eval_b_loss"] == pytest.approx(errors[:2].mean().item(), rel=1e-4)
        trainer.train()


def test_resume_from_checkpoint_true_finds_the_last(tmp_path):
    def make(steps):
        args = DistillationConfig(
            output_dir=str(tmp_path / steps), max_steps=4, save_steps=2, learning_rate=1e-3, logging_steps=1,
            per_device_train_batch_size=4, disable_tqdm=True,
        )  # fmt: skip
        return make_trainer(args, callbacks=[Stop(steps == "cut")])

    class Stop(TrainerCallback):
        def __init__(self, early):
            self.early = early

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = self.early and state.global_step == 2

    whole = make("whole")
    whole.train()
    make("cut").train()
    resumed = make("cut")
    resumed.callback_handler.callbacks = [c for c in resumed.callback_handler.callbacks if not isinstance(c, Stop)]
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], weight), name


def test_rows_whose_ids_stand_for_other_classes_are_refused(tmp_path):
    """A teacher of yes and no, and rows of no and yes: a student would learn the names the wrong way round."""
    named = [{**row, "label": ["no", "yes"][row["label"]]} for row in sentences(40)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "d" / f"{split}.jsonl", named)
    options = {"kind": "classification", "path": str(tmp_path / "d"), "text": "sentence", "max_length": 24}
    teacher = tiny_bert(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    student = build_student(teacher, num_layers=2)
    rows = load_data(None, DataOptions(**options)).tokenized("train", make_tokenizer())
    assert rows.features["labels"].names == ["no", "yes"]
    for model, teachers in ((student, teacher), (tiny_bert(seed=1, num_hidden_layers=2), teacher)):
        with pytest.raises(InputError, match=r"its classes are no, yes, and those of the (model|teacher) yes, no"):
            make_trainer(config(tmp_path / "out"), model=model, teacher=teachers, train_dataset=rows)
    aligned = load_data(None, DataOptions(**options, label_names=["yes", "no"])).tokenized("train", make_tokenizer())
    assert [aligned.features["labels"].int2str(each) for each in aligned["labels"]] == [
        rows.features["labels"].int2str(each) for each in rows["labels"]
    ]
    make_trainer(config(tmp_path / "out"), model=student, teacher=teacher, train_dataset=aligned).train()


# --- models of which something was pruned -----------------------------------------------------------------------------

WITHOUT_SOME = {
    "a feed-forward": {"neurons": [128, 0, 64, 128]},
    "an attention": {"heads": [4, 0, 4, 4]},
    "heads": {"heads": [4, 2, 4, 1]},
}


@pytest.mark.parametrize("left", WITHOUT_SOME)
@pytest.mark.parametrize("part", ["hidden", "embedding", "attention", "relation"])
@pytest.mark.parametrize("whose", ["model", "teacher"])
def test_losses_of_pruned_models_compare_what_is_there(tmp_path, left, part, whose):
    pruned = prune_model(tiny_bert(), importance="magnitude", reconstruct=False, **WITHOUT_SOME[left])
    models = {"model": tiny_bert(seed=1), "teacher": tiny_bert(seed=1), whose: pruned}
    args = config(tmp_path, **{f"{part}_weight": 1.0}, bf16=False, learning_rate=1e-2, logging_steps=1)
    if part in ("attention", "relation") and "heads" in WITHOUT_SOME[left]:
        with pytest.raises(InputError, match=f"{part}_weight: compares heads, and a model lacks some of those"):
            make_trainer(args, **models)
        return
    trainer = make_trainer(args, **models)
    trainer.train()
    found = [log[f"loss/{part}"] for log in trainer.state.log_history if f"loss/{part}" in log]
    assert all(0 < loss < float("inf") for loss in found)


@pytest.mark.parametrize(("family", "changes"), [
    ("DistilBert", {"dim": 64, "hidden_dim": 128, "n_layers": 4, "n_heads": 4}),
    ("GPT2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 128, "pad_token_id": 0}),
    ("ModernBert", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}),
])  # fmt: skip
def test_hidden_states_of_other_families_without_a_sublayer_are_compared(tmp_path, family, changes):
    made = getattr(transformers, f"{family}Config")(vocab_size=25, **changes)
    models = [getattr(transformers, f"{family}ForSequenceClassification")(copy.deepcopy(made)) for _ in range(2)]
    settings = {"importance": "magnitude", "reconstruct": False, "heads": [4, 0, 4, 4], "neurons": [128, 128, 0, 64]}
    pruned = prune_model(models[0], **settings)
    trainer = make_trainer(config(tmp_path, hidden_weight=1.0, bf16=False), model=pruned, teacher=models[1])
    trainer.train()
    assert trainer.state.log_history[-1]["step"] == 2
    for part in ("attention", "relation"):
        with pytest.raises(InputError, match=f"{part}_weight: compares heads"):
            make_trainer(config(tmp_path, **{f"{part}_weight": 1.0}), model=pruned, teacher=models[1])
