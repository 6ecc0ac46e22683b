"""The meaning of wgmma descriptors and register fragments, which a GPU calibrates."""

import numpy as np
import pytest

from benchmarks.tensor_core_model import ADDITIONS, promoted

from .simulator import from_bf16, from_e4m3, nan_filled, to_bf16

# Relative, of sums that a tensor core keeps with 13 fraction bits
E4M3_ERROR = 2**-9

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
    error = E4M3_ERROR if e4m3 else 1e-6
    assert np.linalg.norm(c - expected) / np.linalg.norm(expected) < error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scaled_e4m3_gemm(machine, seed):
    m, n, k = 100, 192, 640
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 256, (rows, k), np.uint8) & 0xBF for rows in (m, n))
    a_scale = random.random((m, k // 128)).astype(np.float32)
    b_scale = random.random(k // 128).astype(np.float32)
    c = nan_filled(m, n)
    arguments = (a, b, a_scale, b_scale, c, m, n, k, 1)
    assert machine.launch("run_gemm_e4m3", *arguments, seed=seed, tma=2 - seed) is None
    scaled = from_e4m3(a) * np.repeat(a_scale * b_scale, 128, axis=1)
    expected = scaled @ from_e4m3(b).T
    assert np.linalg.norm(c - expected) / np.linalg.norm(expected) < E4M3_ERROR


@pytest.mark.parametrize("interval", [1, 2, 10])
@pytest.mark.parametrize("values", ["any", "positive"])
def test_promotion_interval(machine, values, interval):
    """Sums are those of the model bit for bit. Their error grows with the interval between
    promotions to float32: weights of attention are positive, and every cut is downward."""
    m, n, k = 64, 128, 1280
    random = np.random.default_rng(1)
    a, b = (random.integers(0, 256, (rows, k), np.uint8) & 0xBF for rows in (m, n))
    if values == "positive":
        a, b = (a & 0x0F | 0x30 for a in (a, b))  # 0.5 to 1.9
    ones, c = np.ones((m, k // 128), np.float32), nan_filled(m, n)
    arguments = (a, b, ones, ones[0].copy(), c, m, n, k, interval)
    assert machine.launch("run_gemm_e4m3", *arguments) is None
    a, b = from_e4m3(a), from_e4m3(b)
    expected = {each: promoted(a, b, 128 * each) for each in (1, 2, 10)}
    np.testing.assert_array_equal(c, expected[interval])
    for other in {1, 2, 10} - {interval}:
        assert not np.array_equal(c, expected[other])
    if values == "positive":
        once, twice, never = (np.linalg.norm(x - a @ b.T) for x in expected.values())
        assert twice > 5 * once and never > 10 * twice


@pytest.mark.parametrize(("first", "other", "total"), ADDITIONS)
def test_the_adder_keeps_13_bits(machine, first, other, total):
    codes = {from_e4m3(np.uint8(x)).item(): x for x in range(127)}
    a, b = np.full((64, 32), codes[2.0**-6], np.uint8), np.full((8, 32), codes[other], np.uint8)
    a[:, 5] = b[:, 5] = codes[first]
    c = nan_filled(64, 8)
    assert machine.launch("run_multiply_registers", 8, 1, a, b, c) is None
    assert (c == total).all()


def test_nan_of_a_factor_reaches_its_row_and_column(machine):
    a, b = (np.full((rows, 32), 0x38, np.uint8) for rows in (64, 8))
    a[9, 3], b[2, 30] = 0x7F, 0xFF
    c = nan_filled(64, 8)
    assert machine.launch("run_multiply_registers", 8, 1, a, b, c) is None
    expected = np.full_like(c, 32)
    expected[9], expected[:, 2] = np.nan, np.nan
    np.testing.assert_array_equal(c, expected)


@pytest.mark.parametrize("first", [0, 16, 48])
def test_two_fp8_products_without_a_shuffle(machine, first):
    """Scores of small integers are exact in E4M3, and so is what they are multiplied with."""
    keys = 192
    random = np.random.default_rng(0)
    q = np.zeros((64, 128))
    q[np.arange(64), random.integers(0, 128, 64)] = 1
    k, v = random.integers(-7, 8, (keys, 128)), random.integers(-4, 5, (128, keys))
    codes = {from_e4m3(np.uint8(x)).item(): x for x in range(256) if x & 127 != 127}
    stored = [np.vectorize(codes.get)(x.astype(float)).astype(np.uint8) for x in (q, k, v)]
    c = nan_filled(64, 128)
    assert machine.launch("run_chain_e4m3", *stored, c, keys, first) is None
    seen = slice(first, first + 128)
    np.testing.assert_array_equal(c, q @ k[seen].T @ v[:, seen].T)
