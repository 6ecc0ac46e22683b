"""The diffusion baseline against the parallel pass that trained it."""

import math
from dataclasses import replace

import pytest
import torch

from aapt.model.config import SamplingConfig
from aapt.model.flow import schedule
from aapt.model.mmdit import MMDiT
from aapt.model.transformer import velocity
from aapt.streaming.diffusion import DiffusionRollout, RecomputedRollout

from ..helpers import PROMPTS, SIZE, controls, latents, tiny_model


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (3, 4.0)])
def test_every_time_sees_the_past_at_that_time(steps, guidance):
    """The whole stream again, all frames in parallel, one time after the other as in training:
    the same velocities, past the window's end as well."""
    model, frames = tiny_model(sink_distance="clamped", residual_head=True), 5
    first, noise = latents(1), latents(frames)
    rays, text, text_lens = model.conditions(controls(frames), PROMPTS, SIZE)
    empty = model.text_encoder([""] * 2)
    rollout = DiffusionRollout(
        model.transformer, text, text_lens, empty, first, SamplingConfig(steps, 6.0, guidance)
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


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("driven", [True, False])
def test_streams_without_caches_are_the_same(guidance, driven):
    """Past the window's end as well."""
    model, frames = tiny_model(), 5
    first, noise, rays = latents(1), latents(frames), model.channels(controls(frames), SIZE)
    if not driven:
        model.transformer = MMDiT(replace(model.config, condition_channels=0)).double()
        for parameter in model.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    given = model.text_encoder(PROMPTS), model.text_encoder([""] * 2)
    sampling = SamplingConfig(3, 6.0, guidance)
    streams = []
    for kind in (DiffusionRollout, RecomputedRollout):
        rollout = kind(model.transformer, *given[0], given[1], first, sampling)
        outputs = [first]
        for index in range(frames):
            here = slice(index, index + 1)
            condition = rays[:, :, here] if driven else None
            outputs.append(rollout.step(noise[:, :, here], outputs[-1], condition))
        streams.append(torch.cat(outputs, dim=2))
    torch.testing.assert_close(*streams, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("steps", "guidance", "passes"), [(1, 1.0, 1), (8, 1.0, 8), (8, 10.0, 16)])
def test_passes_per_frame_are_those_that_run(steps, guidance, passes, monkeypatch):
    """No pass is wasted on an empty prompt if there is no guidance."""
    sampling, model = SamplingConfig(steps, 6.0, guidance), tiny_model()
    text, batches, step = model.text_encoder(PROMPTS), [], model.transformer.step
    rollout = DiffusionRollout(model.transformer, *text, text, latents(1), sampling)

    def counting(x, *arguments):
        batches.append(len(x))
        return step(x, *arguments)

    monkeypatch.setattr(model.transformer, "step", counting)
    rays = model.channels(controls(1), SIZE)
    rollout.step(latents(1), latents(1), rays)
    assert len(batches) == steps and sum(batches) == 2 * passes == 2 * sampling.passes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 6.0, 1.0), "steps: expected 1 or more, got 0"),
        ((1, 0.0, 1.0), r"shift: expected more than 0, got 0\.0"),
        ((1, math.nan, 1.0), "shift: expected more than 0, got nan"),
        ((1, 6.0, -1.0), r"guidance: expected 0 or more, got -1\.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(*settings)
