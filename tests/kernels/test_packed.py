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


def test_a_weight_of_inference_mode_is_packed_in_every_call(packed):
    """Nothing tells of its changes in place."""
    with torch.inference_mode():
        weight = torch.arange(3.0)
        first = packed(weight, 2)
        weight.add_(1)
        second = packed(weight, 2)
    assert torch.equal(first, torch.tensor([0.0, 2.0, 4.0]))
    assert torch.equal(second, torch.tensor([2.0, 4.0, 6.0])) and len(packed._packed) == 0


def test_the_newest_are_kept(packed):
    weight = torch.arange(3.0)
    made = [packed(weight, factor) for factor in range(MAX_KEPT + 1)]
    assert all(packed(weight, factor) is made[factor] for factor in range(1, MAX_KEPT + 1))
    assert packed(weight, 0) is not made[0]


def test_a_packed_weight_may_be_swapped(packed):
    """`Module.to` and `load_state_dict` swap weights of subclasses and offloaded weights."""
    weight = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
    other = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    first = packed(weight, 2)
    torch.utils.swap_tensors(weight, other)
    assert torch.equal(packed(weight, 2), torch.full((3,), 2.0))
    assert packed(other, 2) is first


def test_views_of_one_memory_are_weights_of_their_own(packed):
    whole = torch.arange(6.0)
    views = [*whole.split(2), whole.view(2, 3), whole.view(2, 3).t()]
    made = [packed(view, 2) for view in views]
    for view, tensor in zip(views, made, strict=True):
        assert torch.equal(tensor, 2 * view) and packed(view, 2) is tensor


def test_a_weight_is_forgotten_with_its_memory(packed):
    weight = torch.arange(3.0)
    packed(weight, 2)
    view = weight[1:]
    del weight
    assert len(packed._packed) == 1
    del view
    assert len(packed._packed) == 0
