"""What is given to distill comes back as it was: models, arguments, rows, and the process around them."""

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, TrainerCallback

from distill import (
    DataOptions,
    DistillationConfig,
    DistillationTrainer,
    InputError,
    QuantizationSettings,
    build_student,
    load_data,
    quantize_model,
)
from distill.training.config import PARTS, TrainingConfig
from distill.training.features import FeatureExtractor, FeatureSpec
from tests.conftest import make_tokenizer, tiny_bert
from tests.training.test_exactness import make_rows

EVERY_PART = dict.fromkeys((f"{part}_weight" for part in PARTS), 0.3)

TRANSFORMERS_OWN = {
    *("_output_capturing_hooks_installed", "_gradient_checkpointing_func", "gradient_checkpointing"),
    *("_require_grads_hook", "_require_grads_hooks", "neftune_noise_alpha"),
}
"""Attributes that its modules have from the first call or checkpointing on, whether it is on or off."""


def state_of(model, *, weights=True):
    """All of a model that a caller could miss: weights, gradients asked for, modes, hooks, own attributes, config."""
    modules = dict(model.named_modules())
    return {
        "weights": copy.deepcopy(model.state_dict()) if weights else None,
        "parameters": {n: (p.requires_grad, p.dtype, p.device) for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: hooks_of(module) for name, module in modules.items()},
        "attributes": {name: set(vars(module)) - TRANSFORMERS_OWN for name, module in modules.items()},
        "dropout": {name: module.p for name, module in modules.items() if isinstance(module, torch.nn.Dropout)},
        "checkpointing": {name: getattr(module, "gradient_checkpointing", None) for name, module in modules.items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
    }


def hooks_of(module):
    """But for those that a transformers model puts on itself at its first call, and that do nothing afterwards."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return [hook for hook in hooks if hook.__module__ != "transformers.utils.output_capturing"]


def state_of_process():
    return {
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "benchmark": torch.backends.cudnn.benchmark,
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradients": torch.is_grad_enabled(),
        "verbosity": transformers.logging.get_verbosity(),
        "levels": {name: logging.getLogger(name).level for name in (None, "transformers", "distill", "datasets")},
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
    }


def assert_same(before, after):
    for key, value in before.items():
        if key == "weights" and value is not None:
            assert value.keys() == after[key].keys()
            assert all(torch.equal(weight, after[key][name]) for name, weight in value.items())
        else:
            assert after[key] == value, key


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("in the middle of it")


def adapted(model):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("run", ["train", "fail", "evaluate", "predict"])
@pytest.mark.parametrize(
    "options",
    [
        EVERY_PART,
        {"qat": "int8", "freeze_embeddings": True, "gradient_checkpointing": True, "relation_weight": 1.0},
        {"qat": "openvino", "gradient_checkpointing": True, "packing": True},
        {"packing": True, "full_determinism": True, "bf16": True, "log_level": "error", "neftune_noise_alpha": 5.0},
    ],
    ids=["every part", "qat", "engine", "packing"],
)
def test_a_run_changes_nothing_but_the_students_weights(tmp_path, run, options):
    teacher = tiny_bert(hidden_dropout_prob=0.1).train()  # in part: what a user has left behind
    teacher.bert.encoder.layer[1].eval().requires_grad_(False)
    student = tiny_bert(seed=1, num_hidden_layers=2, hidden_dropout_prob=0.1)
    student.config.architectures, student.config.dtype = ["BertForSequenceClassification"], torch.float32  # as if saved
    rows, validation = make_rows(), make_rows().add_column("sentence", ["a"] * 8)
    args = DistillationConfig(output_dir=str(tmp_path), max_steps=2, save_steps=1, disable_tqdm=True, **options)
    models, of_rows = (
        (student, teacher),
        [(each._fingerprint, each.format, each.features) for each in (rows, validation)],
    )
    before, around = [state_of(student, weights=False), state_of(teacher)], state_of_process()
    given = copy.deepcopy({each.name: getattr(args, each.name) for each in dataclasses.fields(args)})
    callbacks = [Fail()] if run == "fail" else []
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=rows, eval_dataset=validation,
        processing_class=make_tokenizer(), callbacks=callbacks,
    )  # fmt: skip
    with pytest.raises(RuntimeError) if run == "fail" else contextlib.nullcontext():
        {"train": trainer.train, "fail": trainer.train, "evaluate": trainer.evaluate}.get(
            run, lambda: trainer.predict(validation)
        )()
    for model, state in zip(models, before, strict=True):
        assert_same(state, state_of(model, weights=state["weights"] is not None))
    assert_same(around, state_of_process())
    assert {each.name: getattr(args, each.name) for each in dataclasses.fields(args)} == given
    assert [(each._fingerprint, each.format, each.features) for each in (rows, validation)] == of_rows
    assert len(callbacks) == (run == "fail")


def test_finetuning_leaves_no_autocast_around_the_model(tmp_path):
    """Accelerate wraps the forward of what it prepares: a float32 model would go on computing in bfloat16."""
    model = tiny_bert()
    before = state_of(model, weights=False)
    args = TrainingConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", disable_tqdm=True, bf16=True)
    trainer = DistillationTrainer(model=model, args=args, train_dataset=make_rows(), processing_class=make_tokenizer())
    seen = []
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    before["hooks"] = state_of(model, weights=False)["hooks"]
    prepared = []
    prepare = trainer.accelerator.prepare_model
    trainer.accelerator.prepare_model = lambda *a, **k: prepared.append(k.get("evaluation_mode")) or prepare(*a, **k)
    evaluate = functools.partial(trainer.evaluate, make_rows())
    for run in (evaluate, trainer.train, evaluate, trainer.train):
        run()
        assert set(seen) == {torch.bfloat16}
        seen.clear()
        model(input_ids=torch.tensor([[2, 7, 3]]))
        assert seen == [torch.float32]
        seen.clear()
        assert_same(before, state_of(model, weights=False))
    assert prepared.count(None) == 2  # each training anew, which under DDP is what shares the gradients


def test_a_language_model_may_use_its_cache_again(tmp_path):
    """Trainer switches it off for good, in the saved config too, and the student would generate slowly."""
    size = {"vocab_size": 25, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module.config.use_cache))
    args = TrainingConfig(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True)
    rows = make_rows().remove_columns(["labels", "token_type_ids"])
    trainer = DistillationTrainer(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert set(seen) == {False}
    assert model.config.use_cache is True
    for folder in ("checkpoint-1", "saved"):
        assert transformers.AutoConfig.from_pretrained(tmp_path / folder).use_cache is True


def test_a_feature_extractor_reads_outside_of_a_run_and_leaves_nothing_behind():
    model = tiny_bert()
    before = state_of(model)
    reader = FeatureExtractor(model, [FeatureSpec(attention=(1,), relations=(2,))])
    inputs = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    _, [read] = reader(inputs)
    assert read.attention[0].shape == (1, 4, 4, 4)
    assert_same(before, state_of(model))
    with reader.attached():
        assert model.config._attn_implementation == "eager"
        _, [again] = reader(inputs)
        assert model.config._attn_implementation == "eager"
    assert torch.equal(again.relations[0][0], read.relations[0][0])
    assert_same(before, state_of(model))


# --- adapters -------------------------------------------------------------------------------------------------------


def test_a_teacher_with_adapters_teaches_what_its_merged_weights_do(tmp_path):
    teacher = adapted(tiny_bert()).train()
    merged = copy.deepcopy(teacher).merge_and_unload()
    before = state_of(teacher)
    logs = []
    for each in (teacher, merged):
        args = DistillationConfig(
            output_dir=str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no", disable_tqdm=True, **EVERY_PART
        )
        trainer = DistillationTrainer(
            model=tiny_bert(seed=1, num_hidden_layers=2), teacher=each, args=args, train_dataset=make_rows(),
            processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.train()
        logs.append({name: value for name, value in trainer.state.log_history[0].items() if "loss" in name})
    assert logs[0].keys() == logs[1].keys() >= {"loss/attention", "loss/relation", "loss/contrastive"}
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert_same(before, state_of(teacher))


def test_the_active_adapter_decides_what_is_cached(tmp_path):
    """Two adapters of one model: the same tensors, other predictions."""
    teacher = adapted(tiny_bert())
    teacher.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    losses = []
    for name in ("default", "second", "default"):
        teacher.set_adapter(name)
        args = DistillationConfig(
            output_dir=str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", cache_teacher="logits"
        )
        trainer = DistillationTrainer(
            model=tiny_bert(seed=1), teacher=teacher, args=args, train_dataset=make_rows(),
            processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("arch", ["same", "distilbert"])
def test_a_student_of_a_teacher_with_adapters_has_its_merged_weights(arch):
    teacher = adapted(tiny_bert()).train()
    before = state_of(teacher)
    student = build_student(teacher, student_arch=arch, num_layers=2)
    assert_same(before, state_of(teacher))
    expected = build_student(copy.deepcopy(teacher).merge_and_unload(), student_arch=arch, num_layers=2)
    assert type(student) is type(expected)
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.training
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


def test_a_student_of_a_loaded_adapter_has_its_merged_weights(tmp_path):
    """transformers puts adapters into a model's own layers."""
    tiny_bert().save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")
    teacher = BertForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        teacher.classifier.weight.add_(1.0)  # trained with the adapters, as a whole
    before = state_of(teacher)
    student = build_student(teacher)
    assert_same(before, state_of(teacher))
    batch = {"input_ids": torch.tensor([[2, 7, 8, 3]])}
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, atol=1e-5, rtol=1e-4)
        assert (student(**batch).logits - base(**batch).logits).abs().max() > 0.1


def test_a_teacher_with_prompts_teaches_predictions_alone(tmp_path):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    teacher = get_peft_model(tiny_bert(), config)
    for options, problem in (({}, None), ({"hidden_weight": 1.0}, "hidden_weight: the teacher's prompts are tokens")):
        args = DistillationConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", **options)
        with pytest.raises(InputError, match=problem) if problem else contextlib.nullcontext():
            DistillationTrainer(
                model=tiny_bert(seed=1), teacher=teacher, args=args, train_dataset=make_rows(),
                processing_class=make_tokenizer(),
            ).train()  # fmt: skip


def test_a_student_of_a_quantized_teacher_is_refused():
    with pytest.raises(InputError, match="teacher: is quantized, and a student needs float weights"):
        build_student(quantize_model(tiny_bert(), format="int8"), num_layers=2)
    with pytest.raises(InputError, match="teacher: its adapters belong to quantized weights"):
        build_student(quantize_model(adapted(tiny_bert()), format="nf4"), num_layers=2)


# --- the other public functions -------------------------------------------------------------------------------------


def test_a_student_is_cut_without_changing_its_teacher():
    teacher = tiny_bert().train()
    teacher.classifier.requires_grad_(False)
    before, around = state_of(teacher), state_of_process()
    for options in ({"num_layers": 2}, {"student_arch": "distilbert", "layers": [0, 3]}):
        student = build_student(teacher, **options)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1)
        student.config.id2label[0] = "changed"
    assert_same(before, state_of(teacher))
    assert_same(around, state_of_process())


@pytest.mark.parametrize("calibrated", [False, True])
def test_quantizing_changes_neither_settings_nor_calibration_rows(calibrated):
    settings = QuantizationSettings(format="nf4", overrides={"bert.encoder.layer.0.*": "int8"}, skip=["*.layer.3.*"])
    batches = [{"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}]
    given, rows, around = copy.deepcopy(settings), copy.deepcopy(batches), state_of_process()
    quantize_model(tiny_bert(), settings, calibration=batches if calibrated else None)
    assert settings == given
    assert all(torch.equal(values, rows[0][name]) for name, values in batches[0].items())
    assert_same(around, state_of_process())


@pytest.mark.parametrize("make", [tiny_bert, lambda: adapted(tiny_bert())], ids=["plain", "adapters"])
def test_a_model_that_can_not_be_quantized_is_left_whole(make):
    model = make()
    before = state_of(model)
    wrong = QuantizationSettings(format="nf4", overrides={"no.such.layer": "int8"})
    for settings in (wrong, QuantizationSettings(format="int4")):  # type: ignore[arg-type]
        with pytest.raises(InputError):
            quantize_model(model, settings)
    assert_same(before, state_of(model))


def test_loading_data_changes_neither_its_options_nor_the_folder(sst2_folder):
    options = DataOptions(path=str(sst2_folder), max_length=32)
    given, around = copy.deepcopy(options), state_of_process()
    files = {path: path.read_bytes() for path in sst2_folder.rglob("*")}
    load_data("sst2", options)
    assert options == given
    assert {path: path.read_bytes() for path in sst2_folder.rglob("*")} == files
    assert_same(around, state_of_process())
