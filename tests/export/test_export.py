"""Exported graphs compute what the models do, at every shape; what can't be exported is told before."""

import json
import string

import numpy as np
import onnx
import pytest
import torch
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel

from distill import (
    InputError,
    export_model,
    factorize_model,
    load_exported,
    prune_model,
    quantize_model,
    share_layers,
    trim_vocabulary,
)
from distill.export.graph import float_graph
from distill.export.problems import export_problems
from distill.export.record import read_export
from distill.models.folders import stored_weights
from distill.tasks.outputs import logits_of
from tests.conftest import WORDS, make_tokenizer, tiny_bert
from tests.export.families import FAMILIES, IMAGES, family_model, image_processor

_QUICK = {"Bert", "ModernBert", "ResNet"}  # all the others take half a minute


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in _QUICK else pytest.mark.slow) for each in FAMILIES]
)
def test_a_float_export_of_every_family_computes_what_the_model_does_at_other_shapes(family, tmp_path):
    model = family_model(family)
    record = export_model(model, image_processor() if family in IMAGES else make_tokenizer(), tmp_path)
    exported = load_exported(tmp_path, threads=1)
    assert record.largest_difference < 1e-4
    for rows, length in ((1, 2), (4, 33)):
        if family in IMAGES:
            inputs = {"pixel_values": torch.rand(rows, 3, 32, 32)}
        else:
            ids = torch.randint(5, 20, (rows, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs["attention_mask"][0, length // 2 + 1 :] = 0
        with torch.no_grad():
            expected = logits_of(model(**inputs))
        found = logits_of(exported(**inputs))
        if "attention_mask" in inputs and expected.ndim == 3:  # padding may become anything
            valid = inputs["attention_mask"].bool()
            expected, found = (
                each[valid] if each.shape[:2] == valid.shape else each.transpose(1, 2)[valid]
                for each in (expected, found)
            )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def text_inputs(tokenizer, *texts):
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True))


def test_pruned_and_trimmed_models_are_exported_as_they_are(tmp_path):
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase if prefix or letter != "a"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)})
    model = tiny_bert(num_hidden_layers=2, vocab_size=len(vocabulary))
    model, tokenizer = trim_vocabulary(model, tokenizer, ["the film was great", "the plot was dull"], coverage=1.0)
    assert model.config.vocab_size < len(vocabulary)
    model = prune_model(model, heads=[1, 3], neurons=[100, 40], importance="magnitude", reconstruct=False)
    export_model(model, tokenizer, tmp_path)
    inputs = text_inputs(tokenizer, "the film was great", "dull")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(load_exported(tmp_path)(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert model.config.quantization_config is not None  # of the model itself, which stays as it is


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_factorized_models_are_exported_with_both_factors(tmp_path, format):
    tokenizer, model = make_tokenizer(), tiny_bert(num_hidden_layers=2, initializer_range=0.1)
    inputs = text_inputs(tokenizer, "the film was great", "the plot was dull")
    factorize_model(model, [inputs], modules="all", rank=12)
    given = {"batches": [inputs], "agreement": 0, "divergence": 1} if format == "int8" else {}
    record = export_model(model, tokenizer, tmp_path, format=format, **given)
    with torch.no_grad():
        expected = model(**inputs).logits
    tolerance = 1e-5 if format == "fp32" else 0.05
    torch.testing.assert_close(load_exported(tmp_path)(**inputs).logits, expected, rtol=1e-4, atol=tolerance)
    if format == "int8":
        words, query = "bert.embeddings.word_embeddings", "bert.encoder.layer.0.attention.self.query"
        assert {f"{words}.projection", f"{query}.down", f"{query}.up"} <= set(record.quantized_layers)
        stored = {each.name: each.data_type for each in onnx.load(tmp_path / record.file).graph.initializer}
        whole = [name for name, kind in stored.items() if kind == onnx.TensorProto.FLOAT and "layer" in name]
        assert not [name for name in whole if name.endswith(("down.weight", "up.weight"))]


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_shared_blocks_are_exported_and_stored_once(tmp_path, format):
    tokenizer, model = make_tokenizer(), tiny_bert(num_hidden_layers=3, initializer_range=0.1)
    inputs = text_inputs(tokenizer, "the film was great", "the plot was dull")
    share_layers(model, groups=1, start="mean")
    given = {"batches": [inputs], "agreement": 0, "divergence": 1} if format == "int8" else {}
    record = export_model(model, tokenizer, tmp_path, format=format, **given)
    with torch.no_grad():
        expected = model(**inputs).logits
    tolerance = 1e-5 if format == "fp32" else 0.05
    torch.testing.assert_close(load_exported(tmp_path)(**inputs).logits, expected, rtol=1e-4, atol=tolerance)
    if format == "fp32":
        stored = onnx.load(tmp_path / record.file).graph.initializer
        blocks = [each for each in stored if len(each.dims) == 2 and max(each.dims) == 128 and min(each.dims) == 64]
        assert len(blocks) == 2  # a block's intermediate and output layer, and not those of three
    else:
        assert "bert.encoder.layer.0.output.dense" in record.quantized_layers


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with two blocks, and the folder of its export in float32."""
    folder = tmp_path_factory.mktemp("exported") / "float"
    model = tiny_bert(num_hidden_layers=2)
    export_model(model, make_tokenizer(), folder)
    return model, folder


def test_an_exported_file_has_named_nodes_a_soft_mask_and_nothing_of_this_machine(exported):
    _, folder = exported
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    names = [node.name for node in graph.graph.node]
    assert {f"bert.encoder.layer.{layer}.attention.self.query/MatMul" for layer in (0, 1)} < set(names)
    assert len(set(names)) == len(names)
    values = [onnx.numpy_helper.to_array(each) for each in graph.graph.initializer]
    assert min(float(each.min()) for each in values if each.dtype == np.float32) == -1e4
    content = (folder / "onnx" / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b"modeling_bert" not in content
    assert graph.opset_import[0].version <= 21
    assert {node.domain for node in graph.graph.node} == {""}
    assert not list(folder.glob("**/*.data"))


def test_an_export_that_computes_something_else_is_not_written(exported, tmp_path, monkeypatch):
    model, _ = exported
    (tmp_path / "kept.txt").write_text("kept")

    def wrong(model, inputs):
        graph = float_graph(model, inputs)
        (weight,) = (each for each in graph.graph.initializer if each.name == "classifier.weight")
        changed = onnx.numpy_helper.to_array(weight) * np.float32(1.02)
        weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
        return graph

    monkeypatch.setattr("distill.export.export.float_graph", wrong)
    with pytest.raises(InputError, match=r"other outputs in fp32 than BertForSequenceClassification does \(by 0\.0"):
        export_model(model, make_tokenizer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert not list(tmp_path.parent.glob(".*partial"))


def test_quantized_weights_name_the_float_model(bert):
    model = quantize_model(bert, format="int8")
    (problem,) = export_problems(model, "onnxruntime", "fp32", parent="runs/x/student")
    assert "export the float model that it was made from, runs/x/student" in problem
    with pytest.raises(InputError, match="quantized already"):
        export_model(model, make_tokenizer(), "nowhere")


def test_what_cannot_be_exported_is_told_of_a_model_on_meta(monkeypatch):
    with torch.device("meta"):
        bert, writer = tiny_bert(), GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
        big = tiny_bert(num_hidden_layers=1, vocab_size=8_500_000)
    assert export_problems(bert, "onnxruntime", "fp32") == []
    (problem,) = export_problems(writer, "onnxruntime", "fp32")
    assert "generates text" in problem
    problems = export_problems(bert, "onnxruntim", "int9")
    assert [problem.split(":")[0] for problem in problems] == ["engine", "format"]
    assert "did you mean 'onnxruntime'?" in problems[0]
    (problem,) = export_problems(big, "onnxruntime", "fp32")
    assert "one ONNX file holds 2.1 GB" in problem
    monkeypatch.setattr("distill.export.problems.find_spec", lambda name: None if name == "onnxscript" else name)
    (problem,) = export_problems(bert, "onnxruntime", "fp32")
    assert "needs onnxscript, not installed here; pip install 'distill-transformers[onnx]'" in problem


@pytest.mark.parametrize(
    ("engine", "format", "file", "tolerance"),
    [
        ("onnxruntime", "fp16", "onnx/model_fp16.onnx", 2e-2),
        ("openvino", "fp32", "openvino/openvino_model.xml", 1e-4),
        ("openvino", "fp16", "openvino/openvino_model.xml", 6e-2),  # it computes in bfloat16 where there is hardware
    ],
)
def test_other_engines_and_formats_of_floats(exported, tmp_path, monkeypatch, engine, format, file, tolerance):
    model, folder = exported
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    monkeypatch.setattr("distill.export.export.float_graph", lambda model, inputs: graph)
    record = export_model(model, make_tokenizer(), tmp_path, engine=engine, format=format)
    assert (record.file, read_export(tmp_path)) == (file, record)
    assert (tmp_path / file).is_file()
    inputs = text_inputs(make_tokenizer(), "the film was great", "dull")
    with torch.no_grad():
        expected = model(**inputs).logits
    found = load_exported(tmp_path)(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    bytes_of_weights = sum(path.stat().st_size for path in stored_weights(tmp_path))
    whole = sum(path.stat().st_size for path in stored_weights(folder))
    assert bytes_of_weights < (0.62 if format == "fp16" else 1.02) * whole
