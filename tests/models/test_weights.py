"""Checkpoints whose weights are not what their config says: read rightly, or refused; never drawn anew in silence."""

import json
import logging

import pytest
import safetensors.torch
import torch
from transformers import (
    AlbertConfig,
    AlbertForTokenClassification,
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
)
from transformers.integrations import deepspeed

from distill import DistillationConfig, DistillationTrainer, quantize_model
from distill.compression.quantization.mixed import calibration_logits
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_model
from distill.models.load import find_model, load_classifier, load_for_finetuning
from distill.models.weights import fit_of, plain_names, stored_shapes
from distill.recipes.stored_models import has_head, stored_fit
from distill.tasks.base import GLUE
from distill.tasks.kinds import own_task
from distill.tasks.outputs import all_finite
from tests.conftest import tiny_bert, tiny_config

NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
SST2 = GLUE["sst2"]


def edit_weights(folder, change):
    """Rewrite a folder's weights by a function of the dictionary."""
    file = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})


def edit_config(folder, **changes):
    """Rewrite a folder's config; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "0.auto_model.", "module._orig_mod.", "model.", "0."])
def test_a_known_prefix_is_left_out_and_said(tmp_path, prefix, caplog):
    base = tiny_bert().bert
    base.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    with caplog.at_level(logging.WARNING):
        model = load_for_finetuning(str(tmp_path), SST2)
    assert "its weights' names are read without a wrapper's prefix" in caplog.text
    for name, weight in base.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], weight)
    model.save_pretrained(tmp_path / "again")  # under plain names
    assert "bert.pooler.dense.weight" in safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    _, notes = stored_fit(find_model(str(tmp_path)), SST2, new_head=True)
    assert len(notes) == 1
    assert f"({prefix}embeddings.LayerNorm.bias as embeddings.LayerNorm.bias)" in notes[0]


def test_wrappers_inside_names_and_around_heads_are_left_out(tmp_path):
    stored = tiny_bert(**NAMES)
    stored.save_pretrained(tmp_path)

    def wrap(weights):
        blocks = {name.replace("encoder.layer.2.", "encoder.layer.2._orig_mod."): w for name, w in weights.items()}
        return {f"module.{name}": weight for name, weight in blocks.items()}

    edit_weights(tmp_path, wrap)
    model = load_classifier(str(tmp_path), SST2)
    for name, weight in stored.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_names_that_are_right_are_left_alone(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = LlamaModel(LlamaConfig(vocab_size=9, **sizes))
    for names in (lambda name: name, lambda name: f"model.{name}"):
        stored = {names(name): weight.to("meta") for name, weight in model.state_dict().items()}
        found = plain_names(stored, LlamaModel, model.config)
        assert fit_of(stored, LlamaModel, model.config, found).problem is None


def test_an_unknown_prefix_is_refused(tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: {f"my_net.{name}": weight for name, weight in weights.items()})
    with pytest.raises(
        InputError, match=r"lacking: bert\.embeddings\.LayerNorm\.bias, .* and 66 more; my_net\.embeddings"
    ):
        load_for_finetuning(str(tmp_path), SST2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 33, r"word_embeddings\.weight is 25×64, and 33×64 in it"),
        ("num_hidden_layers", 6, r"lacking: bert\.encoder\.layer\.4\..* and 29 more"),
        ("num_hidden_layers", 3, r"stored without a place in it: .*encoder\.layer\.3\."),
        ("intermediate_size", 256, r"intermediate\.dense\.bias is 128, and 256 in it"),
        ("max_position_embeddings", 128, r"position_embeddings\.weight is 64×64, and 128×64 in it"),
        ("type_vocab_size", 1, r"token_type_embeddings\.weight is 2×64, and 1×64 in it"),
    ],
)
@pytest.mark.parametrize("head", [True, False])
def test_a_config_of_other_weights_is_refused(tmp_path, key, value, message, head):
    model = tiny_bert(**NAMES)
    (model if head else model.bert).save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(InputError, match=message):
        load_for_finetuning(str(tmp_path), SST2)
    with pytest.raises(InputError, match=message):
        load_classifier(str(tmp_path), SST2)


def test_a_quantized_folder_of_another_config_is_refused(tmp_path):
    quantize_model(tiny_bert(**NAMES), format="nf4").save_pretrained(tmp_path)
    load_classifier(str(tmp_path), SST2)
    edit_config(tmp_path, num_hidden_layers=5)
    with pytest.raises(InputError, match=r"lacking: bert\.encoder\.layer\.4"):
        load_classifier(str(tmp_path), SST2)


def test_weights_that_are_missing_are_named_and_shards_are_read(tmp_path):
    model = tiny_bert(**NAMES)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_classifier(str(tmp_path), SST2)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path / "one")
    gone = "bert.encoder.layer.1.output.dense.weight"
    edit_weights(tmp_path / "one", lambda weights: {name: w for name, w in weights.items() if name != gone})
    for load in (load_classifier, load_for_finetuning):
        with pytest.raises(InputError, match=rf"lacking: {gone}\)"):
            load(str(tmp_path / "one"), SST2)


def test_only_a_head_may_be_new_and_what_is_more_is_said(tmp_path, caplog):
    tiny_bert(num_labels=5).save_pretrained(tmp_path / "five")
    with caplog.at_level(logging.WARNING):
        load_for_finetuning(str(tmp_path / "five"), SST2)
    assert "its head has another shape and is drawn anew" in caplog.text
    assert "classifier.weight 5×64 → 2×64" in caplog.text
    BertForTokenClassification(tiny_config()).save_pretrained(tmp_path / "no-pooler")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_for_finetuning(str(tmp_path / "no-pooler"), SST2)
    assert "its pooler is not stored and is drawn anew" in caplog.text
    with pytest.raises(InputError, match=r"no trained head.*pooler"):
        load_classifier(str(tmp_path / "no-pooler"), SST2, label_map={"LABEL_0": "negative", "LABEL_1": "positive"})


def test_tied_weights_old_buffers_and_unused_poolers_are_right(tmp_path):
    language = own_task("masked-lm", ("text",), "")
    BertForMaskedLM(tiny_config()).save_pretrained(tmp_path / "mlm")
    edit_weights(tmp_path / "mlm", lambda w: w | {"bert.embeddings.position_ids": torch.arange(64)[None]})
    load_classifier(str(tmp_path / "mlm"), language)
    causal = own_task("causal-lm", ("text",), "")
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 9, "bos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    edit_weights(tmp_path / "gpt2", lambda w: w | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)})
    load_classifier(str(tmp_path / "gpt2"), causal)
    load_for_finetuning(str(tmp_path / "gpt2"), causal)
    tokens = own_task("token-classification", ("tokens",), "label").with_label_names(("A", "B"))
    names = {"id2label": {0: "A", 1: "B"}, "label2id": {"A": 0, "B": 1}}
    albert = AlbertForTokenClassification(
        AlbertConfig(vocab_size=9, embedding_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, **names)
    )
    albert.save_pretrained(tmp_path / "albert")  # all layers share one set of weights
    edit_weights(tmp_path / "albert", lambda w: w | {"albert.pooler.weight": torch.ones(8, 8)})
    load_classifier(str(tmp_path / "albert"), tokens)


def test_without_architectures_the_weights_tell_whether_a_head_is_there(tmp_path):
    tiny_bert(**NAMES).save_pretrained(tmp_path / "with")
    tiny_bert(**NAMES).bert.save_pretrained(tmp_path / "without")
    for name, there in (("with", True), ("without", False)):
        edit_config(tmp_path / name, architectures=None)
        assert has_head(find_model(str(tmp_path / name)), SST2) is there
    BertForTokenClassification(tiny_config(**NAMES)).save_pretrained(tmp_path / "tokens")
    assert not has_head(find_model(str(tmp_path / "tokens")), SST2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = tiny_bert(**NAMES)
    with torch.no_grad():
        model.bert.encoder.layer[3].output.dense.weight[0, 0] = value
    model.save_pretrained(tmp_path)
    for load in (load_classifier, load_for_finetuning):
        with pytest.raises(InputError, match=r"NaN or infinite \(bert\.encoder\.layer\.3\.output\.dense\.weight\)"):
            load(str(tmp_path), SST2)


def test_headers_are_read_without_the_weights(tmp_path):
    tiny_bert(**NAMES).save_pretrained(tmp_path)
    stored = stored_shapes([tmp_path / "model.safetensors"])
    assert stored["classifier.weight"].shape == (2, 64)
    assert all(tensor.is_meta for tensor in stored.values())


def test_models_are_looked_at_under_zero_3_too(tmp_path):
    class Zero3:
        def is_zero3(self):
            return True

    tiny_bert(**NAMES).save_pretrained(tmp_path)
    sharding = Zero3()
    deepspeed.set_hf_deepspeed_config(sharding)
    try:
        fit, _ = stored_fit(find_model(str(tmp_path)), SST2, new_head=False)
        assert fit is not None
        assert fit.problem is None
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


# --- outputs --------------------------------------------------------------------------------------------------------


class Overflows(torch.nn.Module):
    """In place of a model's last layer: its outputs times infinity, as of weights that overflow."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states):
        return self.layer(states) * float("inf")


@pytest.fixture
def overflowing():
    model = tiny_bert(**NAMES)
    model.classifier = Overflows(model.classifier)
    model.name_or_path = "overflowing"
    return model


def test_outputs_that_are_not_finite_are_not_scored(overflowing, tokenizer, sst2_folder):
    data = load_data("sst2", DataOptions(path=str(sst2_folder), max_length=24))
    with pytest.raises(InputError, match="mine: its predictions are NaN or infinite, so there is nothing to score"):
        evaluate_model(overflowing, tokenizer, data, name="mine")
    batch = {"input_ids": torch.tensor([[2, 7, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(InputError, match="overflowing: its predictions are NaN"):
        calibration_logits(overflowing, [batch])


@pytest.mark.parametrize("cache", ["none", "logits"])
def test_a_teacher_whose_outputs_are_not_finite_is_named(overflowing, tokenizer, sst2_folder, tmp_path, cache):
    data = load_data("sst2", DataOptions(path=str(sst2_folder), max_length=24))
    args = DistillationConfig(output_dir=str(tmp_path), max_steps=2, disable_tqdm=True, cache_teacher=cache)
    trainer = DistillationTrainer(
        model=tiny_bert(**NAMES), teacher=overflowing, args=args, train_dataset=data.tokenized("train", tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(InputError, match="teacher: overflowing predicts NaN or infinite values"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_quantized():
    model = tiny_bert(**NAMES)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="NaN or infinite"):
        quantize_model(model, format="int8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_padding_may_be_anything(bad):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for shape, padded in (((2, 3, 4), (0, 2, 1)), ((2, 2, 3), (0, 1, 2))):  # tokens, spans
        logits = torch.zeros(shape)
        logits[padded] = bad
        assert all_finite(logits, mask)
        logits[1, 1, 1] = bad
        assert not all_finite(logits, mask)
    rows = torch.zeros(2, 3)
    assert all_finite(rows, mask)
    rows[0, 2] = bad
    assert not all_finite(rows, mask[:, :2])
    assert not all_finite(rows, None)
