"""The diffusion baseline against the parallel pass that trained it."""

import pytest
import torch

from aapt.diffusion_rollout import DiffusionRollout
from aapt.flow import schedule
from aapt.model import velocity

from .helpers import PROMPTS, SIZE, controls, latents, tiny_model


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (3, 4.0)])
def test_every_time_sees_the_past_at_that_time(steps, guidance):
    """The whole stream again, all frames in parallel, one time after the other as in training:
    the same velocities, past the window's end as well."""
    model, frames = tiny_model(sink_distance="clamped", residual_head=True), 5
    first, noise = latents(1), latents(frames)
    rays, text, text_lens = model.conditions(controls(frames), PROMPTS, SIZE)
    empty = model.text_encoder([""] * 2)
    rollout = DiffusionRollout(
        model.transformer, text, text_lens, empty, first, steps=steps, shift=6.0, guidance=guidance
    )
    outputs = [first]
    for index in range(frames):
        here = slice(index, index + 1)
        outputs.append(rollout.step(noise[:, :, here], outputs[-1], rays[:, :, here]))
    recycled = torch.cat(outputs[:-1], dim=2)

    x, times = noise, schedule(steps, 6.0).double()
    for index in range(steps, 0, -1):
        t = times[index].expand(2)
        speeds = []
        for words in ((text, text_lens), empty):
            output = model.transformer(x, recycled, rays, *words, t)
            speeds.append(velocity(model.config, output, x, recycled))
        v = speeds[1] + guidance * (speeds[0] - speeds[1])
        x = x - (times[index] - times[index - 1]) * v
    torch.testing.assert_close(torch.cat(outputs[1:], dim=2), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(rollout.last, outputs[-1])


def test_no_steps():
    model = tiny_model()
    text, text_lens = model.text_encoder(PROMPTS)
    with pytest.raises(ValueError, match="steps: expected 1 or more, got 0"):
        DiffusionRollout(
            model.transformer,
            text,
            text_lens,
            (text, text_lens),
            latents(1),
            steps=0,
            shift=6.0,
            guidance=1.0,
        )
