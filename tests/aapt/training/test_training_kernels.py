"""Forward and backward of an update through the simulated sm_90a attention, against the CPU."""

from dataclasses import replace

import pytest
import torch

from aapt.model.mmdit import MMDiT
from aapt.training.recipes import tiny_world
from aapt_kernels import backend
from aapt_kernels.backend import no_sim

if reason := no_sim():
    pytest.skip(reason, allow_module_level=True)

OPS = ("block_causal_attention", "block_causal_attention_backward")


def differentiate(model, inputs):
    """The output and the gradients of all weights."""
    output = model(*inputs)
    weights = [x for x in model.parameters() if x.requires_grad]
    loss = output.float().square().mean()
    return output, torch.autograd.grad(loss, weights, allow_unused=True)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_reaches_the_kernels(monkeypatch, checkpointed):
    torch.manual_seed(0)
    config = replace(tiny_world().model, depth=2)
    model = MMDiT(config).bfloat16()
    model.checkpoint_blocks = checkpointed
    for weight in model.parameters():  # no weight starts at zero
        torch.nn.init.normal_(weight, std=0.05)

    def normal(channels):
        return torch.randn(2, channels, 3, 10, 16).bfloat16()

    inputs = (
        normal(config.latent_channels),
        normal(config.latent_channels),
        normal(config.condition_channels),
        torch.randn(2, config.text_tokens, config.text_width).bfloat16(),
        torch.tensor([config.text_tokens, 3]),
        torch.ones(2, dtype=torch.bfloat16),
    )
    plain, plain_gradients = differentiate(model, inputs)

    calls = []
    for op in OPS:
        kernel = backend.implementation(op, "sim")
        monkeypatch.setitem(
            backend._implementations[op],
            "cpu",
            lambda *arguments, op=op, kernel=kernel: calls.append(op) or kernel(*arguments),
        )
    simulated, gradients = differentiate(model, inputs)
    forwards = 2 * config.depth if checkpointed else config.depth
    assert [calls.count(op) for op in OPS] == [forwards, config.depth]

    def assert_close(ours, theirs):
        error = (ours - theirs).float().square().mean().sqrt()
        assert error < 0.03 * theirs.float().square().mean().sqrt()

    assert_close(simulated, plain)
    assert [x is None for x in gradients] == [x is None for x in plain_gradients]
    parts = [
        torch.cat([x.float().flatten() for x in some if x is not None])
        for some in (gradients, plain_gradients)
    ]
    assert_close(*parts)
