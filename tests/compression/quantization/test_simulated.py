import bitsandbytes as bnb
import pytest
import torch

from distill.compression.quantization.affine import affine_of, dequantize, quantize
from distill.compression.quantization.embeddings import Int8Embedding, Nf4Embedding
from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.simulated import (
    fake_int8_rows,
    fake_linear_weight,
    fake_nf4_rows,
    row_scales,
    twice_quantized,
)

SHAPES = [(64, 64), (384, 128), (96, 96), (97, 34), (5, 6)]

PLAIN = QuantizationSettings(double_quant=False)


def weights(shape, kind):
    weight = torch.randn(shape) * torch.logspace(-2, 1, shape[0]).unsqueeze(1)
    if kind == "ties":  # many values midway between two of the format's, and a block of zeros
        values = bnb.functional.get_4bit_type("nf4", device="cpu")
        weight = ((values[:-1] + values[1:]) / 2)[torch.randint(15, shape)]
        weight[:, 0] = 1.0
        weight[0] = 0.0
    return weight.bfloat16().float() * 1e-30 if kind == "small" else weight


def by_bitsandbytes(weight, format, double_quant, block_size=64):
    """Flat, since bitsandbytes 0.50.2 expands rows that are no multiple of a block wrongly on a CPU."""
    packed, state = bnb.functional.quantize_4bit(
        weight.reshape(1, -1), blocksize=block_size, compress_statistics=double_quant, quant_type=format
    )
    state.dtype = torch.bfloat16
    return bnb.functional.dequantize_4bit(packed, state).float().view(weight.shape)


@pytest.mark.parametrize("kind", ["normal", "ties", "small"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bit_weights_are_those_of_bitsandbytes(shape, format, double_quant, kind):
    weight = weights(shape, kind)
    found = fake_linear_weight(weight, format, QuantizationSettings(double_quant=double_quant))
    assert torch.equal(found, by_bitsandbytes(weight, format, double_quant))
    assert not torch.equal(found, weight)


@pytest.mark.parametrize(("format", "values"), [("nf4", 16), ("fp4", 15)])
def test_a_block_holds_the_formats_values_times_its_scale(format, values):
    """An evenly filled block: the nearest of the format's values, in bfloat16; fp4 has 0 twice."""
    weight = torch.linspace(-2, 2, 64).unsqueeze(0)
    code = bnb.functional.get_4bit_type(format, device="cpu")
    expected = 2 * code[(weight.T / 2 - code).abs().argmin(1)]
    found = fake_linear_weight(weight, format, PLAIN)
    assert torch.equal(found[0], expected.bfloat16().float())
    many = torch.rand(1000, 64) * 2 - 1
    many[:, 0] = 1.0
    assert len(fake_linear_weight(many, format, PLAIN).unique()) == values


def test_int8_weights_are_the_affine_scheme_with_a_symmetric_scale_a_row():
    weight = torch.randn(40, 64).half().float()  # bitsandbytes rounds to float16 first
    affine = affine_of(weight, symmetric=True, axis=0)
    found = fake_linear_weight(weight, "int8", PLAIN)
    torch.testing.assert_close(found, dequantize(quantize(weight, affine), affine), rtol=1e-6, atol=0)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dim", [96, 128])
def test_embedding_rows_are_those_of_the_quantized_table(dim, double_quant, block_size):
    """Of rows looked up in a batch, without quantizing the others."""
    settings = QuantizationSettings(double_quant=double_quant, block_size=block_size)
    table = torch.randn(300, dim) * torch.logspace(-2, 1, 300).unsqueeze(1)
    table[7] = 0
    ids = torch.tensor([[3, 7, 3], [299, 0, 8]])
    in_int8 = Int8Embedding(300, dim)
    in_nf4 = Nf4Embedding(300, dim, double_quant=double_quant, block_size=block_size)
    for whole in (in_int8, in_nf4):
        whole.fill(table)
    assert torch.equal(fake_int8_rows(table[ids], settings), in_int8(ids).float())
    found = fake_nf4_rows(table[ids], row_scales(table, settings)[ids], settings)
    assert torch.equal(found, in_nf4(ids).float())
    assert (found - table[ids]).norm() < 0.15 * table[ids].norm()


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_rows_of_whole_blocks_are_the_flat_table(double_quant):
    table, settings = torch.randn(300, 128), QuantizationSettings(double_quant=double_quant, block_size=128)
    found = fake_nf4_rows(table, row_scales(table, settings), settings)
    assert torch.equal(found, by_bitsandbytes(table, "nf4", double_quant, 128))


def test_weights_are_rounded_to_what_they_are_expanded_to():
    weight = torch.randn(8, 64)
    exact = fake_linear_weight(weight, "nf4", QuantizationSettings(compute_dtype="fp32"))
    rounded = fake_linear_weight(weight, "nf4", QuantizationSettings())
    assert not torch.equal(exact, rounded)
    assert torch.equal(exact.bfloat16().float(), rounded)


def test_twice_quantized_scales_keep_about_two_digits():
    scales = torch.rand(1000) + 0.5
    found = twice_quantized(scales)
    assert not torch.equal(found, scales)
    assert ((found - scales).abs() < 0.01).all()
