"""The meaning of wgmma descriptors and register fragments, which a GPU calibrates."""

import numpy as np
import pytest

from .simulator import from_bf16, from_e4m3, nan_filled, to_bf16

CASES = [(64, swizzle, ta, tb) for swizzle in range(4) for ta in (0, 1) for tb in (0, 1)]
CASES += [
    (n, swizzle, ta, tb) for n, swizzle in ((80, 1), (192, 3)) for ta in (0, 1) for tb in (0, 1)
]


@pytest.mark.parametrize("n, swizzle, ta, tb", CASES)
def test_descriptors(machine, n, swizzle, ta, tb):
    random = np.random.default_rng(0)
    a, b = (to_bf16(random.standard_normal((rows, 64))) for rows in (64, n))
    c = nan_filled(64, n)
    stored_a, stored_b = (
        np.ascontiguousarray(x.T) if mn_major else x for x, mn_major in ((a, ta), (b, tb))
    )
    assert machine.launch("run_multiply", n, swizzle, ta, tb, stored_a, stored_b, c) is None
    np.testing.assert_allclose(c, from_bf16(a) @ from_bf16(b).T, atol=1e-4)


HALO = [(64, 16, 8, 0), (64, 13, 10, 1), (64, 13, 10, 12), (64, 9, 13, 7), (64, 15, 9, 57)]
# A slab of causal_conv3d, and the first pixel of every tap
HALO += [(256, 34, 10, 10 * row + column) for row in range(3) for column in range(3)]


@pytest.mark.parametrize("n, rows, width, first", HALO)
def test_descriptors_of_a_halo_tile(machine, n, rows, width, first):
    random = np.random.default_rng(0)
    a, b = (to_bf16(random.standard_normal((size, 128))) for size in (64, rows * width))
    c = nan_filled(64, n)
    assert machine.launch("run_multiply_halo", n, rows, width, first, a, b, c) is None
    pixels = first + np.arange(n // 8)[:, None] * width + np.arange(8)
    np.testing.assert_allclose(c, from_bf16(a) @ from_bf16(b)[pixels.ravel()].T, atol=1e-4)


@pytest.mark.parametrize("n", [8, 16, 32, 64, 80, 96, 128, 160, 176, 192, 224, 256])
@pytest.mark.parametrize("e4m3", [0, 1])
def test_register_operand(machine, n, e4m3):
    random = np.random.default_rng(0)
    if e4m3:
        a, b = (random.integers(0, 256, (rows, 32), np.uint8) & 0xBF for rows in (64, n))
        expected = from_e4m3(a) @ from_e4m3(b).T
    else:
        a, b = (to_bf16(random.standard_normal((rows, 16))) for rows in (64, n))
        expected = from_bf16(a) @ from_bf16(b).T
    c = nan_filled(64, n)
    assert machine.launch("run_multiply_registers", n, e4m3, a, b, c) is None
    error = machine.e4m3_error if e4m3 else 1e-6
    assert np.linalg.norm(c - expected) / np.linalg.norm(expected) < error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scaled_e4m3_gemm(machine, seed):
    m, n, k = 100, 192, 640
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 256, (rows, k), np.uint8) & 0xBF for rows in (m, n))
    a_scale = random.random((m, k // 128)).astype(np.float32)
    b_scale = random.random(k // 128).astype(np.float32)
    c = nan_filled(m, n)
    arguments = (a, b, a_scale, b_scale, c, m, n, k)
    assert machine.launch("run_gemm_e4m3", *arguments, seed=seed, tma=2 - seed) is None
    scaled = from_e4m3(a) * np.repeat(a_scale * b_scale, 128, axis=1)
    expected = scaled @ from_e4m3(b).T
    assert np.linalg.norm(c - expected) / np.linalg.norm(expected) < machine.e4m3_error
