"""The zip for the GLUE server, from made-up test rows and models whose predictions are known."""

import importlib.util
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from distill.tasks.base import GLUE
from tests.conftest import make_tokenizer, sentences, tiny_bert, write_rows

_SPEC = importlib.util.spec_from_file_location(
    "glue_submission", Path(__file__).parents[2] / "scripts" / "glue_submission.py"
)
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)

ALWAYS = {"cola": 1, "sst2": 0, "mrpc": 1, "qqp": 0, "mnli": 2, "qnli": 0, "rte": 1, "wnli": 1}
"""The class that each model predicts whatever the row."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and test rows of all tasks; QNLI's model has its labels in another order, RTE's rows come shuffled."""
    folder = tmp_path_factory.mktemp("submission")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 32
    for task in GLUE.values():
        names = list(task.label_names or ["score"])
        always = [float(ALWAYS.get(task.name, 0) == index) for index in range(len(names))]
        if task.name == "qnli":
            names, always = names[::-1], always[::-1]
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        model = tiny_bert(**labels, num_hidden_layers=1)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor([7.25] if task.kind == "regression" else always))
        model.save_pretrained(folder / "models" / task.name)
        tokenizer.save_pretrained(folder / "models" / task.name)
    for file in script.FILES.values():
        texts = [row["sentence"] for row in sentences(3)]
        columns = GLUE[file.task].text
        rows = [{**dict.fromkeys(columns, text), "label": -1, "idx": row} for row, text in enumerate(texts)]
        path = folder / "glue" / (file.data or file.task) / f"{file.split}.jsonl"
        write_rows(path, rows[::-1] if file.task == "rte" else rows)
    return folder


def test_the_zip_is_as_the_server_wants_it(made, tmp_path, capsys):
    zip_path = tmp_path / "out" / "submission.zip"
    arguments = [str(made / "models" / "{task}"), "--data_root", str(made / "glue"), "--output", str(zip_path)]
    assert script.main(arguments) == 0
    with zipfile.ZipFile(zip_path) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    expected = {
        "CoLA.tsv": "1", "SST-2.tsv": "0", "MRPC.tsv": "1", "QQP.tsv": "0", "WNLI.tsv": "1", "STS-B.tsv": "5.000",
        "MNLI-m.tsv": "contradiction", "MNLI-mm.tsv": "contradiction", "AX.tsv": "contradiction",
        "QNLI.tsv": "entailment", "RTE.tsv": "not_entailment",
    }  # fmt: skip
    assert files == {
        name: "index\tprediction\n" + "".join(f"{row}\t{label}\n" for row in range(3))
        for name, label in expected.items()
    }
    assert "CoLA.tsv: 3 rows, but the server expects 1,063" in capsys.readouterr().err


def test_scores_are_clipped_and_labels_written_in_words():
    assert script.as_tsv(GLUE["stsb"], [-0.4, 2.34567, 5.2]) == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"
    words = ["entailment", "neutral", "contradiction"]
    assert script.as_tsv(GLUE["mnli"], [0, 1, 2]).split()[3::2] == words
    assert script.as_tsv(GLUE["wnli"], [0, 1]).split()[3::2] == ["0", "1"]


def test_predictions_stand_beside_their_rows(made, tmp_path, tokenizer):
    """A model whose answers differ from row to row, against its own forward; batches are by length, rows are not."""
    file = script.FILES["SST-2.tsv"]
    rows = script.read_test_rows(file, made / "glue")
    model = tiny_bert(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in rows["sentence"]]
        model.classifier.bias.sub_(torch.stack(logits).mean(0))  # so that both classes are predicted
    shutil.copytree(made / "models", tmp_path / "models")
    model.save_pretrained(tmp_path / "models" / "sst2")
    expected = [int((each - torch.stack(logits).mean(0)).argmax()) for each in logits]
    assert set(expected) == {0, 1}
    every = {name: script.read_test_rows(each, made / "glue") for name, each in script.FILES.items()}
    text = script.predict_files(str(tmp_path / "models" / "{task}"), every)["SST-2.tsv"]
    assert text.split()[3::2] == list(map(str, expected))


def test_what_is_missing_is_told_at_once_and_nothing_written(made, tmp_path, capsys):
    zip_path = tmp_path / "submission.zip"
    common = ["--data_root", str(made / "glue"), "--output", str(zip_path)]
    assert script.main([str(tmp_path / "{task}"), *common]) == 2
    assert capsys.readouterr().err.count("error:") == 9
    assert script.main([str(tmp_path), *common]) == 2
    assert "should hold {task}" in capsys.readouterr().err
    assert script.main([str(tmp_path / "{task}"), "--data_root", str(tmp_path), "--output", str(zip_path)]) == 2
    assert f"error: {tmp_path}/cola/test.*: no such file" in capsys.readouterr().err
    assert not zip_path.exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a", "idx": 0}, {"sentence": "b", "idx": 2}], "idx should be the rows' numbers from 0 to 1"),
        ([{"text": "a", "idx": 0}], "has no column sentence; found text, idx"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, message):
    write_rows(tmp_path / "cola" / "test.jsonl", rows)
    with pytest.raises(script.InputError, match=message):
        script.read_test_rows(script.FILES["CoLA.tsv"], tmp_path)
