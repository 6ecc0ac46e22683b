"""Streams of few-step models: from the prompt alone or from a picture, with all that streams do."""

import json

import numpy as np
import pytest
import torch

from aapt.model.config import FewStepConfig
from aapt.streaming import memory
from aapt.streaming.actions import Replay, Step, Walk, frames_crc, load_walk, make
from aapt.streaming.noise import Noise
from aapt.streaming.snapshot_file import load_snapshot, read_file, write_snapshot
from aapt.vae import to_bytes
from aapt.vae.pixels import to_array

from ..plain_wan import PlainWan
from .few_step_generator import FORMS, SAMPLING, build
from .test_generator import HEIGHT, WIDTH
from .test_memory import OnTheHost, stand_in


@pytest.fixture(scope="module", params=FORMS)
def generator(request):
    return build(*request.param)


@pytest.fixture(scope="module")
def frame_wise():
    return build(*FORMS[0])


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def play(stream, steps):
    return np.concatenate([stream.step() for _ in range(steps)])


def test_frames_of_chunks(generator):
    config = generator.model.config
    with generator.open(None, "ab") as stream:
        assert stream.first_frame.shape == (0, HEIGHT, WIDTH, 3)
        opening = stream.step()
        assert opening.shape == (1 + 4 * (config.opening_frames - 1), HEIGHT, WIDTH, 3)
        later = stream.step()
        assert later.shape == (4 * config.chunk, HEIGHT, WIDTH, 3) and later.dtype == np.uint8
        assert stream.steps == 2 and generator.frames_per_step == len(later)
        made = len(opening) + len(later)
        assert [generator.video_frames(n, picture=False) for n in range(3)] == [
            0,
            len(opening),
            made,
        ]


@pytest.mark.parametrize("from_picture", [False, True])
def test_a_stream_is_the_plain_sampler_and_the_decoder(generator, picture, from_picture):
    """Its noise is a function of seed and step; its video that of all latents decoded at once."""
    config = generator.model.config
    if from_picture and not generator.takes_picture:
        pytest.skip("its first chunk has several frames")
    net = generator.model.transformer
    with torch.no_grad():
        text = generator.model.text_encoder(["ab"])
        plain = PlainWan(net, *text, relative=False)
        latents = []
        if from_picture:
            latents.append(generator.encode(picture[None])[None].clone())
            plain.keep(plain.run(latents[0], torch.zeros(1))[1])
        for step in range(5):
            times = SAMPLING.times if step else SAMPLING.first_times
            frames = config.chunk if step or from_picture else config.opening_frames
            shape = (len(times), 1, config.latent_channels, frames, *generator.latent_size)
            latents.append(plain.chunk(Noise(7, shape)(step), list(times), 0.0))
        latents = torch.cat(latents, dim=2)
        expected = to_array(to_bytes(generator.vae.decode(latents)))
    with generator.open(picture if from_picture else None, "ab", seed=7) as stream:
        video = np.concatenate([stream.first_frame, play(stream, 5)])
    assert video.shape == expected.shape
    assert len(video) == generator.video_frames(5, picture=from_picture)
    difference = np.abs(video.astype(int) - expected.astype(int))
    assert difference.max() <= 1  # rounding to uint8


def test_channels_drive_every_pass_and_nothing_drives_the_picture(picture):
    generator = build(*FORMS[0], condition_channels=3)
    size, net = generator.latent_size, generator.model.transformer
    controls = [torch.randn(3, *size) for _ in range(3)]
    with torch.no_grad():
        plain = PlainWan(net, *generator.model.text_encoder(["ab"]), relative=False)
        given, still = generator.encode(picture[None])[None].clone(), torch.zeros(1, 3, 1, *size)
        plain.keep(plain.run(given, torch.zeros(1), still)[1])
        for step, control in enumerate(controls):
            times = SAMPLING.times if step else SAMPLING.first_times
            noise = Noise(7, (len(times), 1, 4, 1, *size))(step)
            expected = plain.chunk(noise, list(times), 0.0, control[None, :, None])
    before = generator.open(picture, "ab", seed=1)  # leaves its memory, channels included
    before.step(controls[0])
    before.close()
    for recache in (False, True):
        stream = generator.open(picture, "ab", seed=7, recache=recache)
        for control in controls:
            stream.step(control)
        torch.testing.assert_close(stream._memory.latent, expected, rtol=1e-4, atol=1e-4)
        stream.prompt = "ab"
        assert stream.step(controls[0]).shape == (4, HEIGHT, WIDTH, 3)
        stream.close()


@pytest.mark.parametrize("recache", [False, True])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_a_restored_stream_makes_the_same_bits(generator, before, recache):
    stream = generator.open(None, "ab", seed=5, recache=recache)
    for _ in range(before):
        stream.step()
    snapshot = stream.snapshot()
    expected = play(stream, 4)
    stream.prompt = "cde"
    changed = play(stream, 3)
    branch = stream.fork()
    for each in (stream, branch):
        each.restore(snapshot)
        assert (each.steps, each.prompt, each.seed) == (before, "ab", 5)
        assert np.array_equal(play(each, 4), expected)
        each.prompt = "cde"
        assert np.array_equal(play(each, 3), changed)
    assert stream.bytes > snapshot.bytes > stream._memory.rollout.cache.bytes


def test_a_snapshot_goes_through_a_file(generator):
    """Another process goes on from it: the text of the cross-attention is in the file too."""
    stream = generator.open(None, "ab", seed=5)
    play(stream, 3)
    tensors, facts = read_file(write_snapshot(stream.snapshot(), {}, {}))
    expected = play(stream, 3)
    other = generator.open(None, "cde", seed=1)
    other.restore(load_snapshot(other.snapshot(), tensors, facts))
    assert np.array_equal(play(other, 3), expected)
    assert (other.steps, other.prompt, other.seed) == (6, "ab", 5)


def test_streams_of_both_kinds_take_over_one_memory(frame_wise, picture):
    videos = []
    for given in (None, picture, None, picture):
        with frame_wise.open(given, "ab", seed=2) as stream:
            videos.append((stream.first_frame, play(stream, 5)))
    for a, b in ((0, 2), (1, 3)):
        assert all(np.array_equal(x, y) for x, y in zip(videos[a], videos[b], strict=True))
    assert not np.array_equal(videos[0][1][1:17], videos[1][1][:16])
    assert len(frame_wise._idle) == 1


def test_a_prompt_changes_the_future_and_with_recache_the_past(generator):
    videos = []
    for recache in (False, True):
        stream = generator.open(None, "ab", seed=1, recache=recache)
        before = play(stream, 4)
        stream.prompt = "cde"
        videos.append((before, play(stream, 2)))
    assert np.array_equal(videos[0][0], videos[1][0])
    assert not np.array_equal(videos[0][1], videos[1][1])


def test_replays_equal_eager_steps(monkeypatch, picture):
    """Each kind of step is one graph: opening, after a picture, steady."""
    videos = []
    for replayed in (False, True):
        if replayed:
            monkeypatch.setattr(memory, "capture", stand_in)
        for form in FORMS:
            generator = build(*form)
            for given in (None, picture) if generator.takes_picture else (None,):
                stream = generator.open(given, "ab", seed=3)
                videos.append(np.concatenate([stream.first_frame, play(stream, 6)]))
    half = len(videos) // 2
    assert half == 5
    for a, b in zip(videos[:half], videos[half:], strict=True):
        assert np.array_equal(a, b)


def test_a_step_takes_nothing_from_the_host():
    """See `test_memory.py`."""
    generator = build(*FORMS[2])
    model, vae = generator.model.to("meta"), generator.vae.to("meta")
    held = memory.FewStepMemory(model, vae, generator.latent_size, SAMPLING)
    for name, frames in (("opening", 1), ("second", 12), ("steady", 12)):
        with torch.inference_mode(), OnTheHost() as host:
            pixels = held._run(name)
        assert pixels.shape == (1, 3, frames, HEIGHT, WIDTH)
        assert host.seen == []
    with torch.inference_mode(), OnTheHost() as host:
        held._show_picture()
    assert host.seen == []


def test_half_precision_streams(picture):
    generator = build(*FORMS[0])
    generator.model.bfloat16()
    with generator.open(picture, "ab") as stream:
        assert play(stream, 3).shape == (12, HEIGHT, WIDTH, 3)
        assert stream._memory.rollout.cache.k.dtype == torch.bfloat16


def test_no_limit_of_frames(frame_wise):
    """Others end at 1024 latent frames, the rows of their table of angles."""
    with frame_wise.open(None, "ab") as stream:
        stream.step()
        cache = stream._memory.rollout.cache
        cache.step.fill_(100_000)  # a stream after 100,000 frames
        assert play(stream, 2).shape == (8, HEIGHT, WIDTH, 3)
        assert int(cache.step) == 100_002


def walked(generator, first_frame) -> Walk:
    walk = Walk("small", "5e0c", first_frame, "ab", seed=3)
    stream = generator.open(first_frame, "ab", 3)
    for number in range(4):
        step = Step(None, None, "ab" if number < 2 else "cde")
        walk.append(0, number, step._replace(crc=frames_crc(make(stream, step))))
    return walk


@pytest.mark.parametrize("from_picture", [False, True])
def test_a_walk_replays_bit_for_bit(frame_wise, picture, from_picture):
    walk = walked(frame_wise, picture if from_picture else None)
    lines = list(walk.lines("0.1.0"))
    assert (json.loads(lines[0])["first_frame"] is None) != from_picture
    again = load_walk(lines)
    assert again.branches == walk.branches and again.seed == walk.seed
    replay = Replay(frame_wise, again)
    assert len(replay.first_frame) == from_picture
    for step in again.path(0, 4):
        replay.step(step)
    assert replay.differing == []


def test_what_a_few_step_model_refuses(frame_wise, picture):
    with pytest.raises(
        ValueError, match="first_frame: expected None for a model whose first chunk"
    ):
        build(*FORMS[1]).open(picture, "ab")
    with pytest.raises(ValueError, match=r"first_frame: expected uint8 \(32, 48, 3\), got"):
        frame_wise.open(picture[:16], "ab")
    with pytest.raises(ValueError, match="chunk: expected 1 without few-step sampling"):
        build(*FORMS[1], sampling=None)
    with pytest.raises(ValueError, match="sampling: .* without recycled channels"):
        build(*FORMS[0], recycle=True)
    with pytest.raises(ValueError, match="chunk: expected 1 in a model with conditions"):
        build(*FORMS[1], condition_channels=3)
    no_refresh = build(*FORMS[0], sampling=FewStepConfig((1.0,), refresh=None))
    assert no_refresh.open(None, "ab").step().shape == (1, HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match="recache: expected False for a model without a refresh"):
        no_refresh.open(None, "ab", recache=True)


def test_a_model_of_one_pass_needs_its_picture(picture):
    """A Wan-type model that AAPT has post-trained streams like any other of one pass."""
    generator = build(*FORMS[0], sampling=None, recycle=True)
    with pytest.raises(ValueError, match=r"first_frame: expected uint8 \(32, 48, 3\), got None"):
        generator.open(None, "ab")
    stream = generator.open(picture, "ab", recache=True)
    snapshot, frames = stream.snapshot(), play(stream, 6)
    assert frames.shape == (24, HEIGHT, WIDTH, 3)
    stream.restore(snapshot)
    assert np.array_equal(play(stream, 6), frames)
