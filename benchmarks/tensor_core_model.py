"""The sums of E4M3 products on a Hopper tensor core, in numpy: what calibration compares a chip and
the simulator with.

An instruction adds 32 products and the accumulator. The adder aligns all terms at the highest
exponent, which for a product is the sum of its factors' exponents, and cuts each to 13 fraction
bits, towards zero. The sum is cut to 13 fraction bits once more (arXiv 2511.10909, MMA-Sim).
"""

import numpy as np

FRACTION = 13
SMALLEST = -6  # exponent of a subnormal E4M3 value

# The first of 32 factors of both operands, the others of the second beside 2^-6, and the sum
ADDITIONS = [
    (1.0, 2.0**-7, 1 + 31 * 2.0**-13),  # 13 bits below the highest exponent: kept
    (1.0, 2.0**-8, 1.0),  # 14 bits: cut, however many
    # Aligned at the exponents of the factors, 0, although the product has 1; the sum is cut at 1
    (1.5, 2.0**-7, 2.25 + 15 * 2.0**-12),
]


def exponent(x: np.ndarray, least: float = -np.inf) -> np.ndarray:
    return np.where(x == 0, -np.inf, np.maximum(np.frexp(x)[1] - 1, least))


def cut(x: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Return x without what is below 13 bits after the one of weight 2^highest."""
    unit = np.exp2(np.where(np.isinf(highest), 0, highest) - FRACTION)
    return np.trunc(x / unit) * unit


def accumulate(d: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return d + a b^T of one instruction: d (m, n), a (m, 32), b (n, 32), values in float64."""
    factors = exponent(a, SMALLEST)[:, None] + exponent(b, SMALLEST)
    highest = np.maximum(factors.max(axis=-1), exponent(d))
    terms = cut(a[:, None] * b, highest[..., None]).sum(axis=-1) + cut(d, highest)
    return cut(terms, exponent(terms))


def promoted(a: np.ndarray, b: np.ndarray, interval: int) -> np.ndarray:
    """Return a b^T in float32, to which the tensor core's sums of every `interval` values along K
    are added: a (m, k), b (n, k), values in float64."""
    sums = np.zeros((len(a), len(b)), np.float32)
    for first in range(0, a.shape[1], interval):
        d = np.zeros(sums.shape)
        for k in range(first, min(first + interval, a.shape[1]), 32):
            d = accumulate(d, a[:, k : k + 32], b[:, k : k + 32])
        sums += d.astype(np.float32)
    return sums
