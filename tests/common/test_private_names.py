"""The installed transformers and accelerate still have the private names that the package touches."""

import ast
import copy
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Trainer,
)
from transformers.integrations import deepspeed
from transformers.quantizers import HfQuantizer

from distill.common import private_names

OVERRIDDEN = (
    *("_get_eval_sampler", "_get_train_sampler", "_remove_unused_columns", "_set_signature_columns_if_needed"),
    *("_get_num_items_in_batch", "_prepare_inputs", "_save_checkpoint", "_save", "_load_from_checkpoint"),
    *("_load_best_model", "_get_output_dir"),
)
"""Methods of Trainer that DistillationTrainer has its own of, or calls."""

GATHERED = {
    *(
        "_is_accelerate_prepared",
        "_original_forward",
        "_models",
        "_reset_state",
        "_shared_state",
        "_attn_implementation",
    ),
    *(
        "_from_config",
        "_init_weights",
        "_no_split_modules",
        "_model_mapping",
        "_tied_weights_keys",
        "_hf_deepspeed_config_weak_ref",
    ),
}


def config():
    return BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip


@pytest.fixture
def accelerate_states():
    states = private_names.shared_states()
    before = [dict(state) for state in states]
    yield states
    for state, values in zip(states, before, strict=True):
        state.clear()
        state.update(values)


def test_accelerate_prepares_a_model_anew_once_it_is_forgotten(accelerate_states):
    private_names.reset_accelerator_state()
    model = BertForSequenceClassification(config())
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare_model(model)
    assert model._is_accelerate_prepared
    assert accelerator._models == [model]
    prepared = private_names.take_prepared_forward(model)
    assert set(prepared) == {"forward", "_original_forward", "_is_accelerate_prepared"}
    assert "forward" not in vars(model)
    private_names.put_forward(model, prepared)
    assert vars(model)["forward"] is prepared["forward"]
    private_names.forget_prepared(model, accelerator)
    assert not model._is_accelerate_prepared
    assert not accelerator._models


def test_a_module_is_drawn_as_its_family_draws_it():
    drawn = config()
    drawn.initializer_range = 5.0
    model = BertForSequenceClassification(drawn)
    layer = model.bert.encoder.layer[0].output.dense
    torch.nn.init.ones_(layer.bias)
    torch.nn.init.zeros_(layer.weight)
    private_names.draw_weights(model, layer)
    assert layer.weight.std() > 2
    assert not layer.bias.any()


def test_accelerate_keeps_one_precision_for_the_process_until_it_is_reset(accelerate_states):
    private_names.reset_accelerator_state()
    assert private_names.shared_precision() is None
    Accelerator(cpu=True, mixed_precision="bf16")
    assert private_names.shared_precision() == "bf16" == AcceleratorState().mixed_precision
    assert accelerate_states[0]["device"] == PartialState().device
    assert accelerate_states[1]["_mixed_precision"] == "bf16"


def test_a_config_says_how_attention_is_computed():
    model = BertForSequenceClassification(config())
    model.set_attn_implementation("sdpa")
    assert private_names.attention_of_config(model.config) == "sdpa"
    asked = copy.deepcopy(model.config)
    private_names.set_attention_of_config(asked, "eager")
    assert private_names.attention_of_config(BertForSequenceClassification(asked).config) == "eager"


def test_a_model_is_made_of_a_config_in_its_dtype():
    half = config()
    half.dtype = torch.bfloat16
    model = private_names.model_from_config(BertForSequenceClassification, half)
    assert type(model) is BertForSequenceClassification
    assert model.dtype == torch.bfloat16


def test_modules_that_stay_on_one_device_are_named():
    names = {type(module).__name__ for module in BertForSequenceClassification(config()).modules()}
    assert "BertLayer" in private_names.unsplit_modules(BertForSequenceClassification(config())) & names


def test_an_auto_class_knows_the_class_of_a_config():
    assert private_names.class_of_config(AutoModelForSequenceClassification, config()) is BertForSequenceClassification


def test_a_weight_that_is_untied_stays_its_own():
    model = BertForMaskedLM(config())
    name = "cls.predictions.decoder.weight"
    assert name in model._tied_weights_keys
    assert name in model.all_tied_weights_keys
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(20, 8))
    private_names.untie(model, name)
    model.tie_weights()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_a_quantizer_finishes_what_was_loaded():
    assert callable(HfQuantizer._process_model_after_weight_loading)
    assert callable(HfQuantizer._process_model_before_weight_loading)


def test_weights_are_sharded_by_a_config_that_can_be_taken_away_and_put_back():
    before = private_names.sharding_config()

    class Config:
        def is_zero3(self):
            return True

    kept = Config()
    try:
        deepspeed.set_hf_deepspeed_config(kept)
        reference = private_names.sharding_config()
        deepspeed.unset_hf_deepspeed_config()
        assert not deepspeed.is_deepspeed_zero3_enabled()
        private_names.set_sharding_config(reference)
        assert private_names.sharding_config()() is kept
    finally:
        private_names.set_sharding_config(before)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_has_the_methods_that_ours_replaces_and_calls(name):
    assert callable(getattr(Trainer, name))
    source = inspect.getsource(Trainer) + inspect.getsource(inspect.getmodule(Trainer))
    assert source.count(name) > 1  # defined, and called


def test_no_other_module_touches_these_names():
    package = Path(private_names.__file__).parents[1]
    touched = {
        f"{path.relative_to(package)}: {node.attr}"
        for path in package.rglob("*.py")
        if path.name != "private_names.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in GATHERED
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")  # our own classes' attributes
    }
    assert not touched
