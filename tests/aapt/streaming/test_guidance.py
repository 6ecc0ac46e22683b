"""Guidance in few-step models: rollouts against two plain ones, and streams."""

import dataclasses

import numpy as np
import pytest
import torch

from aapt.convert.kinds import KINDS
from aapt.model.config import FewStepConfig
from aapt.model.world_model import WorldModel
from aapt.streaming.few_step import FewStepRollout
from aapt.streaming.noise import Noise
from aapt.streaming.rollout import roll_out

from ..helpers import CONFIG, SIZE, WAN, wan_transformer
from ..plain_wan import PlainWan
from .few_step_generator import FORMS, build
from .test_few_step import noise, prompts
from .test_generator import HEIGHT, WIDTH

GUIDED = FewStepConfig((1.0, 0.6), refresh=0.1, guidance=3.0, negative_prompt="cd")


# Tables of cosines are float32; guidance multiplies what they leave by 5 in each pass
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def both_prompts():
    """Two prompts and their negative ones."""
    return torch.randn(4, 6, CONFIG.text_width).double(), torch.tensor([3, 6, 2, 5])


class PlainGuided:
    """Two plain streams, one under the prompts and one under the negative ones, of one x."""

    def __init__(self, net, text, lens, sampling):
        self.sampling = sampling
        halves = zip(text.chunk(2), lens.chunk(2), strict=True)
        self.streams = [PlainWan(net, *half, relative=False) for half in halves]

    def keep(self, x, time):
        for stream in self.streams:
            stream.keep(stream.run(x, torch.full((len(x),), time).double())[1])

    def chunk(self, drawn):
        x, times = drawn[0], self.sampling.times
        for index, time in enumerate(times):
            t = torch.full((len(x),), time).double()
            prompted, negative = (stream.run(x, t)[0] for stream in self.streams)
            clean = x - time * (negative + self.sampling.guidance * (prompted - negative))
            if index + 1 < len(times):
                x = (1 - times[index + 1]) * clean + times[index + 1] * drawn[index + 1]
        self.keep(clean, self.sampling.refresh)
        return clean


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("chunk", "first"), [(1, None), (3, 1)])
@torch.no_grad()
def test_guided_rollouts_are_two_plain_ones_of_one_chunk(chunk, first, given):
    net = wan_transformer(chunk=chunk, first_chunk=first, window_frames=4, sink_frames=1)
    text = both_prompts()
    rollout, plain = FewStepRollout(net, *text, SIZE, GUIDED), PlainGuided(net, *text, GUIDED)
    if given:
        picture = torch.randn(2, CONFIG.latent_channels, 1, *SIZE).double()
        rollout.give(picture)
        plain.keep(picture, 0.0)
    unguided = FewStepRollout(net, text[0][:2], text[1][:2], SIZE, FewStepConfig(GUIDED.times))
    for index in range(5):
        opens = not index and not given
        drawn = noise(2, net.config.opening_frames if opens else chunk)
        made = rollout.step(drawn)
        torch.testing.assert_close(made, plain.chunk(drawn), **TOLERANCE)
        if opens:
            assert (unguided.step(drawn) - made).abs().max() > 0.1


@torch.no_grad()
def test_recache_computes_both_pasts_again():
    net, old, new = wan_transformer(window_frames=4), both_prompts(), both_prompts()
    rollout, plain = FewStepRollout(net, *old, SIZE, GUIDED, recache=True), None
    made = [rollout.step(noise(2, 1)) for _ in range(3)]
    rollout.set_text(*new)
    plain = PlainGuided(net, *new, GUIDED)
    for clean in made:
        plain.keep(clean, GUIDED.refresh)
    drawn = noise(2, 1)
    torch.testing.assert_close(rollout.step(drawn), plain.chunk(drawn), **TOLERANCE)


def test_rollouts_of_a_batch_read_the_negative_prompt():
    """`aapt eval` gives the prompts; the negative ones come from the sampling."""
    model = WorldModel(WAN, None).double()
    model.transformer = wan_transformer()
    given = torch.randn(2, CONFIG.latent_channels, 1, *SIZE).double()
    text = model.text_encoder(["ab", "abc"])
    frames = list(roll_out(model, given, text, lambda step: None, 3, seed=5, sampling=GUIDED))
    negative = model.text_encoder(["cd", "cd"])
    both = [torch.cat(pair) for pair in zip(text, negative, strict=True)]
    rollout = FewStepRollout(model.transformer, *both, SIZE, GUIDED)
    rollout.give(given)
    for number in range(3):
        shape = (2, 1, CONFIG.latent_channels, 1, *SIZE)
        drawn = torch.cat([Noise((5 << 20) + i, shape)(number) for i in range(2)], dim=1)
        torch.testing.assert_close(frames[number + 1], rollout.step(drawn.double()))


@pytest.mark.parametrize("form", FORMS[:2])
def test_streams_with_guidance(form):
    """Snapshots hold both pasts; a negative prompt that is the prompt changes nothing."""
    generator = build(*form, sampling=GUIDED)
    assert generator.sampling.passes == 6
    stream = generator.open(None, "ab", seed=4, recache=True)
    first, snapshot = stream.step(), stream.snapshot()
    frames = [stream.step() for _ in range(3)]
    twin = stream.fork()
    twin.restore(snapshot)
    assert all(np.array_equal(twin.step(), each) for each in frames)
    twin.prompt = "abab"
    assert not np.array_equal(twin.step(), stream.step())

    def opening(**changes):
        sampling = dataclasses.replace(GUIDED, **changes)
        return build(*form, sampling=sampling).open(None, "ab", seed=4).step().astype(int)

    alone = opening(guidance=1.0)
    assert np.abs(opening(negative_prompt="ab") - alone).max() <= 1
    assert np.array_equal(opening(), first) and np.abs(first - alone).max() > 5
    assert first.shape[1:] == (HEIGHT, WIDTH, 3)


def test_what_does_not_fit_guidance():
    with pytest.raises(ValueError, match="guidance: expected 0 or more, got -1"):
        FewStepConfig((1.0,), guidance=-1)
    with pytest.raises(ValueError, match="text: expected as many negative prompts as prompts"):
        FewStepRollout(wan_transformer(), *prompts(batch=1), SIZE, GUIDED)


def test_the_kinds_of_causal_forcing_diffusion():
    """Its pipeline: 50 steps of UniPC, guidance 3, Wan's negative prompt."""
    for name in ("causal-forcing-framewise-diffusion", "causal-forcing-chunkwise-diffusion"):
        sampling = KINDS[name].sampling
        assert (len(sampling.times), sampling.passes, sampling.refresh) == (50, 102, 0.0)
        assert sampling.negative_prompt.startswith("色调艳丽，过曝")
