"""One optimizer step depends on its rows alone: not on accumulation, processes, padding or order; nor an evaluation."""

import copy
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from distill import DistillationConfig, DistillationTrainer, build_student
from distill.data.batches import LengthBatches
from distill.data.load import tokenize
from distill.tasks.base import GLUE
from distill.training.config import PARTS, TrainingConfig
from tests.conftest import make_tokenizer, sentences, tiny_bert, tiny_config

OFF = {f"{part}_weight": 0.0 for part in PARTS}


def only(part, **options):
    return {**OFF, f"{part}_weight": 1.0, **options}


# Options of a DistillationConfig; `kind` is what the labels are, `narrow` a student of half the width.
CASES = {
    "default": {},
    "soft": only("soft"),
    "reverse": only("soft", soft_loss="reverse_kl"),
    "js": only("soft", soft_loss="js"),
    "logits": only("soft", soft_loss="mse"),
    "dkd": only("soft", soft_loss="dkd"),
    "hard": only("hard", label_smoothing_factor=0.1),
    "class weights": only("hard", class_weights=[0.5, 2.0]),
    "hidden": only("hidden"),
    "hidden, upper layers unused": only("hidden", layer_map=[(1, 3)]),
    "cosine": only("hidden", hidden_loss="cosine"),
    "pkd": only("hidden", hidden_loss="pkd"),
    "embedding": only("embedding", narrow=True),
    "attention": only("attention"),
    "attention kl": only("attention", attention_loss="kl", attention_layer_map="last"),
    "relation": only("relation", narrow=True),
    "contrastive": only("contrastive", contrastive_negatives=5, narrow=True),
    "every part": {
        **{f"{part}_weight": 0.3 for part in PARTS},
        **{"narrow": True, "temperature": {"from": 4, "to": 1}, "hidden_weight": {"from": 1, "to": 0.5}},
    },
    "quantization-aware": {"qat": "nf4", "qat_embeddings": "nf4"},
    "engine-aware": {"qat": "onnxruntime"},
    "regression": {"kind": "regression"},
    "label sets": {"kind": "label sets"},
    "label sets, dkd": only("soft", soft_loss="dkd", kind="label sets"),
    "rows without a label": {"kind": "unlabelled", "class_weights": [0.5, 2.0]},
    "regression without labels": {"kind": "unlabelled regression"},
    "tokens": {"kind": "tokens", "hard_weight": 0.5, "hidden_weight": 0.5},
    "tokens, kl": only("soft", soft_loss="kl", kind="tokens"),
    "spans": {"kind": "spans", "hard_weight": 0.5},
    "spans, kl": only("soft", soft_loss="kl", kind="spans"),
    "masked": {"kind": "masked", "hard_weight": 0.5, "hidden_weight": 0.5},
    "causal": {"kind": "causal", "hard_weight": 0.5, "hidden_weight": 0.5},
    "causal, kl": only("soft", soft_loss="kl", kind="causal"),
    "masked anew": {"kind": "masked anew", "hard_weight": 0.5, "mlm_probability": 0.3},
    "images": {"kind": "images", "hard_weight": 0.5, "hidden_weight": 0.5, "embedding_weight": 0.2},
    "two tokenizers": {"kind": "two tokenizers", "hard_weight": 0.5, "contrastive_weight": 0.1},
    "some rows of other tokens": {
        **{f"{part}_weight": 0.3 for part in PARTS if part not in ("attention", "contrastive")},
        "kind": "some rows of other tokens",
    },
    "some rows of other tokens, attention": only("attention", kind="some rows of other tokens"),
    "some rows of other tokens, pkd": only("hidden", hidden_loss="pkd", kind="some rows of other tokens"),
}
MODELS = {
    "tokens": BertForTokenClassification,
    "spans": BertForQuestionAnswering,
    "masked": BertForMaskedLM,
    "causal": GPT2LMHeadModel,
    "masked anew": BertForMaskedLM,
}


@functools.cache
def make_rows(kind="classes", count=8, seed=0):
    if kind == "images":
        pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        rows = datasets.Dataset.from_dict({"row": list(range(count))})
        return rows.with_transform(
            lambda batch: {
                "pixel_values": [pixels[row] for row in batch["row"]],
                "labels": [r % 2 for r in batch["row"]],
            }
        )
    data = tokenize(datasets.Dataset.from_list(sentences(count, seed)), GLUE["sst2"], make_tokenizer(), 32)
    labels = data["labels"]
    if kind == "unlabelled":
        labels = [label if row % 3 else -100 for row, label in enumerate(labels)]
    elif kind.endswith("regression"):
        labels = [label + row / 10 for row, label in enumerate(labels)]
    elif kind == "label sets":
        labels = [[float(label), float(row % 2), 1.0] for row, label in enumerate(labels)]
    if kind == "unlabelled regression":
        labels = [label if row % 3 else float("nan") for row, label in enumerate(labels)]
    if kind == "masked anew":
        return data.remove_columns("labels")
    if kind == "two tokenizers":  # the teacher reads the words alone, each by another number, and pads with 1
        ids = [[token + 3 for token in row[1:-1]] for row in data["input_ids"]]
        data = data.add_column("teacher1_input_ids", ids)
        return data.add_column("teacher1_attention_mask", [[1] * len(row) for row in ids])
    if kind == "some rows of other tokens":  # every other row lacks a token, and all have other ids
        ids = [[token + 3 for token in row[: len(row) - number % 2]] for number, row in enumerate(data["input_ids"])]
        data = data.add_column("teacher1_input_ids", ids)
        data = data.add_column("teacher1_same_tokens", [number % 2 == 0 for number in range(count)])
        return data.add_column("teacher1_attention_mask", [[1] * len(row) for row in ids])
    if kind == "spans":
        ends = [[1 + row % 2 for row in range(count)], [length - 2 for length in data["length"]]]
        return data.remove_columns("labels").add_column("start_positions", ends[0]).add_column("end_positions", ends[1])
    if kind in ("tokens", "causal"):  # in words only; the last row has no label at all
        labels = [
            [-100, *((token % 2 if kind == "tokens" else token) for token in ids[1:-1]), -100]
            for ids in data["input_ids"]
        ]
        labels[-1] = [-100] * len(labels[-1])
    if kind == "masked":
        labels = [[token if place % 3 == 1 else -100 for place, token in enumerate(ids)] for ids in data["input_ids"]]
    return data.remove_columns("labels").add_column("labels", labels)


def make_models(kind="classes", narrow=False):
    if kind == "images":
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
        config = ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, hidden_dropout_prob=0.0, **sizes)
        torch.manual_seed(0)
        teacher = ViTForImageClassification(config).eval()
        return teacher, build_student(teacher, num_layers=2)
    if kind in MODELS:
        torch.manual_seed(0)
        config = tiny_config(initializer_range=0.2)
        if kind == "causal":
            config = GPT2Config(
                vocab_size=50, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2, bos_token_id=2,
                eos_token_id=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )  # fmt: skip
        teacher = MODELS[kind](config).eval()
        return teacher, build_student(teacher, num_layers=2)
    changes = {"num_labels": 1} if kind.endswith("regression") else {}
    if kind == "label sets":
        changes = {"num_labels": 3, "problem_type": "multi_label_classification"}
    teacher = tiny_bert(**changes)
    if kind == "some rows of other tokens":
        return tiny_bert(vocab_size=40), tiny_bert(seed=3, num_hidden_layers=2)
    if kind == "two tokenizers":
        torch.manual_seed(1)
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = RobertaConfig(
            vocab_size=40, max_position_embeddings=40, pad_token_id=1, initializer_range=0.2, **sizes
        )
        return RobertaForSequenceClassification(config).eval(), tiny_bert()
    half = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    student = tiny_bert(seed=3, **half, **changes) if narrow else build_student(teacher, num_layers=2)
    with torch.no_grad():
        student.classifier.weight.mul_(0.5)  # else the student's head is the teacher's
    return teacher, student


def train(folder, case, *, batch_size=8, accumulation=1, steps=1, bf16=False, change_rows=lambda rows: rows):
    """Gradients and log of an optimizer step (plain SGD at learning rate 1: old − new weights), then an evaluation."""
    options = dict(CASES[case])
    kind, narrow = options.pop("kind", "classes"), options.pop("narrow", False)
    teacher, student = make_models(kind, narrow)
    args = DistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=batch_size, max_steps=steps, optim="sgd", learning_rate=1.0 if steps == 1 else 0.1,
        warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0, logging_steps=1, save_strategy="no", disable_tqdm=True,
        bf16=bf16, cache_teacher="none", **options,
    )  # fmt: skip
    rows = make_rows(kind)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=rows,
        processing_class=None if kind == "images" else make_tokenizer(),
        data_collator=DataCollatorForTokenClassification(make_tokenizer()) if kind in MODELS else None,
    )  # fmt: skip
    evaluated = trainer.evaluate(make_rows(kind, count=7, seed=1))  # before a step, so that all have the same weights
    trainer.train_dataset = change_rows(rows)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    gradients = {name: before[name] - weight for name, weight in trainer.model.state_dict().items()}
    log = next(log for log in trainer.state.log_history if "loss" in log)
    log = {key: value for key, value in log.items() if key.startswith("loss")}
    return gradients, log | {key: value for key, value in evaluated.items() if key.startswith("eval_loss")}


@functools.cache
def whole_step(case):
    """One batch of 8 rows in one process."""
    with tempfile.TemporaryDirectory() as folder:
        return train(folder, case)


def relative_difference(first, second):
    total = sum(gradient.norm() ** 2 for gradient in first.values()) ** 0.5
    return (sum((first[name] - second[name]).norm() ** 2 for name in first) ** 0.5 / total).item()


def assert_equal(whole, other, what):
    (gradients, log), (other_gradients, other_log) = whole, other
    assert relative_difference(gradients, other_gradients) < 1e-5, what
    assert log.keys() == other_log.keys()
    for key, value in log.items():
        assert other_log[key] == pytest.approx(value, rel=1e-4, abs=1e-7), (what, key)


def pad_more(rows):
    if "length" not in rows.column_names:  # images
        return rows
    longest = max(rows["length"])
    fillers = {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0}
    if isinstance(rows[0].get("labels"), list) and len(rows[0]["labels"]) == rows[0]["length"]:
        fillers["labels"] = -100
    return rows.map(
        lambda row: {name: row[name] + [filler] * (longest + 9 - row["length"]) for name, filler in fillers.items()}
    )


@pytest.mark.parametrize("case", CASES)
def test_a_step_depends_on_its_rows_alone(tmp_path, case):
    whole = gradients, log = whole_step(case)
    assert sum(gradient.norm() for gradient in gradients.values()) > 1e-3
    assert log["loss"] > 0
    for batch_size, accumulation in ((4, 2), (1, 8), (3, 3)):
        split = train(tmp_path, case, batch_size=batch_size, accumulation=accumulation)
        assert_equal(whole, split, f"{accumulation} batches of {batch_size}")
    assert_equal(whole, train(tmp_path, case, change_rows=pad_more), "padding")
    if case != "masked anew":  # whose masks go by the rows' numbers
        shuffled = train(tmp_path, case, batch_size=4, accumulation=2, change_rows=lambda rows: rows.shuffle(seed=1))
        assert_equal(whole, shuffled, "order")


@pytest.mark.parametrize("case", ["every part", "default", "rows without a label"])
def test_batches_under_a_token_budget_add_up_to_the_same_step(tmp_path, case):
    """Batches of 1 to 4 rows, all in one step."""
    CASES["budget"] = {**CASES[case], "max_tokens_per_batch": 24}
    split = train(tmp_path, "budget", accumulation=len(LengthBatches(make_rows()["length"], 1, max_tokens=24)))
    del CASES["budget"]
    assert_equal(whole_step(case), split, "budget")


@pytest.mark.parametrize("case", ["every part", "default", "rows without a label", "label sets"])
def test_parts_times_weights_are_the_loss(tmp_path, case):
    teacher, student = make_models(CASES[case].get("kind", "classes"), CASES[case].get("narrow", False))
    options = {key: value for key, value in CASES[case].items() if key not in ("kind", "narrow")}
    trainer = DistillationTrainer(
        model=student, teacher=teacher, processing_class=make_tokenizer(),
        train_dataset=make_rows(CASES[case].get("kind", "classes"), 16),
        args=DistillationConfig(
            output_dir=str(tmp_path), max_steps=6, logging_steps=3, per_device_train_batch_size=3, save_strategy="no",
            learning_rate=1e-3, disable_tqdm=True, bf16=False, **options,
        ),
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        parts = [key.partition("/")[2] for key in log if key.startswith("loss/")]
        weights = {part: log.get(f"weight/{part}", trainer.weights[part]) for part in parts}
        assert sum(weights[part] * log[f"loss/{part}"] for part in parts) == pytest.approx(log["loss"], rel=1e-4)
        assert set(parts) == {part for part, weight in trainer.weights.items() if weight != 0}


@pytest.mark.parametrize(("case", "idle"), [("default", False), ("every part", False), ("hidden", True)])
def test_weights_that_the_loss_leaves_out_are_found(tmp_path, case, idle):
    """The hidden loss leaves out the head; DDP looks for such weights only where there are some."""
    options = dict(CASES[case])
    teacher, student = make_models(narrow=options.pop("narrow", False))
    trainer = DistillationTrainer(
        model=student, teacher=teacher, train_dataset=make_rows(), processing_class=make_tokenizer(),
        args=DistillationConfig(output_dir=str(tmp_path), bf16=False, **options),
    )  # fmt: skip
    assert trainer._has_idle_weights() == idle
    assert all(parameter.grad is None for parameter in student.parameters())


_WORKER = """
import sys, torch
sys.path.insert(0, {root!r})
from accelerate import PartialState
import distill.training.cache
distill.training.cache._CHUNK_BYTES = 4096
from tests.training.test_exactness import CASES, train
results = {{}}
for case in CASES:
    for batch_size, accumulation in ((4, 1), (3, 2)):
        results[f"{{case}}|{{batch_size}}|{{accumulation}}"] = train(
            {folder!r}, case, batch_size=batch_size, accumulation=accumulation
        )
for case in ("hidden, upper layers unused", "every part"):  # DDP finds a parameter without a gradient a step too late
    results[f"{{case}}|steps"] = train({folder!r}, case, batch_size=4, steps=3)
from tests.training.test_cache import SGD, losses, make_trainer
from pathlib import Path
cached = make_trainer(Path({folder!r}), "hidden", 42, cache_teacher="hidden", **SGD, per_device_train_batch_size=4)
cached.train()
results["cached"] = losses(cached)
assert PartialState().num_processes == 2
if PartialState().is_main_process:
    torch.save(results, {folder!r} + "/results.pt")
"""


def test_two_processes_give_the_gradients_and_losses_of_one(tmp_path):
    """Two real processes (gloo); with batches of 3 the last one holds 2 rows, and 4 that only fill it up."""
    script = tmp_path / "worker.py"
    script.write_text(_WORKER.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    _assert_one_cache_for_both(tmp_path, results.pop("cached"))
    assert len(results) == 2 * len(CASES) + 2
    for name, found in results.items():
        case, _, split = name.partition("|")
        if split == "steps":
            gradients, _ = train(tmp_path, case, steps=3)
            assert relative_difference(gradients, found[0]) < 1e-4, name
        else:
            assert_equal(whole_step(case), found, name)


def _assert_one_cache_for_both(folder, found):
    """Each process computed its share; one process finds all of it, and learns the same from the same steps."""
    from tests.training.test_cache import SGD, losses, make_trainer

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("chunk-*.arrow")}
    assert len(before) > 1
    trainer = make_trainer(folder, "hidden", 42, cache_teacher="hidden", **SGD)
    trainer.train()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("chunk-*.arrow")} == before
    assert losses(trainer) == pytest.approx(found, rel=1e-4)


def test_the_step_equals_a_loop_written_by_hand(tmp_path):
    """The whole step against torch alone: no Trainer, no function of ours."""
    teacher, student = make_models()
    batch = make_tokenizer().pad(list(make_rows().remove_columns("length")), return_tensors="pt")
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

    CASES["by hand"] = {
        "temperature": 3.0, "soft_weight": 0.7, "soft_loss": "kl", "hard_weight": 0.2, "hidden_weight": 0.1,
        "layer_map": "uniform", "hidden_loss": "mse",
    }  # fmt: skip
    gradients, log = train(tmp_path, "by hand")
    del CASES["by hand"]
    gradients = {name.removeprefix("student."): gradient for name, gradient in gradients.items()}
    assert relative_difference(by_hand, {name: gradients[name] for name in by_hand}) < 1e-5
    assert log["loss/soft"] == pytest.approx(9 * soft.item(), rel=1e-4)
    assert log["loss/hard"] == pytest.approx(hard.item(), rel=1e-4)
    assert log["loss/hidden"] == pytest.approx(hidden.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((0.7 * 9 * soft + 0.2 * hard + 0.1 * hidden).item(), rel=1e-4)


@pytest.mark.parametrize(
    "case",
    sorted(
        CASES.keys()
        - {"hard", "class weights", "contrastive", "every part", "hidden, upper layers unused", "two tokenizers"}
        - {
            "quantization-aware",
            "engine-aware",
            *(case for case in CASES if case.startswith("some rows of other tokens")),
        }
    ),
)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path, case):
    options = dict(CASES[case])
    kind = options.pop("kind", "classes")
    options.pop("narrow", None)
    teacher, _ = make_models(kind)
    student = copy.deepcopy(teacher)
    args = DistillationConfig(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False,
        cache_teacher="none",
        **{**options, "hard_weight": 0.0},
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(kind),
        processing_class=None if kind == "images" else make_tokenizer(),
        data_collator=DataCollatorForTokenClassification(make_tokenizer()) if kind in MODELS else None,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-5)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", ["classes", "tokens", "spans", "masked anew", "causal", "images", "two tokenizers"])
def test_a_training_that_was_cut_off_ends_as_a_whole_one(tmp_path, kind):
    """Over two epochs, so that rows and masks are drawn anew between the two sessions."""

    def session(name, **options):
        teacher, student = make_models(kind)
        args = DistillationConfig(
            output_dir=str(tmp_path / name), per_device_train_batch_size=4, num_train_epochs=2, save_steps=1,
            save_total_limit=10, learning_rate=1e-2, disable_tqdm=True, bf16=False, hard_weight=0.5, logging_steps=1,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=student, teacher=teacher, args=args, train_dataset=make_rows(kind),
            processing_class=None if kind == "images" else make_tokenizer(),
        )  # fmt: skip
        trainer.train(**options)
        return trainer.student.state_dict()

    whole = session("whole")
    resumed = session("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tokens", "masked anew", "causal", "images"])
@pytest.mark.parametrize("alone", [False, True])
def test_the_best_checkpoint_is_the_model_that_stays(tmp_path, kind, alone):
    """Also of models whose files have neither tied weights nor the modules' own names."""
    teacher, student = make_models(kind)
    best = {}
    args = (TrainingConfig if alone else DistillationConfig)(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, save_steps=1, eval_steps=1,
        eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="planned", save_total_limit=10,
        learning_rate=1e-2, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    rows = make_rows(kind)
    trainer = DistillationTrainer(
        model=student, teacher=None if alone else teacher, args=args, train_dataset=rows, eval_dataset=rows,
        processing_class=None if kind == "images" else make_tokenizer(),
    )  # fmt: skip
    evaluate = trainer.evaluate

    def planned(*arguments, **options):
        """Evaluates, and calls step 2 the best."""
        if trainer.state.global_step == 2:
            best.update({name: weight.clone() for name, weight in trainer.student.state_dict().items()})
        found = evaluate(*arguments, **options)
        return found | {"eval_planned": -abs(trainer.state.global_step - 2)}

    trainer.evaluate = planned
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    for name, weight in trainer.student.state_dict().items():
        torch.testing.assert_close(weight, best[name], rtol=0, atol=0, msg=name)
