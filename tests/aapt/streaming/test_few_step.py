"""Few-step rollouts against a plain rolling cache and sampler."""

import dataclasses
import math

import pytest
import torch

from aapt.model.config import FewStepConfig, SamplingConfig, sampling_config
from aapt.model.world_model import WorldModel
from aapt.streaming.few_step import FewStepRollout
from aapt.streaming.noise import Noise
from aapt.streaming.rollout import roll_out

from ..helpers import CONFIG, SIZE, WAN, tiny_model, wan_transformer
from ..plain_wan import PlainWan

FOUR = FewStepConfig((1.0, 0.9375, 0.8333, 0.625))
ONE = FewStepConfig((1.0,), first_times=(1.0, 0.9375, 0.8333, 0.625))
NO_REFRESH = FewStepConfig((1.0, 0.5), refresh=None)
NOISY = FewStepConfig((1.0, 0.75), refresh=0.1)


def prompts(dtype=torch.float64, batch=2):
    text = torch.randn(batch, 6, CONFIG.text_width).to(dtype)
    return text, torch.tensor([3, 6][:batch])


def noise(draws, frames, dtype=torch.float64):
    return torch.randn(draws, 2, CONFIG.latent_channels, frames, *SIZE).to(dtype)


# chunk, window, sink, first chunk, sampling; windows count frames besides sink and newest frame
PLANS = [
    (1, 5, 1, None, FOUR),  # frame by frame, 7 / 1
    (1, 20, 0, None, ONE),  # all of 21 frames and on, one step
    (3, 8, 3, None, FOUR),  # LongLive, 12 / 3
    (3, 8, 0, None, NOISY),
    (3, 6, 4, None, FOUR),  # sink and window no multiples of the chunk
    (2, 5, 3, 1, NO_REFRESH),
    (3, 7, 2, 1, ONE),  # 1 + 3 + 3 ...
    (4, 11, 6, None, NOISY),  # lingbot, 18 / 6
]


@pytest.mark.parametrize("sampling", [FOUR, ONE, dataclasses.replace(FOUR, refresh=0.625)])
def test_each_time_has_its_constants_once(sampling):
    """Four times and time 0, whether in the first chunk, in later ones or to refresh."""
    net = wan_transformer(chunk=1, window_frames=3, sink_frames=1)
    rollout = FewStepRollout(net, *prompts(), SIZE, sampling)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    once = sum(x.nbytes for x in net.step_constants(t, SIZE).tensors())
    assert rollout.constants_bytes == 5 * once


@pytest.mark.parametrize("distance", ["absolute", "clamped"])
@pytest.mark.parametrize(("chunk", "window", "sink", "first", "sampling"), PLANS)
def test_a_rollout_equals_the_plain_rolling_cache(chunk, window, sink, first, sampling, distance):
    """Past the ring's end; a clamped sink is relative RoPE."""
    net = wan_transformer(
        chunk=chunk,
        window_frames=window,
        sink_frames=sink,
        first_chunk=first,
        sink_distance=distance,
    )
    text = prompts()
    rollout = FewStepRollout(net, *text, SIZE, sampling)
    plain = PlainWan(net, *text, relative=distance == "clamped")
    chunks = math.ceil((sink + window) / chunk) + 3
    differs = False
    for index in range(chunks):
        times = sampling.times if index else sampling.opening_times
        frames = chunk if index else net.config.opening_frames
        drawn = noise(len(times), frames)
        with torch.no_grad():
            expected = plain.chunk(drawn, list(times), sampling.refresh)
        made = rollout.step(drawn)
        torch.testing.assert_close(made, expected, rtol=1e-7, atol=1e-7)
        differs |= bool((made - drawn[0]).abs().max() > 0.1)
    assert differs and int(rollout.cache.step) == len(plain.keys[0])


def test_half_precision_is_no_farther_from_float64_than_the_plain_cache():
    """The same weights and noise; both carry their own errors on, chunk after chunk."""
    net = wan_transformer(chunk=2, window_frames=5, sink_frames=1).bfloat16()
    text = prompts(torch.bfloat16)
    rollout = FewStepRollout(net, *text, SIZE, FOUR)
    plain = PlainWan(net, *text, relative=False)
    drawn = [noise(4, 2, torch.bfloat16) for _ in range(6)]
    with torch.no_grad():
        ours = [rollout.step(each) for each in drawn]
        theirs = [plain.chunk(each, list(FOUR.times), 0.0) for each in drawn]
        exact_text = text[0].double(), text[1]
        exact = FewStepRollout(net.double(), *exact_text, SIZE, FOUR)
        expected = torch.cat([exact.step(each.double()) for each in drawn], dim=2)
    errors = [(torch.cat(each, dim=2).double() - expected).abs().mean() for each in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1]


def test_times_need_float32():
    """833.3 is no bfloat16: a network in half precision is still told the time to float32."""
    net = wan_transformer().bfloat16()
    embedded = [net.time(torch.tensor([t], dtype=torch.float64)) for t in (0.8333, 0.83203125)]
    assert torch.tensor(0.8333).bfloat16().item() == 0.83203125
    assert not torch.equal(*embedded)
    rollout = FewStepRollout(net, *prompts(torch.bfloat16), SIZE, FOUR)
    assert {moment.time.dtype for moment in rollout.times} == {torch.float64}


@pytest.mark.parametrize(
    ("chunk", "window", "sink", "first"), [(1, 3, 1, None), (3, 7, 4, 1), (2, 5, 0, None)]
)
@pytest.mark.parametrize("made", [1, 2, 7])
def test_recache_is_a_stream_of_clean_chunks_under_the_new_prompt(chunk, window, sink, first, made):
    net = wan_transformer(chunk=chunk, window_frames=window, sink_frames=sink, first_chunk=first)
    old, new = prompts(), prompts()
    rollout = FewStepRollout(net, *old, SIZE, NOISY, recache=True)
    chunks = []
    for index in range(made):
        frames = chunk if index else net.config.opening_frames
        chunks.append(rollout.step(noise(2, frames)))
    rollout.set_text(*new)
    drawn = noise(2, chunk)

    plain = PlainWan(net, *new, relative=False)
    first_frame = 0
    for clean in chunks:
        frames = range(first_frame, first_frame := first_frame + clean.shape[2])
        # Those of the sink, and those that the next chunk's window reaches
        done = sum(each.shape[2] for each in chunks)
        if frames[0] < sink or frames[-1] >= done + chunk - 1 - window:
            with torch.no_grad():
                plain.keep(plain.run(clean, torch.full((2,), 0.1).double())[1])
    with torch.no_grad():
        expected = plain.chunk(drawn, [1.0, 0.75], 0.1)
    torch.testing.assert_close(rollout.step(drawn), expected, rtol=1e-7, atol=1e-7)


def test_a_picture_is_chunk_zero_at_time_zero():
    net, text = wan_transformer(window_frames=4), prompts()
    picture = torch.randn(2, CONFIG.latent_channels, 1, *SIZE).double()
    rollout = FewStepRollout(net, *text, SIZE, ONE)
    rollout.give(picture)
    plain = PlainWan(net, *text, relative=False)
    plain.keep(plain.run(picture, torch.zeros(2).double())[1])
    for index in range(7):
        times = ONE.times if index else ONE.first_times
        drawn = noise(len(times), 1)
        expected = plain.chunk(drawn, list(times), 0.0)
        torch.testing.assert_close(rollout.step(drawn), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("chunk", "first"), [(1, None), (3, 1)])
def test_rollouts_of_a_batch_are_those_of_each_stream(chunk, first):
    """`aapt eval` gives frame 0, and stream i draws its noise from the seed and i alone."""
    model = WorldModel(dataclasses.replace(WAN, chunk=chunk, first_chunk=first), None)
    model.transformer = wan_transformer(chunk=chunk, first_chunk=first)
    given, text = torch.randn(2, CONFIG.latent_channels, 1, *SIZE).double(), prompts()
    frames = list(roll_out(model, given, text, lambda step: None, 7, seed=5, sampling=ONE))
    assert [frame.shape[2] for frame in frames] == [1] * 8 and torch.equal(frames[0], given)
    alone = FewStepRollout(model.transformer, text[0][1:], text[1][1:], SIZE, ONE)
    alone.give(given[1:])
    made = []
    for number in range(math.ceil(7 / chunk)):
        draws = 1 if number else 4
        shape = (draws, 1, CONFIG.latent_channels, chunk, *SIZE)
        made.append(alone.step(Noise((5 << 20) + 1, shape)(number).double()))
    torch.testing.assert_close(torch.cat(frames[1:], 2)[1:], torch.cat(made, 2)[:, :, :7])
    whole = WorldModel(dataclasses.replace(WAN, chunk=3), None).double()
    with pytest.raises(ValueError, match="first: expected a model that a picture can start, got"):
        next(roll_out(whole, given, text, lambda step: None, 7, seed=5, sampling=ONE))


def test_passes_are_counted():
    assert (FOUR.passes, ONE.passes, NO_REFRESH.passes) == (5, 2, 2)


def test_sampling_is_read_by_its_kind():
    assert sampling_config({"steps": 8, "shift": 6.0, "guidance": 3.0}) == SamplingConfig(8, 6, 3)
    assert sampling_config({"kind": "few-step", "times": (1.0, 0.5)}) == FewStepConfig((1.0, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": ()}, r"times: expected falling times in \(0, 1\], got \(\)"),
        ({"times": (0.5, 0.7)}, "times: expected falling times"),
        ({"times": (1.0, 1.0)}, "times: expected falling times"),
        ({"times": (1.5,)}, "times: expected falling times"),
        ({"times": (1.0, 0.0)}, "times: expected falling times"),
        ({"times": (1.0, math.nan)}, "times: expected falling times"),
        ({"times": (1.0,), "first_times": ()}, "first_times: expected falling times"),
        ({"times": (1.0,), "refresh": 2.0}, r"refresh: expected a time in \[0, 1\] or None"),
        ({"times": (1.0,), "kind": "few"}, "kind: expected 'few-step', got 'few'"),
        ({"times": (1.0,), "solver": "heun"}, "solver: expected 'noise' or 'unipc', got 'heun'"),
        ({"times": (1.0, 0.5), "solver": "unipc"}, "times: expected times below 1 for 'unipc'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        FewStepConfig(**settings)


def test_noise_has_a_draw_for_each_time():
    rollout = FewStepRollout(wan_transformer(), *prompts(), SIZE, ONE)
    with pytest.raises(ValueError, match="noise: expected 4 draws, as this chunk .* got 1"):
        rollout.step(noise(1, 1))
    rollout.step(noise(4, 1))
    with pytest.raises(ValueError, match="noise: expected 1 draws, as this chunk .* got 4"):
        rollout.step(noise(4, 1))
    assert int(rollout.cache.step) == 1


def test_models_that_cannot_take_few_steps():
    model = tiny_model()
    with pytest.raises(ValueError, match="sampling: expected a model of block 'wan' for few steps"):
        FewStepRollout(model.transformer, *prompts(), SIZE, FOUR)
    with pytest.raises(ValueError, match="without recycled channels for few steps"):
        FewStepRollout(wan_transformer(recycle=True), *prompts(), SIZE, FOUR)
    with pytest.raises(ValueError, match="recache: expected False for a model without a refresh"):
        FewStepRollout(wan_transformer(), *prompts(), SIZE, NO_REFRESH, recache=True)
