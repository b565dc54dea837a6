import pytest
import torch
from transformers import AutoConfig, AutoModel, RobertaConfig, RobertaModel

from distill.benchmark import BenchmarkOptions, benchmark_models
from distill.errors import InputError
from distill.models import find_model, label_order, load_classifier, load_for_finetuning, load_tokenizer, longest_input
from distill.plan import make_plan
from distill.recipe import load_recipe
from distill.sources import sha256
from distill.tasks import GLUE
from tests.conftest import tiny_bert

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
