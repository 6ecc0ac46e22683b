"""A picture as the first frame of the first chunk, at time 0 in every pass (LongLive-2)."""

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
from ..plain_unipc import told, unipc
from ..plain_wan import PlainWan
from .few_step_generator import FORMS, build
from .test_few_step import noise, prompts
from .test_generator import HEIGHT, WIDTH

UNIPC = dataclasses.replace(KINDS["longlive-2-5b"].sampling, times=(0.95, 0.7, 0.3))
RENOISED = FewStepConfig((1.0, 0.6), first_times=(1.0, 0.8, 0.4), picture_in_chunk=True)
SIZES = {"chunk": 3, "window_frames": 5, "sink_frames": 3}


def first_chunk(plain: PlainWan, picture, drawn, sampling):
    """The first chunk of the plain rolling cache: the picture is put back before every pass."""
    times, count = sampling.opening_times, drawn.shape[3]

    def at(time):
        t = torch.full((len(picture), count), time, dtype=torch.float64)
        t[:, 0] = 0
        return t

    def estimate(x, time):
        x = torch.cat([picture, x[:, :, 1:]], dim=2)
        t = at(told(time) if sampling.solver == "unipc" else time)
        return x - at(time)[:, None, :, None, None] * plain.run(x, t)[0]

    if sampling.solver == "unipc":
        clean = unipc(estimate, drawn[0], times)
    else:
        x = drawn[0]
        for index, time in enumerate(times):
            clean = estimate(x, time)
            if index + 1 < len(times):
                x = (1 - times[index + 1]) * clean + times[index + 1] * drawn[index + 1]
    assert torch.equal(clean[:, :, :1], picture)
    plain.keep(plain.run(clean, torch.zeros(len(clean)).double())[1])
    return clean


@pytest.mark.parametrize("sampling", [UNIPC, RENOISED])
@torch.no_grad()
def test_rollouts_equal_the_plain_ones(sampling):
    net, text = wan_transformer(**SIZES), prompts()
    rollout, plain = FewStepRollout(net, *text, SIZE, sampling), PlainWan(net, *text, False)
    picture = torch.randn(2, CONFIG.latent_channels, 1, *SIZE).double()
    drawn = noise(sampling.draws(opening=True), 3)
    made = rollout.step(drawn, picture=picture)
    torch.testing.assert_close(
        made, first_chunk(plain, picture, drawn, sampling), rtol=1e-7, atol=1e-7
    )
    for _ in range(4):
        drawn = noise(sampling.draws(opening=False), 3)
        if sampling.solver == "unipc":
            expected = plain.unipc_chunk(drawn[0], sampling.times)
        else:
            expected = plain.chunk(drawn, list(sampling.times), 0.0)
        torch.testing.assert_close(rollout.step(drawn), expected, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="picture: expected None after the first chunk"):
        rollout.step(drawn, picture=picture)


@pytest.mark.parametrize("sampling", [UNIPC, RENOISED])
@torch.no_grad()
def test_rollouts_of_a_batch_begin_with_their_pictures(sampling):
    """`aapt eval` gives frame 0."""
    model = WorldModel(dataclasses.replace(WAN, **SIZES), None).double()
    model.transformer = wan_transformer(**SIZES)
    given, text = torch.randn(2, CONFIG.latent_channels, 1, *SIZE).double(), prompts()
    frames = list(roll_out(model, given, text, lambda step: None, 7, seed=5, sampling=sampling))
    assert [frame.shape[2] for frame in frames] == [1] * 8
    rollout, made = FewStepRollout(model.transformer, *text, SIZE, sampling), []
    for number in range(3):
        shape = (sampling.draws(opening=number == 0), 1, CONFIG.latent_channels, 3, *SIZE)
        drawn = torch.cat([Noise((5 << 20) + i, shape)(number) for i in range(2)], dim=1)
        made.append(rollout.step(drawn.double(), picture=None if number else given))
    torch.testing.assert_close(torch.cat(frames, 2), torch.cat(made, 2)[:, :, :8])


@pytest.mark.parametrize("sampling", [UNIPC, RENOISED])
def test_streams(sampling):
    """From a picture and from the prompt; snapshots before the first chunk hold the picture."""
    generator = build(*FORMS[1], sampling=sampling)
    assert generator.takes_picture
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for recache in (False, True):
        stream = generator.open(picture, "ab", seed=4, recache=recache)
        before, twin = stream.snapshot(), stream.fork()
        frames = [stream.step() for _ in range(4)]
        shown = [1, 8, 12, 12, 12]
        assert [len(stream.first_frame), *map(len, frames)] == shown
        assert [generator.video_frames(n, picture=True) for n in range(5)] == np.cumsum(
            shown
        ).tolist()
        assert all(np.array_equal(twin.step(), each) for each in frames)
        other = generator.open(255 - picture, "ab", seed=4)
        other.step()
        other.restore(before)
        assert all(np.array_equal(other.step(), each) for each in frames)
    stream.prompt = "cd"
    assert not np.array_equal(stream.step(), twin.step())
    blank = generator.open(None, "ab", seed=4)
    assert [len(blank.step()) for _ in range(2)] == [9, 12]
    again = generator.open(picture, "ab", seed=4)
    assert np.array_equal(again.step(), frames[0])  # in the memory of an earlier stream


def test_a_first_chunk_of_one_frame_has_no_room_for_more():
    with pytest.raises(ValueError, match="picture_in_chunk: expected False for a first chunk of"):
        build(*FORMS[2], sampling=UNIPC)
    rollout = FewStepRollout(wan_transformer(), *prompts(), SIZE, FewStepConfig((1.0,)))
    picture = torch.randn(2, CONFIG.latent_channels, 1, *SIZE).double()
    with pytest.raises(ValueError, match="in a model whose pictures come before it, got a picture"):
        rollout.step(noise(1, 1), picture=picture)
