import json
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from distill.errors import InputError
from distill.models import size_on_disk
from distill.quantize import Int8Embedding, quantize_model, quantized_size, weight_memory
from distill.student import build_student
from tests.conftest import tiny_bert

IDS = torch.tensor([[2, 5, 9, 14, 3, 0, 0], [2, 6, 7, 8, 9, 10, 3]])
MASK = (IDS > 0).long()
FORMATS = ["int8", "nf4", "fp4"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits


@pytest.fixture(params=["bert", "distilbert"])
def model(request):
    bert = tiny_bert()
    return bert if request.param == "bert" else build_student(bert, student_arch="distilbert", num_layers=2)


@pytest.mark.parametrize("format", FORMATS)
def test_logits_live_saved_and_reloaded_are_the_same_bits(model, format, tmp_path):
    exact = logits(model)
    quantized = quantize_model(model, format=format)
    live = logits(quantized)  # evaluating before saving is what corrupts stock 4-bit weights
    assert not torch.equal(live.float(), exact)
    quantized.save_pretrained(tmp_path / "once")
    assert torch.equal(logits(quantized), live)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "once")
    assert torch.equal(logits(reloaded), live)
    reloaded.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")), live)
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


_RELOAD = """
{import_distill}
import json, sys, torch
from transformers import AutoModelForSequenceClassification
for folder in {folders!r}:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        print(json.dumps(model(torch.tensor({ids}), torch.tensor({mask})).logits.tolist()))
    except RuntimeError:
        print("null")
"""


def test_another_process_reloads_it_with_import_distill_and_never_without(tmp_path):
    expected, folders = [], []
    for format in FORMATS:
        quantized = quantize_model(tiny_bert(), format=format)
        expected.append(logits(quantized).float())
        quantized.save_pretrained(tmp_path / format)
        folders.append(str(tmp_path / format))
    outputs = {}
    for first_line in ("import distill", ""):
        script = _RELOAD.format(import_distill=first_line, folders=folders, ids=IDS.tolist(), mask=MASK.tolist())
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        outputs[first_line] = [json.loads(line) for line in done.stdout.splitlines()]
    for found, live in zip(outputs["import distill"], expected, strict=True):
        assert torch.equal(torch.tensor(found), live)
    assert outputs[""] == [None, None, None]
    assert done.stderr.count("first: import distill") >= 3


def test_heads_are_not_quantized_and_the_rest_is_bfloat16(model):
    quantized = quantize_model(model, format="nf4")
    for name, module in quantized.named_modules():
        if isinstance(module, torch.nn.Linear):
            outside = "classifier" in name or "pooler" in name
            assert isinstance(module, bnb.nn.Linear4bit) is not outside, name
            assert module.weight.dtype == (torch.bfloat16 if outside else torch.uint8)
        elif isinstance(module, torch.nn.LayerNorm):
            assert module.weight.dtype == torch.bfloat16


def test_the_packing_that_corrupts_weights_is_off_after_loading(tmp_path):
    quantize_model(tiny_bert(), format="nf4").save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    layers = [module for module in reloaded.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_embedding_rows_are_within_half_a_step_and_survive_casts():
    rows = torch.randn(50, 16) * torch.logspace(-4, 3, 50).unsqueeze(1)
    rows[7] = 0
    embedding = Int8Embedding(50, 16, dtype=torch.float32)
    embedding.fill(rows)
    step = embedding.scale.unsqueeze(1)
    ids = torch.arange(50)
    assert ((embedding(ids) - rows).abs() <= step / 2 * 1.0001).all()
    assert (embedding.scale[rows.abs().amax(1) > 0] >= rows.abs().amax(1)[rows.abs().amax(1) > 0] / 127).all()
    assert torch.equal(embedding.scale.to(torch.bfloat16).float(), embedding.scale)


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_are_predicted_measured_and_smaller(format, tmp_path):
    model = tiny_bert(hidden_size=256, intermediate_size=512, vocab_size=4000)
    model.save_pretrained(tmp_path / "float")
    with torch.device("meta"):
        predicted = quantized_size(type(model)(model.config), format=format)
    quantized = quantize_model(model, format=format)
    quantized.save_pretrained(tmp_path / "quantized")
    size = size_on_disk(tmp_path / "quantized")
    assert size < 0.3 * size_on_disk(tmp_path / "float")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "quantized")
    assert weight_memory(reloaded) == pytest.approx(weight_memory(quantized), rel=0.001)
    assert weight_memory(quantized) == pytest.approx(predicted, rel=0.03)
    assert weight_memory(quantized) == pytest.approx(size, rel=0.05)  # the file has a header


@pytest.mark.parametrize(("format", "error"), [("int8", 0.01), ("nf4", 0.1), ("fp4", 0.15)])
def test_quantized_weights_are_near_the_float_ones(format, error):
    model = tiny_bert()
    exact = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in quantize_model(model, format=format).named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB.unsqueeze(1) / 127
        else:
            continue
        assert (weight.float() - exact[name]).norm() < error * exact[name].norm()


def test_double_quantization_saves_bytes():
    sizes = [
        weight_memory(quantize_model(tiny_bert(hidden_size=256), format="nf4", double_quant=double_quant))
        for double_quant in (True, False)
    ]
    assert sizes[0] < sizes[1]


def test_quantizing_twice_is_refused():
    with pytest.raises(InputError, match="quantized already"):
        quantize_model(quantize_model(tiny_bert(), format="nf4"), format="int8")
