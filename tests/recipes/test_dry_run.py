"""What a training would stop at is told before the first one starts, for every step at once."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import BertConfig
from transformers.training_args import OptimizerNames

from distill.cli import main
from distill.errors import InputError
from distill.models.load import from_config
from distill.recipes.dry_run import push_problems, runnable_plan
from distill.recipes.recipe import load_recipe
from distill.verbs.training.rehearsal import _with_small_weights

LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml"}


@pytest.fixture
def recipe(tmp_path, sst2_folder, pretrained):
    """Writes a recipe whose student, the second step, has these options; returns its path."""

    def write(teacher=None, **student):
        path = tmp_path / "r.yaml"
        content = {
            "task": "sst2",
            "output_dir": str(tmp_path / "run"),
            "data": {"path": str(sst2_folder), "max_length": 24},
            "benchmark": {"sequence_length": 16, "throughput_batch_size": 2, "rounds": 1},
            "steps": {
                "teacher": {"run": "finetune", "model": str(pretrained), "max_steps": 2, **(teacher or {})},
                "student": {"run": "distill", "teacher": "teacher", "num_layers": 2, "max_steps": 2, **student},
            },
        }
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def planned(path, overrides=None, **options):
    return runnable_plan(load_recipe(path, overrides, draft=True), **options)


def problems(path, overrides=None, **options):
    with pytest.raises(InputError) as error:
        planned(path, overrides, **options)
    return [problem.removeprefix(f"{path}: ") for problem in error.value.problems]


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_logger_that_is_not_installed(recipe, logger, tmp_path, capfd):
    if importlib.util.find_spec(LOGGERS[logger]):
        pytest.skip(f"{logger} is installed")
    (found,) = problems(recipe(report_to=logger))
    assert found.startswith("steps.student.report_to: ")
    assert logger.partition("_")[0] in found
    assert "leave it out" in found
    assert "Traceback" not in capfd.readouterr().err  # of a destructor
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_to": "tensorbord"}, "student.report_to: tensorbord is not supported, only "),
        ({"fp16": True, "bf16": False}, "student.fp16: needs a GPU"),
        ({"fsdp": "full_shard"}, "student.fsdp: needs GPUs"),
        ({"use_liger_kernel": True}, "student.use_liger_kernel: the package liger-kernel is not installed"),
        ({"optim": "sgd", "optim_args": "momentum"}, "student.optim_args: should be like momentum=0.9"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "student.optim: could not convert string to float"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "student.lr_scheduler_type: One of min_lr or min_lr_rate"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "student.lr_scheduler_type: get_linear_schedule_with_warmup() got an"),
        ({"dataloader_persistent_workers": True}, "student.dataloader_num_workers: persistent_workers option needs"),
        ({"torch_compile_backend": "inductr"}, "student.torch_compile_backend: no backend 'inductr'; did you mean "),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"reentrant": True}},
         "student.gradient_checkpointing_kwargs: "),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 97},
         "student.dataloader_drop_last: leaves nothing of 96 rows, as a batch is 97"),
        ({"class_weights": [1, 2, 3]}, "student.class_weights: 3 weights, but the model predicts 2 classes"),
        ({"teacher_weights": [1, 2]}, "student.teacher_weights: 2 for 1 teachers"),
        ({"relation_weight": 1, "relation_heads": 7}, "student.relation_heads: 7 does not divide the widths 64 and 64"),
        ({"lora": {"target_modules": "query"}, "merge": True}, "student.lora.target_modules: the pattern 'query' matc"),
        ({"lora": {"target_modules": ["qery"]}, "merge": True}, "student.lora.target_modules: no module 'qery'; did y"),
        ({"lora": {"modules_to_save": ["haed"]}, "merge": True}, "student.lora.modules_to_save: no module 'haed'"),
        ({"lora": {}, "merge": True, "qat": "int8"}, "student.qat: the model has adapters"),
        ({"lora": {}, "merge": True, "qat": "openvino"}, "student.qat: the model has adapters"),
    ],
)  # fmt: skip
def test_what_a_training_would_stop_at(recipe, options, message):
    (found,) = problems(recipe(**options))
    assert found.startswith(f"steps.{message}")


def test_optimizers_are_refused_exactly_where_their_package_is_missing(recipe):
    packages = {"galore_adamw": "galore_torch", "lomo": "lomo_optim", "adamw_torch_4bit": "torchao",
                "schedule_free_sgd": "schedulefree", "grokadamw": "grokadamw", "adamw_8bit": "bitsandbytes",
                "stable_adamw": "optimi", "sgd": "torch"}  # fmt: skip
    assert set(packages) <= {name.value for name in OptimizerNames}
    for optimizer, package in packages.items():
        path = recipe(optim=optimizer, optim_target_modules=["query"])
        if importlib.util.find_spec(package):
            planned(path, only=["student"])
        else:
            (found,) = problems(path, only=["student"])
            assert found.startswith("steps.student.optim: ")
            assert "install" in found


def test_the_problems_of_all_steps_are_told_at_once_with_those_of_the_recipe(recipe):
    path = recipe(teacher={"optim": "lomo"}, report_to="nothing", temperatur=2)
    found = problems(path, overrides={"benchmark.rounds": "many"})
    for start in (
        "benchmark.rounds: should be a valid integer",
        "steps.student.temperatur: unknown option",
        "steps.teacher.optim: You need to install `lomo_optim`",
    ):
        assert any(each.removeprefix("--").startswith(start) for each in found), found


@pytest.mark.parametrize(
    "options",
    [
        {"report_to": "none"}, {"report_to": "all"}, {"neftune_noise_alpha": 5}, {"gradient_checkpointing": True},
        {"lora": {"target_modules": r".*\.(query|value)"}, "merge": True}, {"packing": True}, {"qat": "int8"},
        {"qat": "openvino"}, {"contrastive_weight": 1.0},
        {"hidden_weight": 1.0, "hidden_size": 32, "num_attention_heads": 2},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, {"max_steps": -1},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
    ],
)  # fmt: skip
def test_what_is_right_passes_and_leaves_nothing_behind(recipe, options, tmp_path):
    path = recipe(**options)
    plan = planned(path)
    assert list(plan.steps) == ["teacher", "student"]
    assert {each.name for each in tmp_path.iterdir()} == {"r.yaml"}
    before = plan.steps["student"].step.options
    assert before.output_dir == str(tmp_path / "run" / "student" / "checkpoints")


def test_only_steps_that_will_run_are_looked_at(recipe, monkeypatch):
    path = recipe(teacher={"report_to": "nothing"}, max_steps=1)
    assert len(problems(path)) == 1
    planned(path, only=["student"])
    monkeypatch.setattr("distill.recipes.dry_run.is_finished", lambda planned: planned.step.name == "teacher")
    planned(path)
    assert len(problems(path, force=True)) == 1


def test_stand_ins_keep_names_classes_and_ties_and_weigh_next_to_nothing():
    with torch.device("meta"):
        model = from_config(BertConfig(architectures=["BertForMaskedLM"]), "masked-lm")
        names = [name for name, _ in model.named_parameters()]
    _with_small_weights(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.005 * 110e6
    assert model.bert.embeddings.word_embeddings.weight.shape == (64, 64)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_push_without_a_network_or_token_is_told_by_check_and_refused_by_run(recipe, monkeypatch, capsys, tmp_path):
    path = recipe()
    monkeypatch.setattr("distill.common.credentials.get_token", lambda: "hf_it")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path.write_text(path.read_text() + "push: {student: me/it}\n")
    assert main(["check", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "note: push: HF_HUB_OFFLINE is set, so nothing can be pushed" in shown
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "push: HF_HUB_OFFLINE is set" in " ".join(said.split())
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert push_problems(SimpleNamespace(push={"student": "me/it"})) == []
    monkeypatch.setattr("distill.common.credentials.get_token", lambda: None)
    assert "no token" in push_problems(SimpleNamespace(push={"student": "me/it"}))[0]
    assert push_problems(SimpleNamespace(push={})) == []


def test_what_only_the_rows_show_is_told_by_check_with_the_steps_name(recipe, capsys):
    path = recipe(max_tokens_per_batch=3)
    assert main(["check", str(path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "steps.student.max_tokens_per_batch: 3, but the longest row has" in said
