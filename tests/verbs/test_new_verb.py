"""A new verb is one module and one line: `scale` runs from check to card without a word of it in the package."""

import importlib.util
import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from distill import cli
from distill.recipes.fingerprint import code_fingerprint, modules_behind
from distill.verbs.all import VERBS
from tests.conftest import make_tokenizer, tiny_bert
from tests.verbs.scale import SCALE


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(VERBS, "scale", SCALE)
    monkeypatch.setattr(cli, "_WITH_OPTIONS", (*cli._WITH_OPTIONS, "scale"))  # cli imports no verb before it runs


@pytest.fixture
def recipe(tmp_path, sst2_folder):
    """A trained model that `scale` starts from, and one that is trained on."""
    model = tiny_bert(num_hidden_layers=1, id2label={0: "negative", 1: "positive"})
    model.config.label2id = {"negative": 0, "positive": 1}
    model.save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    path = tmp_path / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'run'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
        "steps:\n"
        f"  scaled: {{run: scale, model: {tmp_path / 'start'}, factor: 3}}\n"
        "  tuned: {run: finetune, model: scaled, max_steps: 2}\n"
    )
    return path


def test_a_verb_of_one_module_runs_from_check_to_card(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["check", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert f"scaled: scale of {tmp_path / 'start'}" in said.replace("\n", "")
    assert "128 weights × 3" in said  # two labels, 64 wide
    assert "0.0 M parameters" in said

    assert cli.main(["run", str(recipe)]) == 0
    assert "scaled: scale\n      128 weights × 3\n" in capsys.readouterr().err
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
        for folder in (tmp_path / "start", run / "scaled")
    )
    torch.testing.assert_close(after, 3 * before)
    record = json.loads((run / "scaled" / "step.json").read_text())
    assert (record["run"], record["status"], record["options"]["factor"]) == ("scale", "finished", 3.0)
    assert record["decided"] == {"largest": pytest.approx(float(after.detach().abs().max()))}
    assert json.loads((run / "tuned" / "step.json").read_text())["ancestors"] == {"scaled": "scale"}

    assert cli.main(["run", str(recipe)]) == 0
    assert "scaled: finished already" in capsys.readouterr().err
    assert cli.main(["eval", str(run / "scaled")]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert cli.main(["report", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    entry = next(each for each in report["models"] if each["name"] == "scaled")
    assert (entry["run"], entry["metrics"]) == ("scale", scored["metrics"])

    card = ModelCard.load(run / "scaled" / "README.md")
    assert "`start` with a head 3 times as large" in card.text
    assert f"Head of `start` × 3, its largest weight {record['decided']['largest']:.3f}" in card.text
    assert {"scaling", "scale", "scaled"} <= set(card.data.tags)
    assert {"scaling", "finetune"} <= set(ModelCard.load(run / "tuned" / "README.md").data.tags)


def test_its_mistakes_are_told_as_those_of_any_verb(recipe, tmp_path, capsys):
    for flag, value, problem in [
        ("factr", "2", "--scaled.factr: unknown option; did you mean 'factor'?"),
        ("factor", "0", "--scaled.factor: should be greater than 0; got 0"),
        ("factor", "13", "--scaled.factor: 13 brings bad luck; take another"),
        ("run", "scal", "--scaled.run: no verb 'scal'; did you mean 'scale'?"),
    ]:
        assert cli.main(["check", str(recipe), f"--scaled.{flag}", value]) == 2
        assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_its_options_are_listed(capsys):
    assert cli.main(["check", "--help-options", "scale"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "model required What to scale. factor 2.0 What its head is multiplied by." in said


def test_the_code_of_a_verb_outside_of_the_package_is_found(tmp_path, monkeypatch):
    behind = modules_behind(SCALE.module)
    assert {"tests.verbs.scale", "verbs.base", "models.load"} <= behind
    assert not {"training.trainer", "verbs.quantize", "verbs.all"} & behind
    file = tmp_path / "of_somebody.py"
    hashes = []
    for factor in ("2", "2  # a comment", "3"):
        file.write_text(f"from distill.common.records import SCHEMA\nFACTOR = {factor}\n")
        spec = importlib.util.spec_from_file_location("of_somebody", file)
        monkeypatch.setitem(sys.modules, "of_somebody", importlib.util.module_from_spec(spec))
        code_fingerprint.cache_clear()
        hashes.append(code_fingerprint("of_somebody"))
    code_fingerprint.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]
