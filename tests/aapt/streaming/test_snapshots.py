"""Snapshots, forks and streams that fail: the same controls make the same bits."""

import copy
import gc
import pickle
import threading

import numpy as np
import pytest

from aapt import Control, StreamingGenerator

from ...progress import wait_for
from .test_generator import HEIGHT, WALK, WIDTH, build, play

WINDOW = 2


@pytest.fixture(scope="module")
def generator():
    model, vae = build()
    return StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH, prompts=["ab"])


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize("recache", [False, True])
@pytest.mark.parametrize("before", [0, 1, WINDOW, 3 * WINDOW + 1])
def test_a_restored_stream_makes_the_same_bits(generator, picture, before, recache):
    stream = generator.open(picture, "ab", seed=5, recache=recache)
    play(stream, [Control()] * before) if before else None
    snapshot = stream.snapshot()
    expected = play(stream, WALK)
    stream.prompt = "something else"
    changed = play(stream, WALK)
    for _ in range(2):  # a snapshot can be restored any number of times
        stream.restore(snapshot)
        assert (stream.steps, stream.prompt, stream.seed) == (before, "ab", 5)
        assert np.array_equal(play(stream, WALK), expected)
        stream.prompt = "something else"
        assert np.array_equal(play(stream, WALK), changed)


def test_another_stream_can_take_a_snapshot(generator, picture):
    stream, other = (generator.open(picture, "ab", seed) for seed in (1, 2))
    play(stream, WALK[:2])
    play(other, WALK[:5])
    snapshot = pickle.loads(pickle.dumps(stream.snapshot()))
    other.restore(snapshot)
    assert np.array_equal(play(other, WALK), play(stream, WALK))


@pytest.mark.parametrize("branch", [lambda s: s.fork(), copy.copy, copy.deepcopy])
def test_a_branch_is_a_stream_of_its_own(generator, picture, branch):
    stream = generator.open(picture, "ab", seed=0)
    play(stream, WALK[:2])
    unbranched = generator.open(picture, "ab", seed=0)
    play(unbranched, WALK[:2])
    twin = branch(stream)
    turned = play(twin, [Control(yaw=1.0)] * 4)
    twin.prompt = "something else"
    assert np.array_equal(play(stream, WALK), play(unbranched, WALK))
    assert twin.steps == 6 and stream.steps == 2 + len(WALK)
    del stream
    gc.collect()
    again = generator.open(picture, "ab", seed=9)  # takes the decoder that the stream has left
    play(again, WALK)
    assert not np.array_equal(play(twin, WALK[:1]), turned[:4])


def test_a_snapshot_that_fails_leaves_the_stream_as_it_was(generator, picture, monkeypatch):
    stream, other = (generator.open(picture, "ab", seed=0) for _ in range(2))

    def full(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(stream._memory), "snapshot", full)
        with pytest.raises(MemoryError):
            stream.snapshot()
    assert np.array_equal(play(stream, WALK), play(other, WALK))


def test_a_stream_is_not_pickled(generator, picture):
    with pytest.raises(TypeError, match=r"stream: cannot be pickled; pickle its snapshot\(\)"):
        pickle.dumps(generator.open(picture, "ab"))


def test_a_snapshot_says_whether_its_stream_recaches(generator, picture):
    recached = generator.open(picture, "ab", recache=True)
    play(recached, WALK[:2])
    stream = generator.open(picture, "ab")
    stream.restore(recached.snapshot())
    for each in (recached, stream):
        each.prompt = "something else"
    assert np.array_equal(play(recached, WALK), play(stream, WALK))


def test_snapshots_of_another_size_are_refused(generator, picture):
    stream = generator.open(picture, "ab")
    model, vae = build()
    smaller = StreamingGenerator(model, vae, height=HEIGHT - 16, width=WIDTH)
    other = smaller.open(picture[: HEIGHT - 16], "ab").snapshot()
    with pytest.raises(ValueError, match="cache: expected one of"):
        stream.restore(other)
    assert stream.step(Control()).shape[0] == 4  # nothing has changed


@pytest.mark.parametrize("place", ["transformer", "decoder"])
def test_a_step_that_fails_half_way_closes_the_stream(generator, picture, place, monkeypatch):
    stream = generator.open(picture, "ab", seed=0)
    play(stream, WALK[:2])
    snapshot = stream.snapshot()
    expected = play(stream, WALK[:2])
    stream.restore(snapshot)

    def fail(*_):
        raise KeyboardInterrupt

    layers = {
        "transformer": generator.model.transformer.blocks[-1].video.out,
        "decoder": generator.vae.decoder.layers[-1],
    }
    hook = layers[place].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        stream.step(WALK[0])
    hook.remove()
    with pytest.raises(RuntimeError, match="stream: a step failed half way; restore a snapshot"):
        stream.step(WALK[0])
    with pytest.raises(RuntimeError, match="half way"):
        stream.snapshot()
    stream.restore(snapshot)
    assert np.array_equal(play(stream, WALK[:2]), expected)


def test_a_bad_control_changes_nothing(generator, picture):
    stream, other = (generator.open(picture, "ab", seed=0) for _ in range(2))
    with pytest.raises(ValueError, match="control: expected a Control"):
        stream.step("forward")
    with pytest.raises(ValueError, match="prompt: expected a string"):
        stream.prompt = None
    assert np.array_equal(play(stream, WALK), play(other, WALK))


def test_closing_frees_the_memory(generator, picture):
    stream = generator.open(picture, "ab", seed=0)
    idle = len(generator._idle)
    assert stream.bytes > stream._memory.rollout.cache.k.nbytes
    snapshot = stream.snapshot()
    assert abs(snapshot.bytes - stream.bytes) < 4 * 4 * WIDTH * HEIGHT
    with stream:
        stream.step(Control())
    stream.close()
    assert stream.bytes == 0 and len(generator._idle) == idle + 1
    for use in (lambda: stream.step(Control()), lambda: stream.restore(snapshot), stream.fork):
        with pytest.raises(RuntimeError, match="stream: closed; open a new one"):
            use()


def test_a_second_thread_is_refused(generator, picture):
    """While one thread is inside a step, held there by a hook, another one is told so."""
    stream = generator.open(picture, "ab", seed=0)
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def hold(*_):
        inside.set()
        wait_for(go_on)

    hook = generator.vae.decoder.conv_out.register_forward_pre_hook(hold)
    thread = threading.Thread(target=stream.step, args=(Control(),))
    thread.start()
    wait_for(inside)
    try:
        stream.step(Control())
    except RuntimeError as error:
        errors.append(str(error))
    go_on.set()
    thread.join()
    hook.remove()
    assert errors == ["stream: expected one thread at a time, got a second one"]
    assert stream.steps == 1 and stream.step(Control()).shape[0] == 4
