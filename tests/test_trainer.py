import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from distill import DistillationConfig, DistillationTrainer, build_student
from distill.data import tokenize
from distill.errors import InputError
from distill.tasks import GLUE
from distill.trainer import TrainingConfig, resolve_layer_map
from tests.conftest import make_tokenizer, sentences, tiny_bert

LOSSES = {
    "soft": {"soft_weight": 1.0, "hard_weight": 0.0, "hidden_weight": 0.0},
    "hard": {"soft_weight": 0.0, "hard_weight": 1.0, "hidden_weight": 0.0},
    "hidden": {"soft_weight": 0.0, "hard_weight": 0.0, "hidden_weight": 1.0},
    "all": {},
}


def rows(count=8, seed=0):
    import datasets

    return tokenize(datasets.Dataset.from_list(sentences(count, seed)), GLUE["sst2"], make_tokenizer(), 32)


def one_step(folder, *, batch_size=8, accumulation=1, loss="all", data=None, teacher=None, student=None, **changes):
    """Gradients and logs of the first optimizer step, taken with plain SGD at learning rate 1: old − new weights."""
    teacher = teacher or tiny_bert()
    student = student or build_student(teacher, num_layers=2)
    with torch.no_grad():
        student.classifier.weight.mul_(0.5)  # else the student's head is the teacher's
    before = copy.deepcopy(student.state_dict())
    args = DistillationConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **{**LOSSES[loss], **changes},
    )
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=args,
        train_dataset=rows() if data is None else data,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    gradients = {name: before[name] - weight for name, weight in student.state_dict().items()}
    return gradients, trainer.state.log_history[0]


def relative_difference(first, second):
    total = sum(gradient.norm() ** 2 for gradient in first.values()) ** 0.5
    return (sum((first[name] - second[name]).norm() ** 2 for name in first) ** 0.5 / total).item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (1, 8), (3, 3)])
def test_gradients_do_not_depend_on_accumulation(tmp_path, loss, batch_size, accumulation):
    whole, whole_log = one_step(tmp_path, loss=loss)
    parts, parts_log = one_step(tmp_path, loss=loss, batch_size=batch_size, accumulation=accumulation)
    assert sum(gradient.norm() for gradient in whole.values()) > 0.01
    assert relative_difference(whole, parts) < 1e-5
    for key in (key for key in whole_log if key.startswith("loss")):
        assert parts_log[key] == pytest.approx(whole_log[key], rel=1e-4)


def test_gradients_do_not_depend_on_padding(tmp_path):
    short = rows()
    longest = max(short["length"])
    padded = short.map(
        lambda row: {
            "input_ids": row["input_ids"] + [0] * (longest + 9 - row["length"]),
            "token_type_ids": row["token_type_ids"] + [0] * (longest + 9 - row["length"]),
            "attention_mask": row["attention_mask"] + [0] * (longest + 9 - row["length"]),
        }
    )
    plain, plain_log = one_step(tmp_path, data=short)
    with_padding, padded_log = one_step(tmp_path, data=padded)
    assert relative_difference(plain, with_padding) < 1e-5
    assert padded_log["loss/hidden"] == pytest.approx(plain_log["loss/hidden"], rel=1e-4)


def test_the_step_equals_a_loop_written_by_hand(tmp_path):
    """The whole step against torch alone: no Trainer, no function of ours."""
    teacher = tiny_bert()
    student = build_student(teacher, num_layers=2)
    with torch.no_grad():
        student.classifier.weight.mul_(0.5)
    batch = make_tokenizer().pad(list(rows().remove_columns("length")), return_tensors="pt")
    labels = batch.pop("labels")
    ours = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(**batch, output_hidden_states=True)
    soft = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=theirs.logits / 3),
        torch.distributions.Categorical(logits=ours.logits / 3),
    ).mean()
    hard = torch.nn.functional.cross_entropy(ours.logits, labels)
    valid = batch["attention_mask"].bool()
    pairs = [(1, 2), (2, 4)]
    hidden = sum((ours.hidden_states[s][valid] - theirs.hidden_states[t][valid]).square().mean() for s, t in pairs) / 2
    (0.7 * 9 * soft + 0.2 * hard + 0.1 * hidden).backward()
    by_hand = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}

    weights = {"temperature": 3.0, "soft_weight": 0.7, "hard_weight": 0.2, "hidden_weight": 0.1}
    ours_by_trainer, log = one_step(tmp_path, teacher=teacher, **weights)
    assert relative_difference(by_hand, {name: ours_by_trainer[name] for name in by_hand}) < 1e-5
    assert log["loss/soft"] == pytest.approx(9 * soft.item(), rel=1e-4)
    assert log["loss/hard"] == pytest.approx(hard.item(), rel=1e-4)
    assert log["loss/hidden"] == pytest.approx(hidden.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((0.7 * 9 * soft + 0.2 * hard + 0.1 * hidden).item(), rel=1e-4)


_WORKER = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.test_trainer import LOSSES, one_step
results = {{}}
for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
    for loss in LOSSES:
        results[f"{{batch_size}}x{{accumulation}} {{loss}}"] = one_step(
            {folder!r}, batch_size=batch_size, accumulation=accumulation, loss=loss
        )
from accelerate import PartialState
assert PartialState().num_processes == 2
if PartialState().is_main_process:
    torch.save(results, {folder!r} + "/results.pt")
"""


def test_two_processes_give_the_gradients_and_losses_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 12
    for case, (gradients, log) in results.items():
        whole, whole_log = one_step(tmp_path, loss=case.split()[1])
        assert relative_difference(whole, gradients) < 1e-5, case
        for key in (key for key in whole_log if key.startswith("loss")):
            assert log[key] == pytest.approx(whole_log[key], rel=1e-4), (case, key)


def test_logged_parts_sum_to_the_loss_in_training_and_evaluation(tmp_path):
    teacher = tiny_bert()
    trainer = DistillationTrainer(
        model=build_student(teacher, num_layers=2),
        teacher=teacher,
        args=DistillationConfig(
            output_dir=str(tmp_path), max_steps=6, logging_steps=3, per_device_train_batch_size=3, save_strategy="no",
            per_device_eval_batch_size=5, soft_weight=0.3, hard_weight=0.6, hidden_weight=0.2, learning_rate=1e-3,
        ),
        train_dataset=rows(16),
        eval_dataset=rows(13, seed=1),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    logs = trainer.state.log_history
    for prefix in ("loss", "eval_loss"):
        log = next(log for log in logs if prefix in log)
        total = 0.3 * log[f"{prefix}/soft"] + 0.6 * log[f"{prefix}/hard"] + 0.2 * log[f"{prefix}/hidden"]
        assert total == pytest.approx(log[prefix], rel=1e-3)
    assert sum("loss" in log for log in logs) == 2


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    teacher = tiny_bert()
    student = build_student(teacher)
    args = DistillationConfig(
        output_dir=str(tmp_path), max_steps=2, hard_weight=0.0, save_strategy="no", weight_decay=0.0, logging_steps=1
    )
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=rows(), processing_class=make_tokenizer()
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_does_not_change_and_every_student_weight_does(tmp_path):
    teacher = tiny_bert(hidden_dropout_prob=0.1)
    student = build_student(teacher, num_layers=2)
    teacher_before, before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    teacher.train()  # a user's mistake
    args = DistillationConfig(output_dir=str(tmp_path), max_steps=3, learning_rate=1e-3, warmup_steps=0)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=rows(), processing_class=make_tokenizer()
    )
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(weight, teacher_before[name]) for name, weight in teacher.state_dict().items())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in teacher.parameters()}
    unchanged = [name for name, parameter in student.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged
    checkpoint = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert checkpoint.keys() == student.state_dict().keys()


def narrow_student(**changes):
    return tiny_bert(seed=3, hidden_size=32, num_hidden_layers=2, intermediate_size=64, **changes)


def train_narrow(folder, steps, resume=None, **changes):
    student = narrow_student(hidden_dropout_prob=0.1)
    trainer = DistillationTrainer(
        model=student,
        teacher=tiny_bert(),
        args=DistillationConfig(
            output_dir=str(folder), max_steps=6, save_steps=3, learning_rate=1e-3, per_device_train_batch_size=3,
            save_total_limit=None, logging_steps=1, **changes,
        ),
        train_dataset=rows(16),
        eval_dataset=rows(16),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_narrow_student_is_projected_saved_alone_and_resumes_exactly(tmp_path):
    trainer = train_narrow(tmp_path / "whole", 6)
    projections = trainer.model.projections.state_dict()
    assert {tuple(weight.shape) for weight in projections.values()} == {(64, 32)}
    resumed = train_narrow(tmp_path / "again", 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    whole_log, resumed_log = ([log for log in t.state.log_history if "loss" in log] for t in (trainer, resumed))
    assert resumed_log == whole_log

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


def test_a_distilbert_student_gets_no_token_types(tmp_path):
    teacher = tiny_bert()
    student = build_student(teacher, student_arch="distilbert", num_layers=2)
    seen = []
    student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    one_step(tmp_path, teacher=teacher, student=student)
    assert seen
    assert all("token_type_ids" not in names and "labels" not in names for names in seen)


def test_columns_that_no_model_takes_are_left_out(tmp_path):
    with_text = rows().add_column("sentence", ["a"] * 8)
    plain, _ = one_step(tmp_path)
    with_column, _ = one_step(tmp_path, data=with_text)
    assert relative_difference(plain, with_column) == 0


@pytest.mark.parametrize(
    ("layer_map", "student", "teacher", "expected"),
    [
        ("uniform", 3, 6, [(1, 2), (2, 4), (3, 6)]),
        ("uniform", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("uniform", 2, 5, [(1, 2), (2, 5)]),
        ([(0, 0), (3, 6)], 3, 6, [(0, 0), (3, 6)]),
    ],
)
def test_layer_maps(layer_map, student, teacher, expected):
    assert resolve_layer_map(layer_map, student, teacher) == expected


@pytest.mark.parametrize("layer_map", [[(4, 6)], [(3, 7)], [(-1, 0)], []])
def test_wrong_layer_maps_are_refused(layer_map):
    with pytest.raises(InputError, match=r"student 0 to 3, teacher 0 to 6"):
        resolve_layer_map(layer_map, 3, 6)


def test_a_missing_teacher_and_nothing_to_learn_are_refused(tmp_path):
    with pytest.raises(InputError, match="teacher: missing"):
        DistillationTrainer(model=tiny_bert(), args=DistillationConfig(output_dir=str(tmp_path)))
    nothing = DistillationConfig(output_dir=str(tmp_path), soft_weight=0, hard_weight=0, hidden_weight=0)
    with pytest.raises(InputError, match="nothing to learn"):
        DistillationTrainer(model=tiny_bert(), teacher=tiny_bert(), args=nothing)


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
            data = rows() if trainer_class is DistillationTrainer else rows().remove_columns("length")
            trainer = trainer_class(model=tiny_bert(), args=args, train_dataset=data, processing_class=make_tokenizer())
            trainer.train()
            losses[trainer_class, accumulation] = trainer.state.log_history[0]["loss"]
    assert losses[DistillationTrainer, 4] == pytest.approx(losses[DistillationTrainer, 1], rel=1e-4)
    assert losses[DistillationTrainer, 1] == pytest.approx(losses[Trainer, 1], rel=1e-4)
    assert losses[Trainer, 4] > 3 * losses[Trainer, 1], json.dumps({str(k): v for k, v in losses.items()})
