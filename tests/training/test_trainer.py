import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    TrainerCallback,
)

from distill import DistillationConfig, DistillationTrainer, build_student
from distill.errors import InputError, TrainingDiverged
from distill.training.checkpoints import other_batches
from distill.training.config import TrainingConfig
from distill.training.features import FeatureExtractor, FeatureSpec, resolve_layer_map
from distill.training.objective import value_at
from tests.conftest import make_tokenizer, tiny_bert
from tests.training.test_exactness import OFF, make_rows


def test_the_teacher_does_not_change_and_every_student_weight_does(tmp_path):
    teacher = tiny_bert(hidden_dropout_prob=0.1)
    student = build_student(teacher, num_layers=2)
    teacher_before, before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    teacher.train()  # a user's mistake
    args = DistillationConfig(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-3, warmup_steps=0, hard_weight=1.0
    )
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(), processing_class=make_tokenizer()
    )
    modes = set()
    teacher.register_forward_pre_hook(lambda module, inputs: modes.add(module.bert.encoder.training))
    trainer.train()
    assert modes == {False}
    assert all(torch.equal(weight, teacher_before[name]) for name, weight in teacher.state_dict().items())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in teacher.parameters()}
    unchanged = [name for name, parameter in student.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged
    checkpoint = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert checkpoint.keys() == student.state_dict().keys()


@pytest.mark.parametrize("distilled", [True, False])
def test_neftune_adds_noise_to_the_students_embeddings_while_it_trains(tmp_path, distilled):
    found = []

    class Watched(DistillationTrainer):
        def training_step(self, model, inputs, *arguments):
            model.train()
            embeddings, ids = self.student.get_input_embeddings(), inputs["input_ids"]
            noise = (embeddings(ids) - embeddings.weight[ids]).detach().abs()
            found.append((noise.max().item(), 5 / (ids.shape[1] * 64) ** 0.5))
            for each in self.teachers:
                words = each.model.get_input_embeddings()
                assert torch.equal(words(ids), words.weight[ids])
            return super().training_step(model, inputs, *arguments)

    options = {"output_dir": str(tmp_path), "max_steps": 2, "neftune_noise_alpha": 5, "save_strategy": "no"}
    student, teacher = tiny_bert(num_hidden_layers=2), tiny_bert() if distilled else None
    config = DistillationConfig if distilled else TrainingConfig
    trainer = Watched(
        model=student, teacher=teacher, args=config(**options), train_dataset=make_rows(),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert len(found) == 2
    for largest, bound in found:  # uniform in ± alpha / sqrt(tokens · width), Jain et al. 2023
        assert 0.9 * bound < largest <= bound + 1e-6
    ids = torch.arange(5)
    assert torch.equal(student.train().get_input_embeddings()(ids), student.get_input_embeddings().weight[ids])


def narrow_student(**changes):
    return tiny_bert(seed=3, hidden_size=32, num_hidden_layers=2, intermediate_size=64, **changes)


def train_narrow(folder, steps, resume=None, **changes):
    student = narrow_student(hidden_dropout_prob=0.1)
    trainer = DistillationTrainer(
        model=student,
        teacher=tiny_bert(),
        args=DistillationConfig(
            output_dir=str(folder), max_steps=6, save_steps=3, learning_rate=1e-3, per_device_train_batch_size=3,
            save_total_limit=None, logging_steps=1, temperature={"from": 4, "to": 1}, soft_loss="kl", hard_weight=0.5,
            hidden_weight={"from": 1, "to": 0.1, "shape": "cosine"}, contrastive_weight=0.1, relation_weight=0.1,
            **changes,
        ),
        train_dataset=make_rows(count=16),
        eval_dataset=make_rows(count=16),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_narrow_student_is_projected_saved_alone_and_resumes_exactly(tmp_path):
    trainer = train_narrow(tmp_path / "whole", 6)
    projections = trainer.model.projections.state_dict()
    assert set(projections) == {"0_hidden_1.weight", "0_hidden_2.weight", "0_pooled.weight"}
    assert {tuple(weight.shape) for weight in projections.values()} == {(64, 32)}
    resumed = train_narrow(tmp_path / "again", 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    whole_log, resumed_log = ([log for log in t.state.log_history if "loss" in log] for t in (trainer, resumed))
    assert resumed_log == whole_log

    checkpoint = tmp_path / "whole" / "checkpoint-3"
    with pytest.raises(InputError, match=r"can't be gone on from \(batches of a step: 1, now 2\); say the same"):
        train_narrow(tmp_path / "again", 6, resume=str(checkpoint), gradient_accumulation_steps=2)
    (checkpoint / "batches.json").unlink()  # as of another Trainer, which tells its batch size alone
    trainer.args.per_device_train_batch_size = 4
    assert other_batches(checkpoint, trainer.args) == "rows of a batch: 3, now 4"

    trainer.save_model(tmp_path / "student")
    assert {path.name for path in (tmp_path / "student").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert isinstance(reloaded, BertForSequenceClassification)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_best_checkpoint_of_a_projected_student_is_loaded(tmp_path):
    trainer = train_narrow(
        tmp_path, 6, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,  # so that the first, worse one is the best
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    best = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(trainer.student.state_dict()[name], weight) for name, weight in best.items())


def one_step(folder, teacher, student=None, data=None, **options):
    """The trainer after one step of SGD at learning rate 1, and its log."""
    options = {**OFF, "soft_weight": 1.0, "soft_loss": "kl", **options}
    trainer = DistillationTrainer(
        model=build_student(teacher, num_layers=2) if student is None else student,
        teacher=teacher if "teachers" not in options else options.pop("teachers"),
        args=DistillationConfig(
            output_dir=str(folder), max_steps=1, optim="sgd", learning_rate=1.0, warmup_steps=0, weight_decay=0.0,
            max_grad_norm=0.0, logging_steps=1, save_strategy="no", disable_tqdm=True, **options,
        ),
        train_dataset=make_rows() if data is None else data,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer, trainer.state.log_history[0]


def test_a_distilbert_student_gets_no_token_types(tmp_path):
    teacher = tiny_bert()
    student = build_student(teacher, student_arch="distilbert", num_layers=2)
    seen = []
    student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    one_step(tmp_path, teacher, student)
    assert seen
    assert all("token_type_ids" not in names and "labels" not in names for names in seen)


def test_columns_that_no_model_takes_are_left_out(tmp_path):
    _, plain = one_step(tmp_path, tiny_bert())
    _, with_column = one_step(tmp_path, tiny_bert(), data=make_rows().add_column("sentence", ["a"] * 8))
    assert with_column["loss"] == plain["loss"]


def test_rows_need_neither_our_columns_nor_a_mask(tmp_path):
    """Any tokenized data set will do: no `length`, no `attention_mask`, `label` for `labels`."""
    plain = make_rows().select_columns(["input_ids", "labels"]).rename_column("labels", "label")
    _, log = one_step(tmp_path, tiny_bert(), data=plain, hard_weight=1.0)
    _, full = one_step(tmp_path, tiny_bert(), hard_weight=1.0)
    assert log["loss"] == pytest.approx(full["loss"], rel=1e-5)


# --- teachers -------------------------------------------------------------------------------------------------------


def test_several_teachers_share_the_weight(tmp_path):
    """Of other depth and width, each with its own projections."""
    first, second = tiny_bert(), tiny_bert(seed=5, hidden_size=32, num_hidden_layers=3)
    options = {"hidden_weight": 0.5, "seed": 1}
    student = build_student(first, num_layers=2)
    with torch.no_grad():
        student.classifier.weight.mul_(0.5)
    alone = [one_step(tmp_path, teacher, copy.deepcopy(student), **options)[1] for teacher in (first, second)]
    both, log = one_step(
        tmp_path, first, copy.deepcopy(student), teachers=[first, second], teacher_weights=[3, 1], **options
    )
    assert log["loss/soft"] == pytest.approx(0.75 * alone[0]["loss/soft"] + 0.25 * alone[1]["loss/soft"], rel=1e-5)
    assert set(both.model.projections) == {"1_hidden_1", "1_hidden_2"}
    assert log["loss"] == pytest.approx(log["loss/soft"] + 0.5 * log["loss/hidden"], rel=1e-5)


@pytest.mark.parametrize("column", ["teacher_logits", "teacher_probabilities"])
def test_stored_predictions_give_the_loss_of_the_live_teacher(tmp_path, column):
    teacher, student = tiny_bert(), tiny_bert(seed=1, num_hidden_layers=2)
    batch = make_tokenizer().pad(list(make_rows().remove_columns(["length", "labels"])), return_tensors="pt")
    with torch.no_grad():
        logits = teacher(**batch).logits
    stored = logits if column == "teacher_logits" else logits.softmax(-1)
    rows = make_rows().add_column(column, stored.tolist())
    trainer, log = one_step(tmp_path, teacher, copy.deepcopy(student), rows, teachers="data", temperature=3.0)
    _, live = one_step(tmp_path, teacher, copy.deepcopy(student), temperature=3.0)
    assert log["loss"] == pytest.approx(live["loss"], rel=1e-5)
    assert log["loss"] > 0.01
    without = trainer.evaluate(make_rows())  # validation rows need no stored predictions
    assert "eval_loss" not in without
    trainer.weights["hard"] = 1.0
    assert set(trainer.evaluate(make_rows())) >= {"eval_loss", "eval_loss/hard"}


def test_teachers_that_do_not_fit_are_refused_with_every_reason(tmp_path):
    student = tiny_bert(num_hidden_layers=2)
    wrong = tiny_bert(num_labels=3, num_attention_heads=2)
    options = {"attention_weight": 1.0, "relation_weight": 1.0, "relation_heads": 7}
    with pytest.raises(InputError) as error:
        one_step(tmp_path, wrong, student, **options)
    assert len(error.value.problems) == 3
    for part in ("has 4 heads and the teacher 2", "relation_heads: 7 does not divide", "has 3 outputs"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="needs a column teacher_logits or teacher_probabilities"):
        one_step(tmp_path, tiny_bert(), student, teachers="data")
    with pytest.raises(InputError, match="hidden_weight: needs a teacher model"):
        one_step(tmp_path, tiny_bert(), student, teachers="data", hidden_weight=1.0)
    with pytest.raises(InputError, match="teacher_weights: 1 for 2 teachers"):
        one_step(tmp_path, tiny_bert(), student, teachers=[tiny_bert()] * 2, teacher_weights=[1.0])
    with pytest.raises(InputError, match="training rows have no labels"):
        one_step(tmp_path, tiny_bert(), student, make_rows().remove_columns("labels"), hard_weight=1.0)
    with pytest.raises(InputError, match="not a class that can be distilled"):
        one_step(tmp_path, tiny_bert(), tiny_bert().bert)


@pytest.mark.parametrize(
    "changes", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}]
)
def test_whole_numbers_are_scores_or_decisions_where_the_model_says_so(tmp_path, changes):
    """As classes, scores of a model with one output would cost nothing at all."""
    labels = [row % 4 for row in range(8)] if changes["num_labels"] == 1 else [[row % 2, 1, 0] for row in range(8)]
    floats = [float(label) if isinstance(label, int) else [float(each) for each in label] for label in labels]
    plain = make_rows().remove_columns("labels")
    logs = [
        one_step(tmp_path, tiny_bert(**changes), data=plain.add_column("labels", given), hard_weight=1.0)[1]
        for given in (labels, floats)
    ]
    assert logs[0]["loss/hard"] == logs[1]["loss/hard"] > 0.1


def test_class_weights_are_one_a_class(tmp_path):
    for changes, message in (({}, "3 weights, but the model predicts 2 classes"), ({"num_labels": 1}, "a score")):
        with pytest.raises(InputError, match=message):
            one_step(tmp_path, tiny_bert(**changes), class_weights=[1.0, 2.0, 3.0])


def test_rows_without_any_label_teach_by_the_teacher_alone(tmp_path):
    _, log = one_step(tmp_path, tiny_bert(), data=make_rows().remove_columns("labels"))
    _, labelled = one_step(tmp_path, tiny_bert())
    assert log["loss"] == labelled["loss"]


# --- what is read from the models -----------------------------------------------------------------------------------

FAMILIES = {
    "bert": (BertConfig, {}),
    "distilbert": (DistilBertConfig, {"dim": 64, "hidden_dim": 128, "n_layers": 4, "n_heads": 4}),
    "roberta": (RobertaConfig, {}),
    "electra": (ElectraConfig, {"embedding_size": 64}),
    "deberta-v2": (DebertaV2Config, {}),
    "mpnet": (MPNetConfig, {}),
    "modernbert": (ModernBertConfig, {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}),
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "pad_token_id": 0}),
    "llama": (LlamaConfig, {"pad_token_id": 0}),
}


def make_family(family, **changes):
    config_class, settings = FAMILIES[family]
    plain = {
        "vocab_size": 25, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 64,
    }  # fmt: skip
    if family in ("distilbert", "gpt2"):
        plain = {"vocab_size": 25}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config_class(**{**plain, **settings, **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_those_that_attention_sees(family):
    """Their softmax is the attention map that the model reports in eager attention."""
    model = make_family(family).eval()
    reader = FeatureExtractor(model, [FeatureSpec(relations=(2,))])
    inputs = {"input_ids": torch.tensor([[2, 7, 8, 9, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    assert model.config._attn_implementation in ("sdpa", "eager")
    _, [read] = reader(inputs)
    queries, keys, values = read.relations[0]
    assert queries.shape == keys.shape == values.shape == (1, 5, 64)
    if family in ("bert", "distilbert", "roberta", "electra"):  # no positions inside their attention
        model.set_attn_implementation("eager")
        attention = model(**inputs, output_attentions=True).attentions[1]
        heads = [states.unflatten(-1, (4, 16)).transpose(1, 2) for states in (queries, keys)]
        expected = (heads[0] @ heads[1].transpose(-1, -2) / 4).softmax(-1)
        torch.testing.assert_close(attention, expected, atol=1e-5, rtol=1e-4)


def test_attention_switches_both_models_to_eager_and_says_so(tmp_path, capsys):
    teacher = tiny_bert()
    student = build_student(teacher, num_layers=2)
    seen = {}
    for model in (teacher, student):
        model.register_forward_pre_hook(
            lambda module, inputs: seen.update({module: module.config._attn_implementation})
        )
    _, log = one_step(tmp_path, teacher, student, attention_weight=1.0)
    assert seen == {teacher: "eager", student: "eager"}
    assert {model.config._attn_implementation for model in (teacher, student)} == {"sdpa"}
    assert log["loss/attention"] > 0
    assert "run in eager attention" in capsys.readouterr().err


def test_layer_maps_are_printed_when_training_starts(tmp_path, capsys):
    one_step(tmp_path, tiny_bert(), hidden_weight=1.0, relation_weight=1.0)
    printed = capsys.readouterr().err
    assert "hidden loss: layers 1→2, 2→4" in printed
    assert "relation loss: layers 2→4" in printed


# --- schedules and divergence ---------------------------------------------------------------------------------------


def test_schedules():
    linear, cosine = {"from": 4.0, "to": 1.0}, {"from": 0.0, "to": 1.0, "shape": "cosine"}
    assert [value_at(linear, at) for at in (0, 0.5, 1)] == [4.0, 2.5, 1.0]
    assert [value_at(cosine, at) for at in (0, 0.25, 0.5, 1)] == pytest.approx([0, (1 - 0.5**0.5) / 2, 0.5, 1])
    assert value_at(3.0, 0.7) == 3.0


def test_a_schedule_follows_the_steps(tmp_path):
    trainer = DistillationTrainer(
        model=build_student(tiny_bert(), num_layers=2),
        teacher=tiny_bert(),
        args=DistillationConfig(
            output_dir=str(tmp_path), max_steps=4, logging_steps=1, save_strategy="no", learning_rate=1e-3,
            soft_weight=1.0, hidden_weight={"from": 1, "to": 0},
        ),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["weight/hidden"] for log in logs] == pytest.approx([1, 0.75, 0.5, 0.25])
    for log in logs:
        assert log["loss"] == pytest.approx(log["loss/soft"] + log["weight/hidden"] * log["loss/hidden"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": {"from": 4, "too": 1}}, "temperature: to is missing, too is no such key (did you mean 'to'?)"),
        ({"temperature": {"from": 4, "to": 0}}, "temperature: both ends of a schedule should be above 0"),
        ({"temperature": 0}, "temperature: should be greater than 0; got 0"),
        ({"hidden_loss": "mes"}, "hidden_loss: should be 'mse', 'cosine' or 'pkd'; got 'mes'"),
        ({"alpha": 0.3, "soft_weight": 0.2}, "soft_weight: is set by alpha; leave one of them out"),
        ({"temperature": 3, "soft_loss": "mse"}, "temperature: has no effect on soft_loss: mse"),
        ({"alpha": 2}, "alpha: should be less than or equal to 1"),
    ],
)
def test_wrong_options_are_told_in_python_too(tmp_path, options, problem):
    with pytest.raises(InputError) as error:
        DistillationConfig(output_dir=str(tmp_path), **options)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("given", "loss", "temperature"),
    [
        ({}, "mse", None),
        ({"temperature": 3}, "kl", 3),
        ({"soft_loss": "js"}, "js", 2.0),
        ({"soft_loss": "mse"}, "mse", None),
        ({"temperature": 5, "soft_loss": "dkd"}, "dkd", 5),
    ],
)
def test_a_temperature_means_a_divergence_of_distributions(tmp_path, given, loss, temperature):
    config = DistillationConfig(output_dir=str(tmp_path), **given)
    assert (config.soft_loss, config.temperature) == (loss, temperature)
    again = dataclasses.replace(config)
    assert (again.soft_loss, again.temperature) == (loss, temperature)


def test_alpha_is_the_share_of_the_labels(tmp_path):
    config = DistillationConfig(output_dir=str(tmp_path), alpha=0.3)
    assert (config.hard_weight, config.soft_weight) == (0.3, 0.7)


def test_the_learning_rate_follows_the_width_unless_given(tmp_path):
    for given, expected in ((None, 2e-4 * 384 / 64), (3e-5, 3e-5)):
        args = DistillationConfig(output_dir=str(tmp_path), learning_rate=given)
        trainer = DistillationTrainer(model=tiny_bert(), teacher=tiny_bert(), args=args)
        assert trainer.args.learning_rate == pytest.approx(expected)


def diverging(folder, student, **options):
    return DistillationTrainer(
        model=student,
        teacher=tiny_bert(),
        args=DistillationConfig(
            output_dir=str(folder), max_steps=6, save_steps=2, logging_steps=1, per_device_train_batch_size=4,
            save_total_limit=None, learning_rate=1e-3, disable_tqdm=True, hidden_weight=1.0, **options,
        ),
        train_dataset=make_rows(count=16),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def test_a_loss_that_is_not_finite_stops_with_its_part_and_step(tmp_path):
    student = build_student(tiny_bert(), num_layers=2)
    calls = []

    def spoil(module, inputs, output):
        calls.append(0)
        return output * torch.inf if len(calls) == 4 else output

    student.classifier.register_forward_hook(spoil)
    with pytest.raises(TrainingDiverged, match=r"the soft loss was NaN or infinite at step 4 of 6; .*checkpoint-2"):
        diverging(tmp_path, student).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    student = build_student(tiny_bert(), num_layers=2)
    trainer = diverging(tmp_path, student)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                student.classifier.bias.data[0] = torch.nan

    trainer.add_callback(Spoil())
    with pytest.raises(TrainingDiverged, match="a weight was NaN or infinite at step 4"):
        trainer.train()
    checkpoint = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in checkpoint.values())
    assert not (tmp_path / "checkpoint-4").exists()


# --- layer maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer_map", "student", "teacher", "expected"),
    [
        ("uniform", 3, 6, [(1, 2), (2, 4), (3, 6)]),
        ("uniform", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("uniform", 2, 5, [(1, 2), (2, 5)]),
        ([(0, 0), (3, 6)], 3, 6, [(0, 0), (3, 6)]),
        ([(-1, -1), (1, -3)], 3, 6, [(3, 6), (1, 4)]),
        ("last", 3, 6, [(1, 4), (2, 5), (3, 6)]),
        ("first", 3, 6, [(1, 1), (2, 2), (3, 3)]),
        ("uniform", 6, 3, [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3)]),
    ],
)
def test_layer_maps(layer_map, student, teacher, expected):
    assert resolve_layer_map(layer_map, student, teacher) == expected


@pytest.mark.parametrize("layer_map", [[(4, 6)], [(3, 7)], [(-5, 0)], []])
def test_wrong_layer_maps_are_refused(layer_map):
    with pytest.raises(InputError, match=r"student 0 to 3, teacher 0 to 6"):
        resolve_layer_map(layer_map, 3, 6)


def test_a_student_deeper_than_its_teacher_has_no_last_layers():
    with pytest.raises(InputError, match="layer_map: last needs a teacher at least as deep"):
        resolve_layer_map("last", 6, 3)
    with pytest.raises(InputError, match=r"pairs are \[student 1 to 3, teacher 1 to 6\], −1 the last layer"):
        resolve_layer_map([(0, 0)], 3, 6, name="attention_layer_map", lowest=1)


def test_a_missing_teacher_and_nothing_to_learn_are_refused(tmp_path):
    with pytest.raises(InputError, match="teacher: missing"):
        DistillationTrainer(model=tiny_bert(), args=DistillationConfig(output_dir=str(tmp_path)))
    with pytest.raises(InputError, match="nothing to learn"):
        DistillationConfig(output_dir=str(tmp_path), soft_weight=0, hard_weight=0, hidden_weight=0)


def test_finetuning_scales_the_loss_rightly_where_stock_trainer_does_not(tmp_path):
    """The trap that makes this trainer necessary: stock Trainer counts the loss once for each accumulation step."""
    from transformers import Trainer

    losses = {}
    for trainer_class in (DistillationTrainer, Trainer):
        for accumulation in (1, 4):
            args = TrainingConfig(
                output_dir=str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no",
                per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
            )  # fmt: skip
            data = make_rows() if trainer_class is DistillationTrainer else make_rows().remove_columns("length")
            trainer = trainer_class(model=tiny_bert(), args=args, train_dataset=data, processing_class=make_tokenizer())
            trainer.train()
            losses[trainer_class, accumulation] = trainer.state.log_history[0]["loss"]
    assert losses[DistillationTrainer, 4] == pytest.approx(losses[DistillationTrainer, 1], rel=1e-4)
    assert losses[DistillationTrainer, 1] == pytest.approx(losses[Trainer, 1], rel=1e-4)
    assert losses[Trainer, 4] > 3 * losses[Trainer, 1], json.dumps({str(k): v for k, v in losses.items()})
