import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from distill.compression.quantization.formats import QuantizationSettings, choose_formats, quantizable_modules
from distill.errors import InputError
from tests.architectures import ARCHITECTURES, small_model
from tests.conftest import tiny_bert


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_and_embeddings_are_quantized_and_heads_never(architecture):
    for language_model in (False, True):
        names = quantizable_modules(small_model(architecture, language_model=language_model))
        linears = {"bert": 6, "distilbert": 6, "roberta": 6, "modernbert": 4, "gpt2": 4}[architecture]
        assert len(names) == 2 * linears + 1  # positions of 64 rows are not worth it
        heads = ("classifier", "pooler", "score", "lm_head", "vocab_", "predictions", "decoder", "head.")
        assert not [name for name in names if any(head in name for head in heads)]


def test_image_models_have_linear_layers_alone_or_nothing():
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    )
    names = quantizable_modules(vit)
    assert len(names) == 12
    assert all(".layer" in name for name in names)
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    with pytest.raises(InputError, match="ResNetForImageClassification: has no transformer blocks"):
        quantizable_modules(resnet)


def test_large_position_embeddings_follow_the_word_embeddings_and_token_types_stay():
    model = tiny_bert(hidden_size=128, max_position_embeddings=512)
    formats = choose_formats(model, QuantizationSettings(format="int8", embeddings="nf4"))
    found = {name.rpartition(".")[2]: format for name, format in formats.items() if "embeddings" in name}
    assert found == {"word_embeddings": "nf4", "position_embeddings": "nf4"}
    without = choose_formats(model, QuantizationSettings(format="int8", embeddings="none"))
    assert set(without.values()) == {"int8"}
    assert len(without) == 24


def test_patterns_mix_formats_with_and_without_the_base_models_prefix():
    settings = QuantizationSettings(
        format="nf4",
        overrides={"encoder.layer.0.*": "int8", "bert.encoder.layer.0.attention.*": "fp4", "*word*": "nf4"},
        skip=["encoder.layer.3.*"],
    )
    formats = choose_formats(tiny_bert(), settings)
    layer = "bert.encoder.layer.{}.{}"
    assert formats[layer.format(0, "output.dense")] == "int8"
    assert formats[layer.format(0, "attention.self.query")] == "fp4"
    assert formats[layer.format(1, "output.dense")] == "nf4"
    assert formats["bert.embeddings.word_embeddings"] == "nf4"
    assert not [name for name in formats if ".3." in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"skip": ["encoder.layers.0.*"]},
            r"skip: 'encoder.layers.0.\*' matches .* nearest is 'bert.encoder.layer.0",
        ),
        ({"overrides": {"classifier": "nf4"}}, "overrides: 'classifier' matches no quantizable module"),
        ({"overrides": {"*": "fp4"}}, "gives fp4 to the embedding bert.embeddings.word_embeddings; say int8, nf4"),
        ({"skip": ["*"]}, "skip: leaves nothing to quantize"),
        ({"format": None}, "format: missing; say int8, nf4, fp4"),
    ],
)
def test_wrong_settings_are_told(changes, message):
    with torch.device("meta"):
        model = tiny_bert()
    with pytest.raises(InputError, match=message):
        choose_formats(model, QuantizationSettings(**{"format": "int8", **changes}))
