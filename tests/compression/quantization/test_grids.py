"""Grids of activations: ends by hand, and products that come out nearer to the float ones."""

import numpy as np
import pytest

from distill.compression.quantization.grids import Grid, fit_grid, least_error_range


def error_of_product(vectors, weights, grid):
    """Of the product that an engine computes on a grid, a mean of squares."""
    scale = (grid.high - grid.low) / 255
    zero = round(-grid.low / scale)
    levels = np.clip(np.round(vectors / grid.factors / scale) + zero, 0, 255)
    scaled = weights * grid.factors[:, None]
    steps = np.abs(scaled).max(0) / 64
    product = (levels - zero) * scale @ (np.round(scaled / steps) * steps)
    return float(((product - vectors @ weights) ** 2).mean())


def test_a_range_takes_in_all_values_that_lie_evenly_and_always_zero():
    vectors = np.linspace(1, 4, 1000, dtype=np.float32).reshape(-1, 1)
    assert least_error_range(vectors, np.ones(1)) == (0.0, 4.0)
    assert least_error_range(-vectors, np.ones(1)) == (-4.0, 0.0)
    assert least_error_range(np.zeros((3, 2), np.float32), np.ones(2)) == (-1.0, 1.0)


def test_a_range_cuts_off_a_rare_value_whose_channel_hardly_counts():
    vectors = np.random.default_rng(0).normal(size=(4000, 2)).astype(np.float32)
    vectors[0, 1] = 40
    assert least_error_range(vectors, np.array([1.0, 1e-6]))[1] < 10
    assert least_error_range(vectors, np.array([1e-6, 1.0]))[1] > 30


def test_channels_a_hundred_times_as_large_as_others_are_divided():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(500, 16)).astype(np.float32)
    weights = generator.normal(size=(16, 8)).astype(np.float32)
    plain = fit_grid(vectors, weights)
    assert plain.plain  # where all are alike an operation more would buy nothing
    vectors[:, 3] *= 100
    weights[3] /= 100
    grid = fit_grid(vectors, weights)
    low, high = least_error_range(vectors, (weights**2).sum(1))
    undivided = Grid(low, high, np.ones(16, np.float32))
    assert error_of_product(vectors, weights, grid) < 0.05 * error_of_product(vectors, weights, undivided)
    assert np.exp(np.log(grid.factors).mean()) == pytest.approx(1, rel=1e-4)
