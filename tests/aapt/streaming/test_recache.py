"""A new prompt that also rewrites the past (docs/method.md#2): the parallel pass over what is left
of it."""

import numpy as np
import pytest
import torch

from aapt import Control, StreamingGenerator
from aapt.model.transformer import clean
from aapt.streaming.student import StudentRollout

from ..helpers import CONFIG, SIZE, latents, tiny_model
from .test_generator import HEIGHT, WIDTH, build

WINDOW = CONFIG.window_frames


@pytest.mark.parametrize("sink_distance", ["clamped", "absolute"])
@pytest.mark.parametrize("before", [0, 1, WINDOW, WINDOW + 1, WINDOW + 4])
@torch.no_grad()
def test_the_next_frame_follows_a_past_of_the_new_prompt(before, sink_distance):
    """The first frame and the last `window` of its inputs, in parallel under the new text."""
    model = tiny_model(sink_distance=sink_distance)
    old, new = (model.text_encoder([prompt]) for prompt in ("ab", "abcdefgh"))
    frames = before + 1
    noise, recycled = latents(frames, 1), latents(frames, 1)
    rays = torch.randn(1, CONFIG.condition_channels, frames, *SIZE, dtype=torch.float64)
    inputs = [[x[:, :, i : i + 1] for x in (noise, recycled, rays)] for i in range(frames)]
    rollout = StudentRollout(model.transformer, *old, recycled[:, :, :1], recache=True)
    for step in inputs[:-1]:
        rollout.step(*step)
    rollout.set_text(*new)
    made = rollout.step(*inputs[-1])

    left = inputs[:1] * (before > 0) + inputs[max(1, before - WINDOW) : before] + inputs[-1:]
    joined = [torch.cat(parts, dim=2) for parts in zip(*left)]
    time = torch.ones(1, dtype=torch.float64)
    output = model.transformer(*joined, *new, time)
    expected = clean(model.config, output, joined[0], joined[1], time)[:, :, -1:]
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)
    assert rollout.frames == len(left)


def test_a_stream_opened_with_recache_forgets_its_old_prompt():
    model, vae = build()
    generator = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH)
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    walk = [Control(forward=1.0), Control(yaw=-0.5)]
    plain, recached = (generator.open(picture, "ab", recache=given) for given in (False, True))
    for control in walk:  # nothing differs before the prompt does
        assert np.array_equal(plain.step(control), recached.step(control))
    for stream in (plain, recached):
        stream.prompt = "something else"
    assert not np.array_equal(plain.step(walk[0]), recached.step(walk[0]))
    assert plain.steps == recached.steps == 3
