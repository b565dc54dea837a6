"""Folders whose description is of version 1, which is written no more, and descriptions that compose."""

import json

import pytest
import torch

from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.quantize import quantize_model
from distill.compression.replacements import REPLACEMENTS, Nf4, Tied, formats_of
from distill.models.description import METHOD, describe, entries_of, grouped
from tests.architectures import logits, small_model

SETTINGS = {
    "int8": QuantizationSettings(format="int8", threshold=6.0),
    "nf4": QuantizationSettings(format="nf4", embeddings="nf4", double_quant=False, block_size=128),
    "mixed": QuantizationSettings(format="fp4", compute_dtype="fp32", overrides={"*.1.*": "int8"}),
}


@pytest.mark.parametrize("language_model", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_folder_of_version_1_loads_bit_for_bit_and_is_saved_anew_with_the_same_weights(
    tmp_path, settings, language_model
):
    model = quantize_model(small_model("bert", language_model=language_model), settings)
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    written = config["quantization_config"]
    config["quantization_config"] = {
        "quant_method": METHOD,
        "formats": formats_of(model.config)[0],
        "tied_head": "cls.predictions.decoder" if language_model else None,
        "double_quant": settings.double_quant,
        "block_size": settings.block_size,
        "compute_dtype": settings.compute_dtype,
        "threshold": settings.threshold,
    }
    file.write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path / "old")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "new")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"] == written


def test_every_kind_has_a_dataclass_of_its_name():
    assert list(REPLACEMENTS) == ["resized", "removed", "factorized", "shared", "int8", "nf4", "fp4", "tied"]
    for kind, replacement in REPLACEMENTS.items():
        assert replacement.kind == kind


def test_alike_replacements_stand_in_one_entry():
    config = small_model("bert").config
    replacements = {"a": Nf4(), "head": Tied(), "b": Nf4(), "c": Nf4(block_size=128)}
    config.quantization_config = describe(grouped(replacements))
    assert [(entry.kind, entry.names) for entry in entries_of(config)] == [
        ("nf4", ("a", "b")),
        ("tied", ("head",)),
        ("nf4", ("c",)),
    ]
