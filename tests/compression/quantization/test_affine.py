import pytest
import torch

from distill.compression.quantization.affine import (
    affine_from_range,
    affine_of,
    dequantize,
    fake_quantize,
    quantize,
    value_range,
)
from distill.errors import InputError

SCHEMES = [
    {"symmetric": symmetric, **granularity}
    for symmetric in (False, True)
    for granularity in ({}, {"axis": 0}, {"axis": -1}, {"group_size": 4})
]


def in_parts(values, axis=None, group_size=None, **_):
    """The parts that get a scale each, cut by hand."""
    if group_size is not None:
        return [part for row in values.reshape(-1, values.shape[-1]) for part in row.split(group_size)]
    return [values] if axis is None else list(values.unbind(axis))


def test_scale_zero_point_and_codes_by_hand():
    """−1 … 2 in 2 bits: S = 1, and 0 has code 1."""
    affine = affine_from_range(torch.tensor(-1.0), torch.tensor(2.0), bits=2)
    assert (affine.scale, affine.zero_point, affine.lowest, affine.highest) == (1.0, 1.0, 0, 3)
    values = torch.tensor([-5.0, -1.0, -0.4, 0.0, 0.5, 1.5, 1.6, 9.0])
    assert quantize(values, affine).tolist() == [0, 0, 1, 1, 1, 3, 3, 3]  # halves to the even whole number: 0.5 → 0
    assert dequantize(quantize(values, affine), affine).tolist() == [-1, -1, 0, 0, 0, 2, 2, 2]

    symmetric = affine_from_range(torch.tensor(-1.0), torch.tensor(3.5), bits=4, symmetric=True)
    assert (symmetric.scale, symmetric.zero_point, symmetric.lowest, symmetric.highest) == (0.5, 0.0, -7, 7)
    assert quantize(torch.tensor([-9.0, -1.0, 0.0, 0.3, 3.5]), symmetric).tolist() == [-7, -2, 0, 1, 7]


def test_an_asymmetric_range_that_lacks_zero_is_widened_to_it():
    above = affine_from_range(torch.tensor(1.0), torch.tensor(51.0))
    assert (above.scale.item(), above.zero_point.item()) == (pytest.approx(0.2), 0)
    below = affine_from_range(torch.tensor(-51.0), torch.tensor(-1.0))
    assert (below.scale.item(), below.zero_point.item()) == (pytest.approx(0.2), 255)


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"),
    [(8, False, torch.uint8), (8, True, torch.int8), (4, True, torch.int8), (16, False, torch.int32)],
)
def test_codes_have_the_smallest_dtype(bits, symmetric, dtype):
    assert quantize(torch.ones(3), affine_of(torch.ones(3), bits=bits, symmetric=symmetric)).dtype == dtype


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_part_is_within_half_a_step_and_zero_is_exact(scheme, bits):
    values = torch.randn(6, 5, 8) * torch.logspace(-3, 2, 8) + torch.linspace(-2, 2, 6).view(6, 1, 1)
    values[2, 3] = 0.0
    affine = affine_of(values, bits=bits, **scheme)
    back = dequantize(quantize(values, affine), affine)
    parts = in_parts(values, **scheme)
    assert affine.scale.numel() == len(parts)
    steps = []
    for part, found in zip(parts, in_parts(back, **scheme), strict=True):
        low, high = min(part.min().item(), 0), max(part.max().item(), 0)
        step = max(-low, high) / (2 ** (bits - 1) - 1) if scheme["symmetric"] else (high - low) / (2**bits - 1)
        assert (found - part).abs().max() <= step / 2 + 1e-6 * max(-low, high)
        assert (found[part == 0] == 0).all()
        assert len(found.unique()) <= 2**bits
        steps.append(step)
    assert affine.scale.flatten().tolist() == pytest.approx([max(step, 2.0**-126) for step in steps], rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("constant", [0.0, 3.7, -3.7, 1e-42])
def test_constant_tensors_come_back(scheme, constant):
    values = torch.full((4, 8), constant)
    affine = affine_of(values, **scheme)
    back = dequantize(quantize(values, affine), affine)
    assert affine.scale.isfinite().all()
    torch.testing.assert_close(back, values, rtol=1e-6, atol=1e-38)
    assert torch.equal(fake_quantize(values, affine), back)


@pytest.mark.parametrize("axis", [None, 1])
def test_the_forward_and_the_gradient_are_torchs_own(axis):
    """Against torch's fake quantization, where no rounding of its reciprocal scale comes between (powers of two)."""
    values = (torch.randint(-300, 300, (16, 3)) / 64).requires_grad_()
    low, high = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([0.9921875, 1.984375, 3.984375])
    if axis is None:
        low, high = low[0], high[0]
    affine = affine_from_range(low, high)
    assert (affine.scale.log2() % 1 == 0).all()
    ours = fake_quantize(values, affine)
    (gradient,) = torch.autograd.grad((ours * values.detach()).sum(), values)
    if axis is None:
        theirs = torch.fake_quantize_per_tensor_affine(values, affine.scale.item(), int(affine.zero_point), 0, 255)
    else:
        theirs = torch.fake_quantize_per_channel_affine(values, affine.scale, affine.zero_point, axis, 0, 255)
    (expected,) = torch.autograd.grad((theirs * values.detach()).sum(), values)
    assert torch.equal(ours, theirs)
    edge = ((values / affine.scale).round() + affine.zero_point - 127.5).abs() == 127.5  # they let half a step more by
    assert torch.equal(gradient[~edge], expected[~edge])
    assert (gradient == 0).any()
    assert (gradient != 0).any()


def test_the_gradient_is_one_inside_the_range_and_zero_outside():
    affine = affine_from_range(torch.tensor(-1.0), torch.tensor(2.0), bits=2)
    values = torch.tensor([-1.2, -1.0, -0.3, 0.0, 1.7, 2.0, 2.1], requires_grad=True)
    fake_quantize(values, affine).backward(torch.full((7,), 3.0))
    assert values.grad.tolist() == [0, 3, 3, 3, 3, 3, 0]


def test_fake_quantization_is_the_round_trip_in_the_values_own_dtype():
    values = torch.randn(3, 12)
    for scheme in SCHEMES:
        affine = affine_of(values, bits=3, **scheme)
        assert torch.equal(fake_quantize(values, affine), dequantize(quantize(values, affine), affine))
    assert fake_quantize(values.bfloat16(), affine).dtype == torch.bfloat16


def test_what_cannot_be_is_refused():
    values = torch.ones(2, 6)
    for options, message in (
        ({"bits": 1}, "bits: should be 2 to 16; got 1"),
        ({"bits": 17}, "bits: should be 2 to 16"),
        ({"group_size": 4}, "group_size: 4 does not divide the last dimension"),
        ({"group_size": 3, "axis": 0}, "leave axis out"),
    ):
        with pytest.raises(InputError, match=message):
            affine_of(values, **options)
    low, high = value_range(values, group_size=3)
    assert low.shape == high.shape == (2, 2, 1)
