"""The bars that attention in E4M3 must keep, on the emulation that a kernel is compared with."""

import pytest
import torch

from benchmarks.float8_accuracy import attend, attend_e4m3, inputs, loss

SIZES = dict(keys=2048, queries=16, heads=4)


def lost(name, sizes=SIZES, **options):
    tensors = inputs(name, **sizes)
    return loss(attend_e4m3(*tensors, **options), attend(*tensors))


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("keys", [100, 2048, 20_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_gaussian_inputs_lose_at_most_6_percent(keys, use_hadamard):
    """However many keys; 100 is no multiple of a tile."""
    found = lost("Gaussian", dict(keys=keys, queries=16, heads=2), use_hadamard=use_hadamard)
    assert found.error <= 0.06 and found.cosine >= 0.998


def test_the_hadamard_matrix_mends_outliers_and_costs_little_elsewhere():
    for name, most in (("outlier weights", 0.5), ("Gaussian", 1.1), ("biased channels", 1.2)):
        without, with_it = (lost(name, use_hadamard=use).error for use in (False, True))
        assert with_it < most * without


def test_a_scale_per_token_gains_nothing_beside_the_matrix():
    for name in ("Gaussian", "outlier weights", "biased channels", "outlier values"):
        head, token = (
            lost(name, use_hadamard=True, per_token=choice).error for choice in (False, True)
        )
        assert token > 0.9 * head


def test_the_offset_uses_the_range_of_the_weights():
    """Without one, small weights beside a large one become nothing; 2^9 cuts the largest."""
    errors = {offset: lost("one key above all", offset=offset).error for offset in (0, 4, 8, 9)}
    assert errors[8] < 0.5 * errors[0] and errors[8] < errors[4] and errors[8] < 0.8 * errors[9]


@pytest.mark.parametrize("use_hadamard", [False, True])
def test_exact_ends_pay_where_they_weigh_a_half(use_hadamard):
    """A cache with `past_dtype` does not round text, first and newest frame."""
    for name, most in (("both ends above all", 0.6), ("Gaussian", 1.0)):
        every, past = (
            lost(name, use_hadamard=use_hadamard, exact=share).error for share in (0, 1 / 16)
        )
        assert past < most * every


def test_the_emulation_is_exact_where_e4m3_is():
    """Powers of two everywhere, and one key far above the others."""
    q = torch.zeros(1, 4, 128, dtype=torch.float64)
    k, v = torch.zeros(2, 1, 300, 128, dtype=torch.float64)
    q[..., 0], k[:, 137, 0], v[:, 137] = 448.0, 448.0, 1.0
    for options in ({}, dict(per_token=True)):
        assert torch.equal(attend_e4m3(q, k, v, **options), attend(q, k, v))
