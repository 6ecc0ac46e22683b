"""Rolling few-step models against the published rolling cache, written again, and in streams."""

import dataclasses

import numpy as np
import pytest
import torch

from aapt.convert.job import convert
from aapt.convert.kinds import KINDS
from aapt.model.config import FewStepConfig
from aapt.streaming.rolling import RollingRollout
from aapt.streaming.snapshot_file import load_snapshot, read_file, write_snapshot

from ..convert.plain_native import random_weights
from ..helpers import CONFIG, SIZE, WAN, wan_transformer
from ..plain_wan import PlainWan
from .few_step_generator import build
from .test_few_step import prompts
from .test_generator import HEIGHT, WIDTH

FOUR = FewStepConfig((1.0, 0.9375, 0.8333, 0.625), rolling=True)
TWO = FewStepConfig((1.0, 0.6), refresh=0.1, rolling=True)


class PlainRolling(PlainWan):
    """Rolling Forcing (arXiv 2509.25161) as its public code runs it, on lists of frames.

    A pass over all chunks sees the first chunk, placed right before the newest finished frames that
    leave `most` in all, and every chunk of its own. The pass over a finished chunk sees the last
    `most` finished frames, itself included. Frames are numbered by their place among those.
    """

    def __init__(self, net, text, lens):
        super().__init__(net, text, lens, relative=True)
        self.n, self.most = net.config.chunk, net.config.sink_frames + net.config.window_frames + 1
        self.noisy = []  # the unfinished chunks, the oldest first

    def visible(self, last):
        start = len(self.keys[0])
        if self.over_all:
            room = self.most - self.n - (last + 1 - start)
            past = [*range(min(self.n, start)), *range(max(self.n, start - room), start)]
        else:
            past = range(max(0, last + 1 - self.most), start)
        return [*past, *range(start, last + 1)]

    def round(self, drawn, times):
        """One pass over the unfinished chunks and a new one; the estimates, oldest first."""
        chunks = [*self.noisy, drawn[-1]]
        of_chunk = times[: len(chunks)][::-1]
        t = torch.tensor(of_chunk, dtype=torch.float64).repeat_interleave(self.n)[None]
        x = torch.cat(chunks, dim=2)
        self.over_all = True
        v = self.run(x, t.expand(len(x), -1))[0]
        estimates = (x - t[:, None, :, None, None] * v).split(self.n, dim=2)
        later = list(zip(estimates, of_chunk, strict=True))
        if len(chunks) == len(times):
            later.pop(0)
        self.noisy = []
        for (estimate, time), noise in zip(later, drawn):
            then = times[times.index(time) + 1]
            self.noisy.append((1 - then) * estimate + then * noise)
        return estimates

    def step(self, noise, sampling):
        for drawn in noise:
            estimates = self.round(drawn.split(self.n, dim=2), list(sampling.times))
        latent, self.over_all = estimates[0], False
        t = torch.full((len(latent),), sampling.refresh, dtype=torch.float64)
        self.keep(self.run(latent, t)[1])
        return latent


ROLLING = ("causal-forcing-longvideo", "rolling-forcing")
KIND_PLANS = [
    (kind.chunk, kind.sink_frames, kind.window_frames, kind.sampling)
    for kind in map(KINDS.get, ROLLING)
]
# chunk, sink, window, sampling
PLANS = [*KIND_PLANS, (1, 1, 5, TWO), (2, 2, 3, TWO), (2, 2, 8, FOUR)]


def noise(sampling, chunk, opening):
    frames = sampling.noise_frames(chunk)
    return torch.randn(sampling.draws(opening), 2, CONFIG.latent_channels, frames, *SIZE).double()


@pytest.mark.parametrize(("chunk", "sink", "window", "sampling"), PLANS)
@torch.no_grad()
def test_a_rollout_equals_the_published_one(chunk, sink, window, sampling):
    """Past the end of both rings."""
    net = wan_transformer(
        chunk=chunk, sink_frames=sink, window_frames=window, sink_distance="clamped"
    )
    text = prompts()
    rollout, plain = RollingRollout(net, *text, SIZE, sampling), PlainRolling(net, *text)
    for index in range((sink + window) // chunk + 4):
        drawn = noise(sampling, chunk, not index)
        expected = plain.step(drawn, sampling)
        torch.testing.assert_close(rollout.step(drawn), expected, rtol=0, atol=1e-6)
    assert int(rollout.cache.step) == int(rollout.cache.seen.step) == len(plain.keys[0])


@pytest.mark.parametrize(("kind", "plan"), list(zip(ROLLING, KIND_PLANS, strict=True)))
def test_a_conversion_keeps_what_was_compared(kind, plan, tmp_path):
    torch.save({"generator_ema": random_weights()}, tmp_path / "w.pt")
    written = convert(tmp_path / "w.pt", tmp_path / "out", kind)
    model = written["model"]
    sizes = (model["chunk"], model["sink_frames"], model["window_frames"])
    assert (*sizes, FewStepConfig(**written["sampling"])) == plan
    assert model["sink_distance"] == "clamped" and written["sampling"]["rolling"]


@torch.no_grad()
def test_a_new_prompt_reaches_both_caches():
    net = wan_transformer(chunk=2, sink_frames=2, window_frames=8, sink_distance="clamped")
    old, new = prompts(), prompts()
    rollout, plain = RollingRollout(net, *old, SIZE, FOUR), PlainRolling(net, *old)
    for index in range(3):
        drawn = noise(FOUR, 2, not index)
        rollout.step(drawn)
        plain.step(drawn, FOUR)
    rollout.set_text(*new)
    plain.set_text(*new)
    drawn = noise(FOUR, 2, False)
    torch.testing.assert_close(rollout.step(drawn), plain.step(drawn, FOUR), rtol=0, atol=1e-6)


def test_streams():
    """Snapshots hold both caches and the unfinished chunks."""
    generator = build(2, None, 2, 8, sampling=FOUR, sink_distance="clamped")
    assert not generator.takes_picture and generator.sampling.passes == 2
    with pytest.raises(ValueError, match="first_frame: expected None for a model whose first"):
        generator.open(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "ab")
    with pytest.raises(ValueError, match="recache: expected False for a rolling model, whose next"):
        generator.open(None, "ab", recache=True)
    stream = generator.open(None, "ab", seed=2)
    first, snapshot = stream.step(), stream.snapshot()
    frames = [stream.step() for _ in range(7)]
    assert [len(first), *map(len, frames)] == [5] + [8] * 7
    twin = stream.fork()
    twin.restore(snapshot)
    assert all(np.array_equal(twin.step(), each) for each in frames)
    other = generator.open(None, "ab", seed=2)
    assert np.array_equal(other.step(), first)
    assert snapshot.bytes > snapshot.cache.bytes > sum(x.bytes for x in snapshot.cache.parts)
    tensors, facts = read_file(write_snapshot(snapshot, {}, {}))
    other.restore(load_snapshot(other.snapshot(), tensors, facts))
    assert all(np.array_equal(other.step(), each) for each in frames)
    stream.close()
    again = generator.open(None, "ab", seed=2)  # in the memory of the closed one
    assert np.array_equal(again.step(), first)


def test_snapshots_of_another_sampling_are_rejected():
    """Two and four times differ in the unfinished chunks alone."""
    streams = {
        name: build(1, None, 1, 5, sampling=sampling, sink_distance="clamped").open(None, "ab")
        for name, sampling in (("two", TWO), ("four", FOUR), ("one", FewStepConfig((1.0,))))
    }
    for stream in streams.values():
        stream.step()
    for theirs, ours, words in (
        ("two", "four", r"unfinished chunks \(1, 4, 3, .*\), got \(1, 4, 1, "),
        ("one", "two", "the cache of a rolling model, got a TextBesideCache$"),
        ("two", "one", "a cache with text beside it, got a RollingCache$"),
    ):
        with pytest.raises(ValueError, match=f"^cache: expected {words}"):
            streams[ours].restore(streams[theirs].snapshot())
        streams[ours].step()  # the stream is as it was


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk": 3}, r"rolling: expected chunks of one size, a sink, and a window of 12 frames"),
        ({"sink_frames": 0}, "rolling: expected chunks of one size, a sink"),
        ({"first_chunk": 1}, "rolling: expected chunks of one size"),
        ({"condition_channels": 2}, "rolling: expected False in a model with conditions"),
    ],
)
def test_models_that_cannot_roll(changes, words):
    sizes = {"chunk": 2, "sink_frames": 2, "window_frames": 8} | changes
    with pytest.raises(ValueError, match=words):
        RollingRollout(wan_transformer(**sizes), *prompts(), SIZE, FOUR)


def test_settings_that_do_not_roll():
    for changes in (
        {"solver": "unipc", "times": (0.9, 0.5)},
        {"guidance": 2.0},
        {"first_times": (1.0,)},
        {"picture_in_chunk": True},
    ):
        with pytest.raises(ValueError, match="rolling: expected False with first_times, 'unipc'"):
            dataclasses.replace(FOUR, **changes)
    for changes, got in (
        ({"refresh": None}, r"times \(1.0, 0.9375, .*\) and refresh None"),
        ({"times": (1.0,)}, r"times \(1.0,\) and refresh 0.0"),
    ):
        words = f"rolling: expected two times or more and a refresh, got {got}$"
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(FOUR, **changes)
    net = wan_transformer(chunk=2, sink_frames=2, window_frames=8)
    with pytest.raises(ValueError, match="latent: expected none in a rolling model, got frames"):
        RollingRollout(net, *prompts(), SIZE, FOUR).give(
            torch.zeros(2, WAN.latent_channels, 2, *SIZE)
        )
