"""Low-rank adaptations against the layers and models they change."""

import copy

import pytest
import torch
from torch import nn

from aapt.model.linear import product
from aapt.model.low_rank import LoRA, LowRankLinear, adapt, merged
from aapt.model.world_model import WorldModel

from ..helpers import PROMPTS, SIZE, WAN, controls, latents, tiny_model


def moved(model: WorldModel) -> WorldModel:
    """Give every adaptation a change."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            nn.init.normal_(layer.up, std=0.3)
    return model


def output(model: WorldModel) -> torch.Tensor:
    torch.manual_seed(2)
    x = latents(3)
    motion = controls(3) if model.camera else None
    conditions = model.conditions(motion, PROMPTS, SIZE)
    return model.transformer(x, x.flip(0), *conditions, torch.tensor([0.3, 1.0]).double())


def wan() -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(WAN, None).double()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_adds_its_change(bias):
    plain = nn.Linear(5, 7, bias=bias).double()
    weight, x = plain.weight.detach().clone(), torch.randn(2, 3, 5).double()
    layer = LowRankLinear(plain, LoRA(rank=2, alpha=6.0))
    assert torch.equal(layer(x), plain(x))  # as it starts
    nn.init.normal_(layer.up)
    changed = x @ (weight + 3.0 * layer.up @ layer.down).T
    torch.testing.assert_close(product(layer, x), changed)
    torch.testing.assert_close(layer(x), changed + plain.bias if bias else changed)
    layer(x).sum().backward()
    learnt = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert learnt == {"up", "down"}


@pytest.mark.parametrize("family", [tiny_model, wan])
def test_a_merged_model_is_the_adapted_one(family):
    """Also in half precision, in which layers are trained."""
    model, plain = family(), family()
    adapt(model, LoRA(rank=3, alpha=1.5))
    torch.testing.assert_close(output(model), output(plain))
    moved(model)
    assert (output(model) - output(plain)).abs().max() > 1e-3
    plain.load_state_dict(merged(model, model.state_dict()))
    torch.testing.assert_close(output(model), output(plain))
    with torch.autocast("cpu", torch.bfloat16):
        layer = next(x for x in model.float().modules() if isinstance(x, LowRankLinear))
        x = torch.randn(1, 2, layer.in_features)
        assert layer(x).dtype == product(layer, x).dtype == torch.bfloat16


def test_what_learns_are_factors_and_the_inputs():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    adapt(model, LoRA(rank=1, targets=("qkv",)))
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in learnt if "blocks" in name} == {"up", "down"}
    assert all(".qkv." in name for name in learnt if "blocks" in name)
    assert {name for name in learnt if "blocks" not in name} == {
        "transformer.video_in.weight",
        "transformer.video_in.bias",
    }
    assert len(learnt) == 2 + 2 * 2 * model.config.depth  # two streams
    state = merged(model, model.state_dict())
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"rank": 1, "alpha": 0.0}, "alpha: expected a finite number above 0, got 0.0"),
        (
            {"rank": 1, "targets": ("q",)},
            "targets: expected some of mlp_down, .*qkv, got q$",
        ),
        ({"rank": 1, "whole": ("head",)}, "whole: expected some of .*video_in.*, got head"),
    ],
)
def test_what_does_not_exist_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        adapt(tiny_model(), LoRA(**bad))
