"""Streams stepped in one pass agree with each alone, and fail alone."""

import numpy as np
import pytest
import torch

from aapt import Control, StreamingGenerator
from aapt.streaming.batch import step_together

from .test_generator import HEIGHT, WIDTH, build

PICTURE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PROMPTS = ("ab", "cd", "efg")
TOLERANCE = 1e-4  # of latents, in float32
STEPS = 7  # past the wrap of the ring


@pytest.fixture(scope="module")
def generator():
    model, vae = build()
    return StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH, prompts=["ab"])


def opened(generator, number, recache=False):
    """Opens stream `number`, which has made 3 steps more than the one before."""
    stream = generator.open(PICTURE, PROMPTS[number], seed=number, recache=recache)
    for step in range(3 * number):
        stream.step(control(number, step))
    return stream


def control(number, step):
    return Control(yaw=(number - step % 3) / 2, forward=1.0)


def state(stream):
    """The tensors of a stream's state: latent, cache and decoder."""
    made = stream.snapshot()
    return [made.latent, *made.cache.tensors().values(), *made.decoder.states]


def assert_near(stream, alone):
    for ours, theirs in zip(state(stream), state(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("recache", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_streams_at_different_steps_agree_with_each_alone(generator, count, recache):
    batched, alone = (
        [opened(generator, number, recache) for number in range(count)] for _ in range(2)
    )
    for step in range(STEPS):
        if step == 4:  # one stream changes its prompt, and its past where it recaches
            batched[0].prompt = alone[0].prompt = "xyz"
        controls = [control(number, step) for number in range(count)]
        frames = [pixels() for pixels in step_together(batched, controls)]
        for mine, stream, given in zip(frames, alone, controls, strict=True):
            theirs = stream.step(given)
            assert mine.shape == theirs.shape and mine.dtype == np.uint8
            assert np.abs(mine.astype(int) - theirs).max() <= 1
    for stream, other in zip(batched, alone, strict=True):
        assert stream.steps == other.steps
        assert_near(stream, other)


def test_a_stream_leaves_and_goes_back(generator):
    """Snapshots of a batched stream are those of any: it can be restored, forked and stepped
    alone."""
    streams, alone = ([opened(generator, number) for number in range(3)] for _ in range(2))
    made = streams[1].snapshot()
    step_together(streams, [control(number, 0) for number in range(3)])
    streams[1].restore(made)
    twin = streams[1].fork()
    streams[2].close()
    step_together([streams[0], twin], [control(0, 1), control(1, 0)])
    streams[1].step(control(1, 0))
    alone[0].step(control(0, 0))
    alone[0].step(control(0, 1))
    alone[1].step(control(1, 0))
    assert_near(streams[0], alone[0])
    assert_near(streams[1], alone[1])
    assert_near(twin, alone[1])


def broken(*_):
    raise RuntimeError("no memory")


def test_a_stream_that_fails_after_the_pass_fails_alone(generator, monkeypatch):
    streams, alone = ([opened(generator, number) for number in range(3)] for _ in range(2))
    monkeypatch.setattr(streams[1]._memory.decoder, "next", broken)
    calls = step_together(streams, [control(number, 0) for number in range(3)])
    with pytest.raises(RuntimeError, match="no memory"):
        calls[1]()
    with pytest.raises(RuntimeError, match="stream: a step failed half way"):
        streams[1].step(control(1, 1))
    for number in (0, 2):
        alone[number].step(control(number, 0))
        assert_near(streams[number], alone[number])


def test_a_pass_that_fails_changes_no_stream(generator, monkeypatch):
    streams, alone = ([opened(generator, number) for number in range(2)] for _ in range(2))
    controls = [control(number, 0) for number in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(generator.model.transformer, "unpatchify", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            step_together(streams, controls)
    for stream, other, given in zip(streams, alone, controls, strict=True):
        assert np.array_equal(stream.step(given), other.step(given))


def test_a_closed_stream_stops_no_other(generator):
    streams, alone = ([opened(generator, number) for number in range(2)] for _ in range(2))
    streams[1].close()
    with pytest.raises(RuntimeError, match="stream: closed; open a new one"):
        step_together(streams, [control(0, 0), control(1, 0)])
    assert np.array_equal(streams[0].step(control(0, 0)), alone[0].step(control(0, 0)))


@pytest.mark.parametrize(
    "choose, controls, words",
    [
        (lambda one, other: [], [], "streams: expected at least one, got none"),
        (lambda one, other: [one, one], 2, "streams: expected each stream once, got one of them"),
        (lambda one, other: [one, other], 2, "streams: expected streams of one generator, got"),
        (lambda one, other: [one], [None], "control: expected a Control, got None"),
    ],
)
def test_what_cannot_be_stepped_together(generator, choose, controls, words):
    model, vae = build()
    stranger = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH)
    streams = choose(opened(generator, 0), opened(stranger, 0))
    with pytest.raises(ValueError, match=words):
        step_together(streams, [Control()] * 2 if controls == 2 else controls)
