"""What is trained for an engine is what the engine computes: simulated against real."""

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization.quant_utils import compute_scale_zp
from transformers import BertForSequenceClassification

from distill import InputError, export_model, load_exported
from distill.compression.quantization.engine import EngineSimulation, computed_as_exported, scale_and_zero
from distill.compression.quantization.grids import simulated_grids, write_grids
from distill.export.record import read_export
from distill.export.runtime import import_openvino
from distill.publishing.published import left_out
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from tests.conftest import make_tokenizer, sentences, tiny_bert
from tests.export.families import IMAGES, family_model, image_processor

BATCHES = 8


def rows_of(tokenizer, count=BATCHES * 32):
    texts = [row["sentence"] for row in sentences(count, seed=3)]
    return [dict(tokenizer(texts[i : i + 32], return_tensors="pt", padding=True)) for i in range(0, count, 32)]


def divided_bert(**changes):
    """A BERT some channels of which are a hundred times as large as others, so that they are divided by factors."""
    model = tiny_bert(num_hidden_layers=2, **changes)
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            block.attention.output.LayerNorm.weight[3] *= 50
            block.intermediate.dense.weight[:, 3] /= 50
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, its simulation, and its rows; the grids stand in a folder and have been read from there."""
    model, batches, folder = divided_bert(), rows_of(make_tokenizer()), tmp_path_factory.mktemp("trained")
    simulation = EngineSimulation(model, "onnxruntime", embeddings=True)
    simulation.calibrate(batches[:4])
    with torch.no_grad():
        simulation.ends.mul_(torch.linspace(0.9, 1.1, simulation.ends.numel()).view_as(simulation.ends))
    write_grids(folder, simulation.grids)
    grids = simulated_grids(folder)
    assert grids == simulation.grids
    return model, grids, batches


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def exported(request, trained, tmp_path_factory):
    model, grids, _ = trained
    folder = tmp_path_factory.mktemp("exported") / request.param
    export_model(model, make_tokenizer(), folder, engine=request.param, format="int8", grids=grids)
    return folder


def logits_of_engine(folder, batches):
    record = read_export(folder)
    if record.engine == "onnxruntime":
        exported = load_exported(folder, threads=1)
        return torch.cat([exported(**batch).logits for batch in batches])
    core = import_openvino().Core()
    request = core.compile_model(
        folder / record.file, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    ).create_infer_request()
    found = [request.infer({name: batch[name].numpy() for name in record.inputs})["logits"].copy() for batch in batches]
    return torch.from_numpy(np.concatenate(found))


def logits_of_simulation(model, grids, batches):
    simulation = EngineSimulation(model, "onnxruntime", embeddings=bool(grids.embeddings), grids=grids)
    with torch.no_grad(), computed_as_exported(simulation):
        return torch.cat([model(**batch).logits for batch in batches])


def compared(simulated, real):
    """The median and the 99th percentile of the differences, as shares of the logits' spread, and labels that differ
    though their margin is larger than that."""
    spread = real.std()
    differences = ((simulated - real).abs() / spread).flatten()
    sorted_logits = real.sort(-1).values
    clear = (sorted_logits[:, -1] - sorted_logits[:, -2]) / spread > 1e-2
    flipped = (simulated.argmax(-1) != real.argmax(-1)) & clear
    return float(differences.median()), float(differences.quantile(0.99)), int(flipped.sum())


def are_alike(simulated, real):
    median, most, flipped = compared(simulated, real)
    """The median within a tenth of what is allowed (1e-3): about 1e-7 is found, and with a scale that is off 8e-4."""
    return median <= 1e-4 and most <= 1e-2 and flipped == 0


def test_the_engine_computes_what_was_simulated(exported, trained):
    model, grids, batches = trained
    simulated, real = logits_of_simulation(model, grids, batches), logits_of_engine(exported, batches)
    assert are_alike(simulated, real), compared(simulated, real)
    with torch.no_grad():
        exact = torch.cat([model(**batch).logits for batch in batches])
    assert not are_alike(exact, real)


@pytest.mark.parametrize("number", range(8))
def test_a_scale_that_is_off_by_a_twentieth_is_noticed(exported, trained, number):
    model, grids, batches = trained
    changed = [*grids.grids]
    assert len(changed) == 8
    changed[number] = type(changed[number])(
        changed[number].layers, changed[number].low * 1.05, changed[number].high * 1.05, changed[number].factors
    )
    other = type(grids)(engine=grids.engine, embeddings=grids.embeddings, grids=changed)
    simulated, real = logits_of_simulation(model, other, batches), logits_of_engine(exported, batches)
    assert not are_alike(simulated, real), compared(simulated, real)


def test_an_export_says_whose_grids_it_has_and_chooses_none(exported, trained):
    _, grids, _ = trained
    record = read_export(exported)
    assert (record.trained_for, record.embeddings, record.calibration_rows) == ("onnxruntime", "int8", None)
    assert record.float_layers == []
    assert sorted(record.quantized_layers) == sorted(grids.of_layers())
    assert any(each.factors is not None for each in grids.grids)
    assert any(each.factors is None for each in grids.grids)
    assert [len(each.layers) for each in grids.grids] == [3, 1, 1, 1] * 2


def test_the_graph_has_these_scales_and_rounds_nothing_but_what_is_multiplied(trained, tmp_path):
    model, grids, batches = trained
    record = export_model(model, make_tokenizer(), tmp_path, format="int8", grids=grids, batches=batches[:2])
    assert record.calibration_rows == 64
    assert 0 < record.divergence < 0.1
    graph = onnx.load(tmp_path / record.file).graph
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    scales, rounded = {}, set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in tensors:
            scales[float(tensors[node.input[1]])] = int(tensors[node.input[2]])
            rounded.add(node.output[0])
    expected = [
        compute_scale_zp(np.float32(each.low), np.float32(each.high), np.uint8(0), np.uint8(255))
        for each in grids.grids
    ]
    assert scales == {float(scale): int(zero) for zero, scale in expected}
    for each in grids.grids:
        scale, zero = scale_and_zero(torch.tensor([each.low, each.high]))
        assert scales[float(scale)] == int(zero)
    read = {name for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounded
            for name in node.output}  # fmt: skip
    readers = [node for node in graph.node if set(node.input) & read]
    assert {node.op_type for node in readers} == {"MatMul"}
    assert len(readers) == len(grids.of_layers())
    assert all(makers[node.input[1]].op_type == "DequantizeLinear" for node in readers)


@pytest.mark.parametrize(
    "family", ["Albert", "ViT", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ModernBert", "MPNet"))]
)
def test_other_families_are_simulated_too(family, tmp_path):
    """ALBERT's blocks share their layers."""
    if family in IMAGES:
        processor, batches = image_processor(), [{"pixel_values": torch.rand(8, 3, 32, 32)} for _ in range(4)]
    else:
        processor, batches = make_tokenizer(), rows_of(make_tokenizer(), 64)
    model = family_model(family)
    simulation = EngineSimulation(model, "onnxruntime", embeddings=True)
    simulation.calibrate(batches)
    export_model(model, processor, tmp_path, format="int8", grids=simulation.grids)
    exported = load_exported(tmp_path, threads=1)
    found, expected, exact = [], [], []
    for batch in batches:
        valid = batch.get("attention_mask", torch.ones(1)).bool()
        with torch.no_grad():
            exact.append(model(**batch).logits)
            with computed_as_exported(simulation):
                expected.append(model(**batch).logits)
        found.append(exported(**batch).logits)
        for each in (found, expected, exact):  # padding may become anything
            each[-1] = (each[-1][valid] if each[-1].shape[:2] == valid.shape else each[-1]).flatten()
    found, expected, exact = (torch.cat(each) for each in (found, expected, exact))
    assert (found - expected).abs().quantile(0.99) < 1e-3 * expected.std()
    assert (exact - expected).abs().median() > 2e-3 * expected.std()


def test_the_folder_of_a_step_is_exported_as_it_was_trained(tmp_path, pretrained, sst2_folder):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'run'}\ndata: {{path: {sst2_folder}, max_length: 24}}\nsteps:\n"
        f"  aware: {{run: finetune, model: {pretrained}, num_layers: 2, max_steps: 4, qat: openvino}}\n"
    )
    assert run_plan(make_plan(load_recipe(path))) == ["aware"]
    folder = tmp_path / "run" / "aware"
    assert "qat.json" not in left_out(folder)  # of a push
    model, tokenizer = BertForSequenceClassification.from_pretrained(folder).eval(), make_tokenizer()
    grids = simulated_grids(folder)
    batches = rows_of(tokenizer, 64)
    record = export_model(
        model, tokenizer, tmp_path / "served", engine="onnxruntime", format="int8", grids=grids, batches=batches
    )
    assert (record.trained_for, record.engine, len(record.quantized_layers)) == ("openvino", "onnxruntime", 12)
    real = logits_of_engine(tmp_path / "served", batches)
    assert are_alike(logits_of_simulation(model, grids, batches), real)


def test_grids_of_another_model_and_contradictions_are_told(trained, tmp_path):
    model, grids, batches = trained
    tokenizer = make_tokenizer()
    narrow = tiny_bert(num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    with pytest.raises(InputError, match=r"grids: .* reads 32 channels and they have 64 factors"):
        export_model(narrow, tokenizer, tmp_path, format="int8", grids=grids)
    with pytest.raises(InputError, match=r"grids: bert.encoder.layer.1.* is no such layer of this model"):
        export_model(tiny_bert(num_hidden_layers=1), tokenizer, tmp_path,
                     format="int8", grids=grids)  # fmt: skip
    with pytest.raises(InputError, match="leave them or format: fp32 out"):
        export_model(model, tokenizer, tmp_path, grids=grids)
    with pytest.raises(InputError, match="leave them or float_layers out"):
        export_model(model, tokenizer, tmp_path, format="int8", batches=batches, grids=grids, float_layers=[])
    (tmp_path / "qat.json").write_text('{"schema": 1, "grids": 3}')
    with pytest.raises(InputError, match=r"qat.json: can't be read"):
        simulated_grids(tmp_path)
    assert simulated_grids(tmp_path / "none") is None
