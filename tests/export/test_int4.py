"""Exports with 4-bit weights: levels by hand, errors that cancel out, files that both engines read."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from distill import InputError, export_model, load_exported
from distill.export.graph import float_graph
from distill.export.int4 import block_of, int4_rows, int4_weights, rounded_together
from distill.export.int8 import quantizable_embeddings
from distill.export.record import read_export
from distill.export.runtime import import_openvino
from tests.conftest import make_tokenizer, tiny_bert
from tests.export.test_int8 import LAYERS, calibration


def test_levels_and_scales_by_hand():
    row = torch.tensor([[4.0, -2.0, 0.0, 1.0, -3.5, 0.5, 2.0, 3.0] * 2 + [0.0] * 16])
    blocks = int4_rows(row[:, :16])
    assert blocks.block == 16
    assert blocks.scales.tolist() == [[-0.5]]  # the largest weight, 4, lies at level 0, which is −8
    assert blocks.levels.tolist() == [[0, 12, 8, 6, 15, 7, 4, 2] * 2]
    np.testing.assert_array_equal(blocks.values(), row[:, :16].numpy())
    assert int4_rows(torch.zeros(2, 32)).values().tolist() == [[0.0] * 32] * 2
    assert [block_of(width) for width in (64, 48, 40)] == [32, 16, None]
    assert int4_rows(torch.rand(3, 40)).scales.shape == (3, 1)


def test_errors_of_a_layer_cancel_out_on_its_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    inputs += 0.1 * torch.randn(500, 64, generator=generator)
    weight = torch.randn(24, 64, generator=generator)
    together, plain = rounded_together(weight, inputs.T @ inputs), int4_rows(weight)
    errors = [float((inputs @ (torch.from_numpy(each.values()) - weight).T).norm()) for each in (together, plain)]
    assert together.levels.max() <= 15
    assert errors[0] < 0.4 * errors[1]
    # Inputs that have nothing to do with each other leave nothing to make up for.
    alone = rounded_together(weight, torch.eye(64))
    np.testing.assert_array_equal(alone.levels, plain.levels)
    np.testing.assert_allclose(alone.scales, plain.scales)


@pytest.fixture(scope="module")
def model():
    return tiny_bert(num_hidden_layers=2)


@pytest.fixture(scope="module")
def graph(model):
    return float_graph(model, calibration(make_tokenizer(), 16)[0])


@pytest.fixture
def traced(monkeypatch, graph):
    monkeypatch.setattr("distill.export.export.float_graph", lambda model, inputs: graph)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("embeddings", ["int4", "int8"])
def test_an_int4_export_computes_with_the_rounded_weights(traced, model, tmp_path, engine, embeddings):
    tokenizer = make_tokenizer()
    batches = calibration(tokenizer)
    record = export_model(
        model, tokenizer, tmp_path, engine=engine, format="int4", batches=batches, embeddings=embeddings,
        agreement=0.6, divergence=1.0,
    )  # fmt: skip
    assert record == read_export(tmp_path)
    assert (record.format, record.embeddings, record.calibration_rows) == ("int4", embeddings, 64)
    assert sorted(record.quantized_layers) == sorted(LAYERS)
    rounded = tiny_bert(num_hidden_layers=2)
    for name, blocks in int4_weights(model, LAYERS, batches[::2]).items():  # the others judge
        rounded.get_submodule(name).weight.data = torch.from_numpy(blocks.values())
    for name in quantizable_embeddings(model):
        table = rounded.get_submodule(name).weight
        if embeddings == "int4":
            table.data = torch.from_numpy(int4_rows(table.data).values())
        else:
            scales = table.data.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            table.data = (table.data / scales).round() * scales
    with torch.no_grad():
        expected, before = (torch.cat([each(**b).logits for b in batches]) for each in (rounded, model))
    exact = torch.cat([computed_as_written(tmp_path / record.file, batch) for batch in batches])
    assert float((exact - expected).abs().mean()) < 5e-3 * float((before - expected).abs().mean())
    # Both engines round the activations of each block to 8 bit as they multiply, and OpenVINO may use bfloat16.
    found = torch.cat([load_exported(tmp_path, threads=1)(**batch).logits for batch in batches])
    assert float((found - expected).abs().mean()) < 0.5 * float((before - expected).abs().mean())


def computed_as_written(file, batch):
    """Logits in float32, step by step: without what engines round besides the weights."""
    arrays = {name: each.numpy() for name, each in batch.items()}
    if file.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, arrays)[0])
    core = import_openvino().Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = core.compile_model(core.read_model(file), "CPU", options)
    return torch.from_numpy(compiled(arrays)[0].copy())


def test_the_file_has_weights_of_four_bits(traced, model, tmp_path):
    tokenizer = make_tokenizer()
    left = LAYERS[6:]
    record = export_model(
        model, tokenizer, tmp_path, format="int4", batches=calibration(tokenizer, 16), float_layers=left,
        embeddings="int4",
    )  # fmt: skip
    assert record.float_layers == left
    assert record.file == "onnx/model_q4.onnx"
    file = onnx.load(tmp_path / record.file)
    weights = [each for each in file.graph.initializer if each.data_type == onnx.TensorProto.UINT4]
    assert sum("zeros" not in each.name for each in weights) == 6
    assert {node.domain for node in file.graph.node} == {""}
    assert file.opset_import[0].version == 21
    onnx.checker.check_model(file)


def test_int4_needs_rows(traced, model, tmp_path):
    with pytest.raises(InputError, match="batches: int4 needs calibration rows"):
        export_model(model, make_tokenizer(), tmp_path, format="int4")
