"""Exported models where transformers expects its own, and what is wrong with folders and inputs."""

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import pipeline

from distill import InputError, export_model, load_exported
from distill.models.structure import input_names
from distill.tasks.kinds import targets_of
from tests.conftest import make_tokenizer, tiny_bert


@pytest.fixture(scope="module")
def model():
    return tiny_bert(num_hidden_layers=1, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime") / "float"
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 32
    export_model(model, tokenizer, folder)
    return folder


def test_a_pipeline_computes_with_it(model, folder, caplog):
    texts = ["the film was great", "dull " * 60]
    exported = load_exported(folder, threads=1)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 32
    found = pipeline("text-classification", model=exported, tokenizer=tokenizer)(texts, truncation=True)
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(texts, truncation=True)
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-5)
    assert "not supported" not in caplog.text


def test_it_says_what_it_is_and_fills_in_what_transformers_would(model, folder):
    exported = load_exported(str(folder))
    assert (exported.device, exported.config.id2label) == (torch.device("cpu"), {0: "bad", 1: "good"})
    assert input_names(exported) == ["input_ids", "attention_mask", "token_type_ids"]
    assert list(inspect.signature(exported.forward).parameters) == input_names(exported)
    assert targets_of(exported) == targets_of(model)
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="takes input_ids, attention_mask, token_type_ids, not labels"):
        exported(input_ids=ids, labels=torch.tensor([1]))
    with pytest.raises(InputError, match="input_ids is missing"):
        exported(attention_mask=ids)


def test_a_folder_that_is_none_is_told(tmp_path, folder):
    with pytest.raises(InputError, match=r"holds no export\.json"):
        load_exported(tmp_path)
    (tmp_path / "export.json").write_text((folder / "export.json").read_text())
    with pytest.raises(InputError, match=r"its model, onnx/model\.onnx, is missing"):
        load_exported(tmp_path)


def test_openvino_is_imported_without_its_telemetry():
    code = "import sys; from distill.export.runtime import import_openvino; import_openvino()"
    code += "; print(sys.modules['openvino_telemetry'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "None\n"
