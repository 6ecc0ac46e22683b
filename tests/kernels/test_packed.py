"""Weights that are packed once: changes in place, inference mode, how many are kept."""

import pytest
import torch

from aapt_kernels.causal_conv3d.packed import MAX_KEPT, PackedWeights


@pytest.fixture
def packed():
    return PackedWeights(lambda weight, factor: weight * factor)


def test_once_for_every_version_and_option(packed):
    weight = torch.arange(3.0)
    first = packed(weight, 2)
    assert packed(weight, 2) is first and packed(weight, 3) is not first
    weight.add_(1)
    assert packed(weight, 2) is first
    assert torch.equal(first, 2 * weight) and torch.equal(packed(weight, 3), 3 * weight)


@pytest.mark.parametrize("again_inside", [False, True])
def test_packed_in_inference_mode_and_again_anywhere(packed, again_inside):
    weight = torch.arange(3.0)
    with torch.inference_mode():
        first = packed(weight, 2)
    weight.add_(1)
    with torch.inference_mode(again_inside):
        assert packed(weight, 2) is first and torch.equal(first, 2 * weight)


def test_the_newest_are_kept(packed):
    weight = torch.arange(3.0)
    made = [packed(weight, factor) for factor in range(MAX_KEPT + 1)]
    assert all(packed(weight, factor) is made[factor] for factor in range(1, MAX_KEPT + 1))
    assert packed(weight, 0) is not made[0]
