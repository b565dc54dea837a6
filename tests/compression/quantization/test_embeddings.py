import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

from distill.compression.quantization.embeddings import Int8Embedding, Nf4Embedding


def test_int8_rows_are_within_half_a_step_and_keep_their_scales_under_casts():
    rows = torch.randn(50, 16) * torch.logspace(-4, 3, 50).unsqueeze(1)
    rows[7] = 0
    embedding = Int8Embedding(50, 16, torch.float32)
    embedding.fill(rows)
    step, largest = embedding.scale.float(), rows.abs().amax(1)
    assert ((embedding(torch.arange(50)) - rows).abs() <= step.unsqueeze(1) / 2 * 1.0001).all()
    assert (step >= largest / 127).all()
    assert (step <= largest / 127 * (1 + 2**-7))[largest > 0].all()  # the next bfloat16 above
    exact = embedding.dense()
    embedding.to(torch.float16)
    assert embedding.dense().dtype == torch.float16
    assert torch.equal(embedding.to(torch.float32).dense(), exact)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_rows_are_bitsandbytes_own_where_blocks_divide_them(double_quant):
    rows = torch.randn(700, 128) * torch.logspace(-2, 1, 700).unsqueeze(1)
    packed, state = quantize_4bit(rows, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    embedding = Nf4Embedding(700, 128, torch.float32, double_quant=double_quant)
    embedding.fill(rows)
    assert torch.equal(embedding.weight, packed.flatten())
    ids = torch.tensor([[3, 699, 3], [0, 41, 698]])
    assert torch.equal(embedding(ids), dequantize_4bit(packed, state)[ids])
    assert torch.equal(embedding.dense(), embedding(torch.arange(700)))


@pytest.mark.parametrize("width", [96, 33, 31])
def test_nf4_blocks_begin_anew_with_every_row(width):
    rows = torch.randn(20, width)
    embedding = Nf4Embedding(20, width, torch.float32, double_quant=False)
    embedding.fill(rows)
    code = get_4bit_type("nf4", device="cpu")
    expected = torch.empty_like(rows)
    for row in range(20):  # by hand: the nearest of 16 values times the block's largest
        for start in range(0, width, 64):
            block = rows[row, start : start + 64]
            largest = block.abs().max()
            expected[row, start : start + 64] = code[(block.unsqueeze(1) / largest - code).abs().argmin(1)] * largest
    assert torch.allclose(embedding.dense(), expected, atol=1e-6)
    assert embedding.weight.numel() == 20 * ((width + 1) // 2)
