import bitsandbytes as bnb
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from distill.compression.quantization.embeddings import Nf4Embedding
from distill.compression.quantization.formats import QuantizationSettings, choose_formats, model_size
from distill.compression.quantization.layers import FourBitLinear, Int8Linear, dequantized
from distill.compression.quantization.quantize import quantize_model, weight_memory
from distill.compression.student import build_student
from distill.errors import InputError
from distill.models.load import size_on_disk
from tests.architectures import IDS, small_model
from tests.conftest import tiny_bert, tiny_config

FORMATS = ["int8", "nf4", "fp4"]


@pytest.fixture(params=["bert", "distilbert"])
def model(request):
    bert = tiny_bert()
    return bert if request.param == "bert" else build_student(bert, student_arch="distilbert", num_layers=2)


def test_heads_are_not_quantized_and_the_rest_is_bfloat16(model):
    quantized = quantize_model(model, format="nf4")
    for name, module in quantized.named_modules():
        if isinstance(module, torch.nn.Linear):
            outside = "classifier" in name or "pooler" in name
            assert isinstance(module, bnb.nn.Linear4bit) is not outside, name
            assert module.weight.dtype == (torch.bfloat16 if outside else torch.uint8)
        elif isinstance(module, torch.nn.LayerNorm):
            assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_are_predicted_measured_and_smaller(format, tmp_path):
    model = tiny_bert(hidden_size=256, intermediate_size=512, vocab_size=4000)
    model.save_pretrained(tmp_path / "float")
    with torch.device("meta"):
        skeleton, settings = type(model)(model.config), QuantizationSettings(format=format)
    predicted = model_size(skeleton, choose_formats(skeleton, settings), settings)
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
            weight = module.weight.data.float() * module.SCB.unsqueeze(1) / 127
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


def test_settings_and_their_short_forms_are_not_mixed():
    with pytest.raises(InputError, match="leave them out"):
        quantize_model(tiny_bert(), QuantizationSettings(format="nf4"), double_quant=False)
    with pytest.raises(InputError, match="format: missing; say int8, nf4, fp4"):
        quantize_model(tiny_bert())


@pytest.mark.parametrize("format", FORMATS)
def test_pruned_weights_stay_zero(format):
    model = tiny_bert(vocab_size=200)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            masks[name] = torch.rand_like(module.weight) < 0.5
            masks[name][1] = True  # a whole row
            module.weight.data[masks[name]] = 0
    quantized = quantize_model(model, QuantizationSettings(format=format, embeddings="nf4"))
    checked = 0
    for name, module in quantized.named_modules():
        if isinstance(module, Int8Linear | FourBitLinear | Nf4Embedding):
            weight = module.dense() if isinstance(module, Nf4Embedding) else dequantized(module)
            assert (weight[masks[name]] == 0).all(), name
            checked += 1
    assert checked == 1 + 4 * 6


_STUDENT = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 12}


@pytest.mark.parametrize(
    ("settings", "megabytes"),
    [
        (QuantizationSettings(format="int8"), 17.9),
        (QuantizationSettings(format="nf4"), 15.5),
        (QuantizationSettings(format="nf4", embeddings="nf4"), 9.9),
    ],
)
def test_a_three_layer_minilm_is_as_small_as_promised(settings, megabytes, tmp_path):
    config = tiny_config(**_STUDENT, intermediate_size=1536, max_position_embeddings=512)
    with torch.device("meta"):
        skeleton = BertForSequenceClassification(config)
    assert sum(4 * parameter.numel() for parameter in skeleton.parameters()) == pytest.approx(69.6e6, rel=0.001)
    predicted = model_size(skeleton, choose_formats(skeleton, settings), settings)
    model = quantize_model(BertForSequenceClassification(config), settings)
    model.save_pretrained(tmp_path)
    size = size_on_disk(tmp_path)
    assert size <= megabytes * 1e6
    assert predicted == pytest.approx(size, rel=0.01)
    assert weight_memory(model) == pytest.approx(size, rel=0.01)


def test_memory_counts_what_bitsandbytes_keeps_beside_the_weights():
    stock = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4").to("cpu")  # quantizes
    state = stock.weight.quant_state
    parts = [stock.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert weight_memory(stock) == sum(part.untyped_storage().nbytes() for part in parts)
    int8 = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False).to("cpu")
    assert weight_memory(int8) == 128 * 64 + 4 * 64


def test_an_unknown_format_is_told():
    with pytest.raises(InputError, match="format: nf5; say int8, nf4, fp4, bf16"):
        quantize_model(tiny_bert(), format="nf5")


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    model(torch.rand(8, 3, 32, 32))  # its running means move
    return model.eval()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: small_model("modernbert"), {"input_ids": IDS}),
        (resnet, {"pixel_values": torch.rand(2, 3, 32, 32).bfloat16()}),
    ],
    ids=["modernbert", "resnet"],
)
def test_a_model_in_bf16_is_a_plain_one_with_the_same_outputs(make, inputs, tmp_path):
    model = quantize_model(make(), format="bf16")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        before, after = (each(**inputs).logits for each in (model, again))
    assert torch.equal(before, after)
    assert before.dtype == torch.bfloat16
