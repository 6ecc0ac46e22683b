"""The discriminator's logits: causal, in single precision, at the paper's depths."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from aapt.device import mixed_precision
from aapt.model.discriminator import Discriminator
from aapt.model.presets import aapt_8b
from aapt.model.world_model import WorldModel

from ..helpers import CONFIG, PROMPTS, SIZE, controls, latents, tiny_model
from ..runs.counting import adversarial_stage, model, train


def test_discriminator_gives_a_causal_logit_per_frame():
    net = tiny_model()
    judge = Discriminator(net).double()
    conditions = net.conditions(controls(5), PROMPTS, SIZE)
    x, previous, t = latents(5), latents(5), torch.full((2,), 0.3).double()
    before = judge(x, previous, *conditions, t)
    assert before.shape == (2, 5)
    x = x.clone()
    x[:, :, 3] += 1
    after = judge(x, previous, *conditions, t)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert (before[:, 3:] - after[:, 3:]).abs().min() > 0
    assert judge.taps == [0, 1, 2]


def test_logits_keep_single_precision():
    """A heavy penalty multiplies differences of logits: they must not be rounded to bfloat16."""
    net = model()
    judge = Discriminator(net)
    conditions = net.conditions(controls(5).float(), PROMPTS, SIZE)
    with torch.no_grad(), mixed_precision(torch.device("cpu")):
        logits = judge(latents(5).float(), latents(5).float(), *conditions, torch.rand(2))
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).any()


def test_tokens_can_count_alike():
    """The average of a frame's tokens, for every head; and it stays one while the rest learns."""
    stage = adversarial_stage(pooling="average")
    train(stage, 2)
    head, width = stage.discriminator.heads[0], CONFIG.width
    tokens = torch.randn(2, 3 * 5, width)
    weight, bias = head.keys_values.weight[width:], head.keys_values.bias[width:]
    expected = F.linear(head.norm(tokens), weight, bias).unflatten(1, (3, 5)).mean(dim=2)
    torch.testing.assert_close(head(tokens, 3, 5), expected)
    nn.init.normal_(head.query)
    assert (head(tokens, 3, 5) - expected).abs().max() > 0.01


def test_taps_sit_at_the_papers_depths():
    """16, 26 and 36 of 36 blocks (docs/method.md#12)."""
    with torch.device("meta"):
        world = WorldModel(dataclasses.replace(aapt_8b(), width=128, heads=1), camera=None)
        assert Discriminator(world).taps == [15, 25, 35]
