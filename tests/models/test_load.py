import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    RobertaModel,
)

from distill.common.sources import sha256
from distill.errors import InputError
from distill.evaluation.benchmark import BenchmarkOptions, benchmark_models
from distill.models.load import (
    find_model,
    label_order,
    load_classifier,
    load_for_finetuning,
    load_tokenizer,
    longest_input,
)
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.tasks.base import GLUE
from distill.tasks.kinds import own_task
from tests.conftest import tiny_bert
from tests.models.test_weights import edit_config

IDS = torch.tensor([[2, 5, 9, 14, 3]])
NAMES = {"mnli": ("contradiction", "entailment", "neutral")}  # another order than GLUE's


def save(folder, labels, tokenizer=None, **changes):
    model = tiny_bert(num_labels=len(labels), **changes)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: index for index, name in enumerate(labels)}
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model.eval()


def test_labels_in_another_order_are_aligned_by_name(tmp_path):
    stored = save(tmp_path, ["Contradiction", "ENTAILMENT", "neutral"])
    aligned = load_classifier(str(tmp_path), GLUE["mnli"])
    with torch.no_grad():
        torch.testing.assert_close(aligned(IDS).logits, stored(IDS).logits[:, [1, 2, 0]])
    assert aligned.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


def test_names_are_compared_without_case_and_punctuation(tmp_path):
    config = save(tmp_path, ["Not-Duplicate", "duplicate"]).config
    assert label_order(config, GLUE["qqp"], where="it") is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["LABEL_0", "LABEL_1"], r"say teacher_label_map .*\{LABEL_0: negative, LABEL_1: positive\}"),
        (["joy", "anger"], r"its labels \(joy, anger\) are not those of the task \(negative, positive\)"),
        (["negative", "neutral", "positive"], "are not those of the task"),
    ],
)
def test_labels_that_do_not_match_are_refused(tmp_path, labels, message):
    save(tmp_path, labels)
    with pytest.raises(InputError, match=message):
        load_classifier(str(tmp_path), GLUE["sst2"])


def test_a_label_map_names_unnamed_labels(tmp_path):
    stored = save(tmp_path, ["LABEL_0", "LABEL_1"])
    swapped = load_classifier(str(tmp_path), GLUE["sst2"], label_map={"LABEL_0": "positive", "LABEL_1": "negative"})
    with torch.no_grad():
        torch.testing.assert_close(swapped(IDS).logits, stored(IDS).logits.flip(1))


def test_a_regression_needs_one_output(tmp_path):
    save(tmp_path / "one", ["LABEL_0"])
    assert load_classifier(str(tmp_path / "one"), GLUE["stsb"]).config.problem_type == "regression"
    save(tmp_path / "two", ["a", "b"])
    with pytest.raises(InputError, match="has 2 outputs, but stsb is a regression"):
        load_classifier(str(tmp_path / "two"), GLUE["stsb"])


def test_a_model_without_a_head_is_no_teacher(tmp_path):
    model = tiny_bert(id2label={0: "negative", 1: "positive"})
    model.bert.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"no trained head for this task \(classifier.bias, classifier.weight missing\)"
    ):
        load_classifier(str(tmp_path), GLUE["sst2"])
    assert load_for_finetuning(str(tmp_path), GLUE["mnli"]).config.num_labels == 3


def test_finetuning_keeps_a_head_that_fits_and_replaces_one_that_does_not(tmp_path):
    stored = save(tmp_path, ["negative", "positive"])
    assert torch.equal(load_for_finetuning(str(tmp_path), GLUE["sst2"]).classifier.weight, stored.classifier.weight)
    other = load_for_finetuning(str(tmp_path), GLUE["mnli"])
    assert other.classifier.weight.shape[0] == 3
    assert torch.equal(other.bert.pooler.dense.weight, stored.bert.pooler.dense.weight)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        find_model(str(tmp_path))
    tiny_bert().config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a model folder without weights"):
        find_model(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is pickled and not read"):
        find_model(str(tmp_path))
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        find_model(str(tmp_path))


def test_broken_weights_are_told_in_words(tmp_path):
    save(tmp_path, ["negative", "positive"])
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="its weights cannot be loaded"):
        load_classifier(str(tmp_path), GLUE["sst2"])


def test_a_digest_is_checked_before_use(tmp_path):
    save(tmp_path, ["negative", "positive"])
    digest = sha256(tmp_path / "model.safetensors")
    assert find_model(f"{tmp_path}#sha256={digest}").location == str(tmp_path)
    with pytest.raises(InputError, match="do not use this file"):
        find_model(f"{tmp_path}#sha256={'0' * 64}")


@pytest.mark.parametrize("head", [True, False])
def test_a_model_is_measured_with_its_head_also_without_architectures(tmp_path, head):
    stored = save(tmp_path, ["negative", "positive"])
    (stored if head else stored.bert).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    options = BenchmarkOptions(sequence_length=8, throughput_batch_size=1, rounds=1)
    measured = benchmark_models({"it": str(tmp_path)}, options)["it"]
    assert measured.num_parameters == (stored if head else stored.bert).num_parameters()


def test_the_fingerprint_follows_the_weights(tmp_path):
    save(tmp_path / "a", ["x", "y"])
    save(tmp_path / "b", ["x", "y"])
    save(tmp_path / "c", ["x", "y"], seed=5)
    fingerprints = [find_model(str(tmp_path / name)).fingerprint for name in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_no_hub_and_nothing_cached():
    with pytest.raises(InputError, match="not to be had from the Hub nor from its cache"):
        find_model("some-org/some-model")


def test_the_tokenizer_cuts_where_training_cut(tmp_path, tokenizer):
    save(tmp_path, ["x", "y"], tokenizer)
    assert load_tokenizer(str(tmp_path), 17).model_max_length == 17


@pytest.mark.parametrize(
    ("family", "longest"),
    [("bert", 20), ("distilbert", 20), ("roberta", 18), ("xlm-roberta", 18), ("camembert", 18), ("mpnet", 18)],
)
def test_the_longest_input_is_what_the_positions_hold(family, longest):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = AutoConfig.for_model(family, vocab_size=9, max_position_embeddings=20, pad_token_id=1, **sizes)
    assert longest_input(config) == longest
    model = AutoModel.from_config(config).eval()
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_max_length_is_compared_with_the_positions_that_roberta_can_use(tmp_path, tokenizer, sst2_folder):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=26, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        f"steps: {{teacher: {{run: finetune, model: {tmp_path / 'roberta'}}}}}\n"
    )
    make_plan(load_recipe(recipe))
    with pytest.raises(InputError, match=r"takes at most 24 tokens, but data\.max_length is 25"):
        make_plan(load_recipe(recipe, {"data.max_length": "25"}))
    with pytest.raises(InputError, match="teacher takes at most 24 tokens"):
        benchmark_models({"teacher": str(tmp_path / "roberta")}, BenchmarkOptions(sequence_length=25, rounds=1))


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_models_own_is_run(tmp_path, tokenizer, known, monkeypatch):
    """Nor is the user asked whether it may be."""
    save(tmp_path / "m", ["negative", "positive"], tokenizer)
    (tmp_path / "m" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M", "AutoTokenizer": ["code.T", None]}
    edit_config(tmp_path / "m", auto_map=own, **({} if known else {"model_type": "own", "architectures": ["M"]}))
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    if known:  # transformers has classes of its own for it
        load_classifier(str(tmp_path / "m"), GLUE["sst2"])
        load_for_finetuning(str(tmp_path / "m"), GLUE["sst2"])
    else:
        with pytest.raises(InputError, match="it needs code of its own, auto_map, which is not run"):
            find_model(str(tmp_path / "m"))
    assert not (tmp_path / "ran").exists()


# --- padding --------------------------------------------------------------------------------------------------------

_CAUSAL = {
    "gpt2": GPT2Config(vocab_size=25, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    "llama": LlamaConfig(
        vocab_size=25, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.3,
    ),
    "qwen2": Qwen2Config(
        vocab_size=25, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, initializer_range=0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", _CAUSAL)
@pytest.mark.parametrize(("eos", "config_pad"), [(3, None), ([3, 4], None), (3, 3), (None, None)])
def test_a_causal_classifier_reads_no_padding(tmp_path, tokenizer, family, eos, config_pad):
    """A row beside longer ones gets the logits that it has on its own."""
    config = copy.deepcopy(_CAUSAL[family])
    config.eos_token_id, config.pad_token_id, config.bos_token_id = eos, config_pad, None
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    labels = {"LABEL_0": "negative", "LABEL_1": "positive"}
    for model in (
        load_for_finetuning(str(tmp_path), GLUE["sst2"]).eval(),
        load_for_finetuning(str(tmp_path), GLUE["sst2"], from_scratch=True).eval(),
        load_classifier(str(tmp_path), GLUE["sst2"], label_map=labels),
    ):
        assert model.config.pad_token_id == tokenizer.pad_token_id == 0
        texts = ["a good film", "the plot was very bad and a sad end"]
        together = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {name: together[name] for name in ("input_ids", "attention_mask")}
        alone = tokenizer(texts[:1], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits[:1], model(input_ids=alone).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("special", "pad_token_id", "expected"),
    [
        ({}, 0, "[PAD]"),  # as its model's config says
        ({"eos_token": "[SEP]"}, None, "[SEP]"),
        ({"eos_token": "[SEP]"}, 4, "[MASK]"),
        ({}, None, "[PAD]"),  # by its name
        ({"pad_token": "[UNK]"}, 0, "[UNK]"),  # what the tokenizer itself says comes first
    ],
)
def test_a_tokenizer_without_padding_token_gets_one(tmp_path, tokenizer, special, pad_token_id, expected):
    save(tmp_path, ["a", "b"], pad_token_id=pad_token_id)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == expected


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    save(tmp_path, ["a", "b"], pad_token_id=None)
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no padding token, nor an end token to pad with; set pad_token"):
        load_tokenizer(str(tmp_path))


def test_tokens_without_embeddings_are_refused_with_both_numbers(tmp_path, tokenizer, sst2_folder):
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<url>", "<user>"])
    save(tmp_path / "m", ["negative", "positive"], more)
    message = r"its tokenizer has 27 tokens, but the model embeddings for 25 \(vocab_size\)"
    for load in (load_classifier, load_for_finetuning):
        with pytest.raises(InputError, match=message):
            load(str(tmp_path / "m"), GLUE["sst2"])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        f"steps: {{teacher: {{run: finetune, model: {tmp_path / 'm'}}}}}\n"
    )
    with pytest.raises(InputError, match=rf"steps\.teacher\.model: .*{message}"):
        make_plan(load_recipe(recipe))


def test_a_padding_id_that_positions_start_at_stays(tmp_path, tokenizer):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=25, max_position_embeddings=26, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_for_finetuning(str(tmp_path), GLUE["sst2"]).config.pad_token_id == 1


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({"1": "negative", "2": "positive"}, ["negative", "positive"]),
        ({"0": 0, "1": 1}, ["0", "1"]),
        ({"0": False, "1": True}, ["False", "True"]),
        (["negative", "positive"], ["negative", "positive"]),
        ([0, 1], ["0", "1"]),
        ({"1": "positive", "0": "negative"}, ["negative", "positive"]),
        (None, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_labels_are_named_by_strings_from_0_on(tmp_path, tokenizer, id2label, names):
    stored = save(tmp_path, ["x", "y"], tokenizer)
    edit_config(tmp_path, id2label=id2label, label2id=None)
    config = find_model(str(tmp_path)).config
    assert config.id2label == dict(enumerate(names))
    load_tokenizer(str(tmp_path))
    benchmark_models({"it": str(tmp_path)}, BenchmarkOptions(sequence_length=8, throughput_batch_size=1, rounds=1))
    task = own_task("classification", ("text",), "label").with_label_names(tuple(reversed(names)))
    if names[0] != "LABEL_0":
        with torch.no_grad():
            torch.testing.assert_close(load_classifier(str(tmp_path), task)(IDS).logits, stored(IDS).logits.flip(1))


def test_labels_whose_ids_leave_one_out_are_refused(tmp_path):
    save(tmp_path, ["x", "y"])
    edit_config(tmp_path, id2label={"0": "x", "2": "y"}, label2id=None)
    with pytest.raises(InputError, match=r"id2label in its config\.json counts 0, 2; write 0 to 1"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("task", "model", "order"),
    [
        (("us", "US"), ["US", "us"], [1, 0]),
        (("us", "US"), ["us", "US"], None),
        (("us", "US", "other"), ["Other", "US", "us"], [2, 1, 0]),
        (("us", "US"), ["Us", "uS"], "differ by case or spaces alone, and are not exactly the task's"),
        (("us", "US"), ["us", "Us"], [0, 1]),
    ],
)
def test_classes_that_differ_by_case_alone_keep_a_row_each(task, model, order):
    config = BertConfig(id2label=dict(enumerate(model)), label2id={name: n for n, name in enumerate(model)})
    ours = own_task("classification", ("text",), "label").with_label_names(task)
    if isinstance(order, str):
        with pytest.raises(InputError, match=order):
            label_order(config, ours, where="it")
        mapped = dict(zip(model, reversed(task), strict=True))
        assert label_order(config, ours, mapped, where="it") == [1, 0]
    else:
        assert label_order(config, ours, where="it") == (None if order == sorted(order or []) else order)
