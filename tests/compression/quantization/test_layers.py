"""4-bit layers against their format computed by hand."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from distill.compression.quantization.layers import FourBitLinear


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [32, 64, 96, 160, 384])
def test_weights_are_the_formats_values_times_their_blocks_scales(width, format):
    """Blocks of 64 weights go on in the next row where 64 doesn't divide the width."""
    torch.manual_seed(0)
    weight = torch.randn(64, width) * torch.logspace(-2, 1, 64).unsqueeze(-1)  # rows of very different sizes
    layer = FourBitLinear(
        width, 64, None, format=format, double_quant=False, block_size=64, compute_dtype=torch.float32
    )
    layer.fill(weight)
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    values = get_4bit_type(format, device="cpu")
    nearest = (blocks / scales).unsqueeze(-1).sub(values).abs().argmin(-1)
    torch.testing.assert_close(layer.dense(), (values[nearest] * scales).view_as(weight), rtol=1e-5, atol=1e-6)
    inputs = torch.randn(3, width, requires_grad=True)
    outputs = layer(inputs)
    torch.testing.assert_close(outputs, inputs @ layer.dense().T, rtol=1e-4, atol=1e-4)
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, layer.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
