import html
import json

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from distill.common.records import StepRecord
from distill.common.serialized import from_json
from distill.recipes.yaml12 import parse_yaml
from distill.runs.card import inherited, model_card
from distill.verbs.all import VERBS
from tests.records import report_of

REPORT = """# run

accuracy on 40 validation rows.

| model | accuracy |
| --- | ---: |
| /home/someone/models/teacher | 0.9000 |
| student | 0.8000 |

![accuracy against size and latency](report.png)

On the same rows (paired bootstrap):

- student − teacher: +0.1, 95 % interval +0.0 to +0.2
- alone − teacher: -0.1, 95 % interval -0.2 to +0.0
- student: 50% of small's divergence from teacher won back
- alone: 20% of small's divergence from teacher won back

- student is slower than teacher on cpu
- alone is slower than teacher on cpu

- 4 words of a sentence about no model
"""


OTHERS = ("teacher", "alone", "small")


def record(**changes):
    """step.json of a student of a local teacher, as a run writes it."""
    teacher = "/home/someone/models/teacher"
    found = {
        "name": "student", "run": "distill", "parents": [teacher], "lineage": [teacher], "ancestors": {},
        "sources": {teacher: None}, "root": {"reference": teacher, "hub_id": None, "revision": None},
        "layers": [0, 3], "layer_pairs": {teacher: {"hidden": [[1, 2], [2, 4]]}},
        "task": "own", "kind": "classification", "text": ["text"], "labels": ["no", "yes"],
        "scored": [["validation", "", ""]],
        "data": {"path": "/home/someone/rows.csv", "name": None, "max_length": 24}, "data_revision": None,
        "rows": {"train": 96, "validation": 40},
        "options": {
            "model": None, "soft_weight": 0.5, "soft_loss": "kl", "temperature": 2.0, "hard_weight": 0.5,
            "hidden_weight": {"from": 1.0, "to": 0.0}, "hidden_loss": "cosine", "embedding_weight": 0.0,
            "max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 32, "learning_rate": 2e-5,
            "seed": 42,
        },
        "train_seconds": 12.3, "environment": {"torch": "2", "transformers": "5", "bitsandbytes": "0"},
    }  # fmt: skip
    return {**found, **changes}


@pytest.fixture
def card(tmp_path):
    """The card of a record, with the recipe and the metrics given."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    (tmp_path / "report.md").write_text(REPORT)

    def write(recipe=None, metrics=None, name="me/it", form=ModelCard, **changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe or {}))
        step = from_json(StepRecord, record(**changes))
        models = [{"name": name, "metrics": metrics or {"accuracy": 0.8}} for name in (step.name, *OTHERS)]
        report = report_of({"models": models})
        return form(model_card(tmp_path / "student", step, report, name=name))

    return write


def test_local_models_and_data_are_told_by_their_names_alone(card):
    found = card()
    assert "/home/someone" not in str(found)
    assert "distilled from the teacher `teacher`" in found.text
    assert "classification of rows.csv (no, yes)" in found.text
    assert "| teacher | 0.9000 |" in found.text
    assert found.data.get("base_model") is None
    assert found.data.get("base_model_relation") is None
    assert found.data.get("datasets") is None
    (result,) = found.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("local", "rows.csv")


def test_what_the_report_says_of_other_models_alone_stays_there(card):
    lines = [line for line in card().text.partition("## Results")[2].partition("## Limits")[0].splitlines() if line]
    assert [line.split()[1] for line in lines if line.startswith("- ")] == ["student", "student:", "student", "4"]


def test_adapters_are_told_with_what_they_adapt(card, tmp_path):
    (tmp_path / "nf4").mkdir()
    none = dict.fromkeys(("embeddings", "skip", "overrides", "bits_budget", "lora"))
    base = record(name="nf4", run="quantize", train_seconds=None, layers=None, layer_pairs={})
    base["options"] = {**none, "format": "nf4", "gptq": True}
    (tmp_path / "nf4" / "step.json").write_text(json.dumps(base))
    options = {**record()["options"], "model": "nf4", "lora": {"r": 4}, "merge": False}
    ancestors = {"nf4": "quantize"}
    text = card(parents=["/home/someone/models/teacher", "nf4"], ancestors=ancestors, options=options).text
    assert "(no, yes), LoRA adapters of `nf4`, distilled from the teacher `teacher`." in text
    assert "Adapters (LoRA): rank 4" in text
    assert "Layers taken" not in text
    assert (
        "- Quantized with bitsandbytes: linear layers in nf4, embeddings in int8, 4-bit weights rounded by GPTQ" in text
    )
    alone = card(run="finetune", parents=["nf4"], ancestors=ancestors, options=options, layer_pairs={}).text
    assert "(no, yes), LoRA adapters of `nf4`, trained on labels." in alone
    merged = card(parents=["teacher", "nf4"], ancestors=ancestors, options={**options, "merge": True}).text
    assert "(no, yes), distilled from the teacher `teacher`." in merged
    assert "rank 4, merged" in merged


def test_losses_and_layers_are_told(card):
    text = card().text
    assert "Losses: 0.5 × soft (kl, temperature 2.0), 0.5 × hard, 1.0 to 0.0 × hidden (cosine)" in text
    assert "Layers matched by the hidden loss (student→`teacher`, 0: embeddings): 1→2, 2→4" in text
    assert "Training: 96 rows, 3 epochs, 32 rows a batch and process, learning rate 2e-05, seed 42, 12 s" in text


def test_the_recipe_names_what_a_local_root_does_not(card):
    data = card({"base_model": "org/root", "license": "apache-2.0", "language": ["de", "no"]}).data
    assert (data.base_model, data.base_model_relation) == ("org/root", "finetune")
    assert (data.license, data.language) == ("apache-2.0", ["de", "no"])  # not False, as YAML 1.1 reads it


def test_a_root_on_the_hub_gives_its_name_license_and_language(card, tmp_path):
    readme = "---\nlicense: other\nlicense_name: odd\nlicense_link: LICENSE\nlanguage: fr\n---\nHello.\n"
    (tmp_path / "README.md").write_text(readme)
    root = {"reference": "org/root@v1", "hub_id": "org/root", "revision": "a" * 40, **inherited(tmp_path)}
    data = card(root=root).data
    assert (data.base_model, data.license, data.license_name, data.language) == ("org/root", "other", "odd", "fr")
    assert data.license_link == "LICENSE"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert inherited(tmp_path) == {}


def test_each_metric_stands_under_the_split_that_it_was_measured_on(card):
    scored = [["validation_matched", "", ""], ["validation_mismatched", "", "_mm"], ["test", "test_", ""]]
    metrics = {"accuracy": 0.8, "accuracy_mm": 0.7, "test_accuracy": 0.6, "pearson": 0.5, "average": 0.4}
    rows = {split: 40 for split, _, _ in scored}
    results = card({"task": "mnli"}, metrics, scored=scored, rows={"train": 96, **rows}).data.eval_results
    found = {(each.dataset_split, each.metric_type): each.metric_value for each in results}
    assert found == {
        ("validation_matched", "accuracy"): 0.8,
        ("validation_mismatched", "accuracy"): 0.7,
        ("test", "accuracy"): 0.6,
        ("validation_matched", "pearsonr"): 0.5,
        ("validation_matched", "glue"): 0.4,
    }
    assert {(each.dataset_type, each.dataset_config) for each in results} == {("nyu-mll/glue", "mnli")}


@pytest.mark.parametrize(
    ("verb", "sentence", "relation", "tags", "detail"),
    [
        (
            "finetune",
            "fine-tuned on labels from `a` and `b`",
            "finetune",
            ["distill", "finetune"],
            "- Layers taken from the source (from 0): 0, 3",
        ),
        (
            "distill",
            "distilled from the teacher `a`",
            "finetune",
            ["distillation", "distill"],  # the Hub's client names each once
            "- Losses: 0.5 × soft (kl, temperature 2.0), 0.5 × hard, 1.0 to 0.0 × hidden (cosine)",
        ),
        (
            "trim_vocabulary",
            "`a` and `b` with a vocabulary of the tokens that the training rows use most",
            "finetune",
            ["distill", "trim_vocabulary"],
            "- Vocabulary: 30,522 → 12,000 tokens (`vocab_size: 12000`)",
        ),
        (
            "prune",
            "`a` and `b` without some of its attention heads or feed-forward neurons",
            "finetune",
            ["pruning", "distill", "prune"],
            "- Left: 12, 9 heads; 768 neurons in every block",
        ),
        (
            "factorize",
            "`a` and `b` with matrices that are products of two smaller ones",
            "finetune",
            ["low-rank", "distill", "factorize"],
            "- Factorized (embeddings, rank 128) by an SVD that keeps the layers' outputs on training rows (DRONE)",
        ),
        (
            "share",
            "`a` and `b` with attention layers that share their weights",
            "finetune",
            ["weight-sharing", "distill", "share"],
            "- Distinct attention layers: 2, started from the middle of the blocks that share",
        ),
        (
            "quantize",
            "`a` and `b` quantized with bitsandbytes: linear layers in int8, embeddings in int8",
            "quantized",
            ["distill", "quantize", "int8"],
            "- Quantized with bitsandbytes: linear layers in int8, embeddings in int8",
        ),
        (
            "export",
            "`a` and `b` exported for openvino in int8",
            "quantized",
            ["distill", "export", "openvino", "int8"],
            "- Static scales of activations from 256 training rows, on which it keeps 99.12% of the float model's "
            "predictions, divergence 0.00067",
        ),
    ],
)
def test_every_verb_has_its_words_tags_and_relation(card, verb, sentence, relation, tags, detail):
    quantized = {"format": "int8", "embeddings": None, "skip": None, "overrides": None, "bits_budget": None}
    trimmed = {"vocab_size": 12000, "coverage": None, "min_count": None}
    pruned = {"heads": None, "neurons": None, "intermediate_size": None, "speedup": 1.5}
    pruned |= {"importance": "fisher", "rounds": 1, "reconstruct": True}
    factorized = {"modules": None, "rank": 128, "energy": None, "size": None, "method": "activation"}
    shared = {"groups": 2, "what": "attention", "start": None}
    options = {
        **record()["options"],
        **factorized,
        **shared,
        **quantized,
        **trimmed,
        **pruned,
        "model": "b",
        "engine": "openvino",
    }
    decided = {"vocab_size_before": 30522, "vocab_size": 12000, "tokens": 9, "touched": {}}
    decided |= {"heads": [12, 9], "neurons": [768, 768], "speedup": 1.52, "threads": 1}
    decided |= {"float_layers": [], "calibration_rows": 256, "agreement": 0.9912, "divergence": 0.00067}
    decided |= {"start": "middle"}
    found = card({"base_model": "org/root"}, run=verb, parents=["a", "b"], options=options, decided=decided)
    assert f"(no, yes), {sentence}." in found.text
    assert found.data.base_model_relation == relation
    assert found.data.tags == tags
    assert detail in found.text.splitlines()


def test_every_verb_is_told_of():
    (cases,) = test_every_verb_has_its_words_tags_and_relation.pytestmark
    assert [case[0] for case in cases.args[1]] == list(VERBS)


def test_what_was_made_from_a_student_is_tagged_as_distilled(card):
    assert card(run="finetune", ancestors={"s": "distill"}).data.tags == ["distillation", "distill", "finetune"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "bf16"}, "rounded to bfloat16"),
        ({"format": "nf4", "gptq": True}, "linear layers in nf4, embeddings in int8, 4-bit weights rounded by GPTQ"),
        ({"bits_budget": "5MB", "skip": ["a"]}, "within 5MB (`sensitivity.json`), some modules otherwise"),
    ],
)
def test_what_a_quantized_model_is_made_of_is_told(card, options, words):
    none = dict.fromkeys(("format", "embeddings", "skip", "overrides", "bits_budget"))
    assert words in card(run="quantize", options={**record()["options"], **none, **options}).text


def test_names_with_brackets_and_dollars_stay_as_they_are(card):
    found = card(labels=["$usage", "{x}"])
    assert "($usage, {x})" in found.text
    assert json.dumps(found.data.to_dict())


@pytest.mark.parametrize(
    "name", ["no", "1", "1e5", "a: b", "# a", "[ham]", "a|b", "`a`", "<b>", "*a*", "null", "x\n---\ny", "é", "{}"]
)
def test_odd_names_leave_valid_metadata_and_markdown(card, name):
    text = card(labels=[name, "b"], data={**record()["data"], "path": f"/home/someone/{name}"}, form=str)
    found = ModelCard(text)
    (result,) = found.data.eval_results  # as the Hub's own client reads it
    assert result.dataset_name == name
    front_matter = text.split("\n---\n")[0].removeprefix("---\n")
    assert parse_yaml(front_matter) == yaml.safe_load(front_matter)
    shown = MarkdownIt().render(found.text.strip().split("\n\n")[1])
    assert html.unescape(shown) == (
        f"<p>A model for classification of {name} ({name}, b), distilled from the teacher <code>teacher</code>.</p>\n"
    ).replace("\n---\n", " --- ")


def test_a_metric_that_is_no_number_is_left_out_of_the_metadata(card):
    data = card(metrics={"pearson": None, "spearmanr": 0.5}).data
    assert [each.metric_type for each in data.eval_results] == ["spearmanr"]
    assert card(metrics={"pearson": None}).data.get("eval_results") is None
