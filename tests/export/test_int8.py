"""Exports in 8 bit: sums that fit, rows for themselves, and what is said of them."""

import numpy as np
import onnx
import pytest
import torch

from distill import InputError, export_model, load_exported
from distill.export.graph import float_graph
from distill.export.int8 import int8_rows
from distill.export.record import read_export
from tests.conftest import make_tokenizer, sentences, tiny_bert

LAYERS = [f"bert.encoder.layer.{block}.{name}" for block in (0, 1) for name in (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)]  # fmt: skip


def calibration(tokenizer, count=64):
    texts = [row["sentence"] for row in sentences(count)]
    return [dict(tokenizer(texts[i : i + 16], return_tensors="pt", padding=True)) for i in range(0, count, 16)]


@pytest.fixture(scope="module")
def model():
    return tiny_bert(num_hidden_layers=2)


@pytest.fixture(scope="module")
def graph(model):
    return float_graph(model, calibration(make_tokenizer(), 16)[0])


@pytest.fixture
def traced(monkeypatch, graph):
    """Exports of `model` that don't trace it anew."""
    monkeypatch.setattr("distill.export.export.float_graph", lambda model, inputs: graph)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def exported(request, model, graph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / request.param
    tokenizer = make_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.export.export.float_graph", lambda model, inputs: graph)
        export_model(
            model, tokenizer, folder, engine=request.param, format="int8", batches=calibration(tokenizer),
            agreement=0.9, divergence=0.05,
        )  # fmt: skip
    return folder


def test_an_int8_export_keeps_the_predictions_and_says_what_it_measured(exported, model):
    record, computed = read_export(exported), load_exported(exported, threads=1)
    assert (record.format, record.calibration_rows, record.embeddings) == ("int8", 64, "int8")
    assert sorted(record.quantized_layers + record.float_layers) == sorted(LAYERS)
    assert len(record.quantized_layers) > 6
    with torch.no_grad():
        pairs = [(model(**b).logits, computed(**b).logits) for b in calibration(make_tokenizer())]
    expected, found = (torch.cat(each) for each in zip(*pairs, strict=True))
    agreement = float((expected.argmax(-1) == found.argmax(-1)).float().mean())
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    assert agreement == pytest.approx(record.agreement, abs=1e-6)
    assert float(kl.sum(-1).mean()) == pytest.approx(record.divergence, rel=1e-2, abs=1e-6)
    assert 0 < record.divergence < 0.05
    assert not torch.equal(expected, found)


def test_a_rows_result_depends_on_no_other_row(exported):
    computed = load_exported(exported, threads=1)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(5, 25, (1, 8), generator=generator)
    alone = computed(input_ids=row).logits
    for _ in range(32):
        others = torch.randint(5, 25, (7, 8), generator=generator)
        together = computed(input_ids=torch.cat([row, others])).logits[:1]
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_products_of_weights_and_activations_fit_into_sixteen_bits(traced, model, tmp_path):
    tokenizer = make_tokenizer()
    layers = LAYERS[6:]
    record = export_model(
        model, tokenizer, tmp_path, format="int8", batches=calibration(tokenizer), float_layers=layers,
        embeddings="same",
    )  # fmt: skip
    assert (record.float_layers, record.embeddings) == (layers, "same")
    file = onnx.load(tmp_path / "onnx" / "model_quantized.onnx", load_external_data=False)
    weights = [each for each in map(onnx.numpy_helper.to_array, file.graph.initializer) if each.dtype == np.int8]
    weights = [each for each in weights if each.ndim == 2]
    assert len(weights) == 6
    assert all(2 * 255 * np.abs(each.astype(int)).max() < 2**15 for each in weights)  # vpmaddubsw adds two of them
    assert max(np.abs(each).max() for each in weights) == 64
    assert {node.domain for node in file.graph.node} == {""}


def test_embeddings_have_a_scale_for_each_row():
    rows, scales = int8_rows(np.array([[254.0, -2.0], [0.0, 0.0], [0.127, 0.0635]], dtype=np.float32))
    assert rows.tolist() == [[127, -1], [0, 0], [127, 64]]
    np.testing.assert_allclose(scales[:, 0], [2, 1, 0.001], rtol=1e-6)


def test_int8_needs_rows_and_names_of_layers(traced, model, tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match="batches: int8 needs calibration rows"):
        export_model(model, tokenizer, tmp_path, format="int8")
    with pytest.raises(InputError, match=r"float_layers: 'bert.encoder.layer.0.output' is none; did you mean"):
        export_model(
            model, tokenizer, tmp_path, format="int8", batches=calibration(tokenizer, 16),
            float_layers=["bert.encoder.layer.0.output"],
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
