"""Streams with a float8 cache: what they lose, and that their state is whole."""

import copy
import pickle

import numpy as np
import pytest
import torch

from aapt import Control, StreamingGenerator
from aapt.model.caches import CacheError
from aapt.streaming import memory
from aapt.streaming.actions import Replay, Step, Walk, frames_crc, load_walk, make
from aapt.streaming.batch import step_together
from aapt.streaming.cache_memory import cache_bytes
from aapt.streaming.snapshot_file import load_snapshot, read_file, write_snapshot
from aapt.vae import CausalVAE
from aapt_kernels import self_check

from ..helpers import tiny_model
from .few_step_generator import SAMPLING
from .few_step_generator import build as build_few_step
from .test_generator import HEIGHT, VAE, WALK, WIDTH, play
from .test_memory import Outside, stand_in

FLOAT8 = ["float8", "float8-past"]
WINDOW = 2


def make_generator(cache="model", **changes) -> StreamingGenerator:
    sizes = {"width": 64, "head_dim": 32, "rope_axes": (8, 12, 12), "window_frames": WINDOW}
    options = {"sink_distance": "clamped", "residual_head": True, "output_clamp": 4.0}
    model = tiny_model(**sizes | options | changes).float()
    torch.manual_seed(1)
    vae = CausalVAE(VAE)
    generator = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH, prompts=["ab"])
    generator.use_cache(cache)
    return generator


@pytest.fixture(scope="module", params=FLOAT8)
def generator(request):
    return make_generator(request.param)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def cache_of(stream):
    return stream._memory.rollout.cache


def multiplies(outside):
    return any("matmul" in name or "linear" in name for name in outside.seen)


def psnr(one, other):
    error = np.square(one.astype(float) - other).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def test_text_first_and_newest_frame_are_exact_in_a_float8_past(picture):
    """The third step is the first that sees a frame of the window."""
    streams = [make_generator(name).open(picture, "ab") for name in ("model", *FLOAT8)]
    exact, whole, past = (play(stream, WALK[:4]) for stream in streams)
    assert np.array_equal(past[:8], exact[:8]) and not np.array_equal(past[8:], exact[8:])
    assert not np.array_equal(whole[:4], exact[:4])
    assert psnr(past, exact) > psnr(whole, exact) > 30


def test_the_window_of_a_float8_past_is_that_of_the_model_rounded(picture):
    exact, past = (make_generator(name).open(picture, "ab") for name in ("model", "float8-past"))
    for stream in (exact, past):
        play(stream, WALK[:2])
    tokens = cache_of(exact).tokens_per_frame
    for layer in range(3):
        for ours, theirs in zip(*(cache_of(s).prefix(layer) for s in (past, exact)), strict=True):
            assert torch.equal(ours[:, :tokens], theirs[:, :tokens])  # the first frame
            ours, theirs = ours[:, tokens:], theirs[:, tokens:]
            assert 0.01 < (ours - theirs).norm() / theirs.norm() < 0.04  # e4m3 loses 2.6 %


@pytest.mark.parametrize("recache", [False, True])
@pytest.mark.parametrize("before", [0, 1, 2, 3, 3 * WINDOW + 1])
def test_a_restored_stream_makes_the_same_bits(generator, picture, before, recache):
    stream = generator.open(picture, "ab", seed=5, recache=recache)
    play(stream, [Control()] * before) if before else None
    snapshot = pickle.loads(pickle.dumps(stream.snapshot()))
    expected = play(stream, WALK)
    stream.prompt = "cd"
    changed = play(stream, WALK)
    other = generator.open(picture, "cd", seed=1, recache=recache)
    play(other, WALK[:5])
    twin = copy.copy(other)
    for each in (stream, other, twin):
        each.restore(snapshot)
        assert np.array_equal(play(each, WALK), expected)
        each.prompt = "cd"
        assert np.array_equal(play(each, WALK), changed)


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_a_snapshot_survives_a_file(generator, picture, before):
    stream = generator.open(picture, "ab", seed=5)
    play(stream, WALK[:before]) if before else None
    data = write_snapshot(stream.snapshot(), {}, {})
    expected = play(stream, WALK)
    fresh = generator.open(picture, "ab")
    fresh.restore(load_snapshot(fresh.snapshot(), *read_file(data)))
    assert np.array_equal(play(fresh, WALK), expected)


def test_a_file_whose_counters_disagree_is_refused(picture):
    stream = make_generator("float8-past").open(picture, "ab")
    play(stream, WALK[:3])
    tensors, facts = read_file(write_snapshot(stream.snapshot(), {}, {}))
    tensors["cache.past.step"] += 1
    with pytest.raises(
        ValueError, match=r"^snapshot: expected cache.past.step 2 at step 3, got 3$"
    ):
        load_snapshot(stream.snapshot(), tensors, facts)


def test_a_snapshot_of_another_cache_is_refused(picture):
    streams = {name: make_generator(name).open(picture, "ab") for name in ("model", *FLOAT8)}
    for name, stream in streams.items():
        expected = play(copy.copy(stream), WALK[:1])
        for given, other in streams.items():
            if given == name:
                continue
            said = f"^snapshot: expected cache {name}, got {given}; restore it in a stream of cache"
            with pytest.raises(CacheError, match=said):
                stream.restore(other.snapshot())
            data = write_snapshot(other.snapshot(), {}, {})
            with pytest.raises(CacheError, match=said):
                load_snapshot(stream.snapshot(), *read_file(data))
        assert np.array_equal(play(stream, WALK[:1]), expected)  # as it was


def test_open_streams_keep_their_cache(picture):
    generator = make_generator()
    old = generator.open(picture, "ab")
    expected = play(make_generator().open(picture, "ab"), WALK)
    frames = [play(old, WALK[:2])]
    generator.use_cache("float8")
    assert generator.cache == "float8"
    with pytest.raises(CacheError, match="^snapshot: expected cache float8, got model; "):
        old.fork()
    new = generator.open(picture, "ab")
    assert cache_of(new).k.dtype == torch.float8_e4m3fn
    frames.append(play(old, WALK[2:]))
    assert np.array_equal(np.concatenate(frames), expected)
    used = old._memory
    old.close()  # its memory is not taken over
    again = generator.open(picture, "ab")
    assert again._memory is not used and cache_of(again).k.dtype == torch.float8_e4m3fn


def test_streams_step_together(generator, picture):
    alone = [generator.open(picture, "ab", seed) for seed in (0, 1, 2)]
    together = [generator.open(picture, "ab", seed) for seed in (0, 1, 2)]
    play(alone[1], WALK[:3]), play(together[1], WALK[:3])
    for control in WALK[:4]:
        pixels = [call() for call in step_together(together, [control] * 3)]
        for ours, stream in zip(pixels, alone, strict=True):
            # Products sum in another order, and a number near the middle may round the other way
            assert psnr(ours, stream.step(control)) > 45
    assert [int(cache_of(stream).step) for stream in together] == [4, 7, 4]


def test_bytes_count_the_past(picture):
    found = {}
    for name in ("model", *FLOAT8):
        generator = make_generator(name)
        stream = generator.open(picture, "ab")
        cache, frames = cache_of(stream), (cache_of(stream).text_tokens, 1 + WINDOW + 1)
        assert stream.bytes == stream._memory.bytes
        assert stream.snapshot().cache.bytes == cache.bytes
        assert cache_bytes(generator, name, torch.float32) == cache.bytes
        found[name] = cache.bytes
        layers, heads, head_dim = 3, 2, 32
        numbers = 2 * layers * heads * head_dim  # of a token, keys and values
    text, tokens = frames[0], cache.tokens_per_frame
    kept = text + 2 * tokens
    assert found["model"] // (4 * numbers) == text + (2 + WINDOW) * tokens
    assert found["float8"] < found["model"] / 3
    assert found["float8-past"] > numbers * (4 * kept + WINDOW * tokens)
    assert found["float8-past"] < 1.1 * numbers * (4 * kept + WINDOW * tokens)


@pytest.mark.parametrize(("form", "name"), [((3, None, 3, 5), "float8"), ((1, None, 1, 3), None)])
def test_few_step_models(picture, form, name):
    expected = build_few_step(*form).open(None, "ab")
    exact = [expected.step() for _ in range(4)]
    for cache in FLOAT8 if name is None else (name,):
        generator = build_few_step(*form)
        generator.use_cache(cache)
        stream = generator.open(None, "ab")
        snapshot = None
        for number, frames in enumerate(exact):
            ours = stream.step()
            assert ours.shape == frames.shape and psnr(ours, frames) > 25
            if snapshot is not None:
                stream.restore(snapshot)
                assert np.array_equal(stream.step(), ours)
            snapshot = stream.snapshot()
            assert snapshot.steps == number + 1
        again = generator.open(None, "ab", recache=True)
        [again.step() for _ in range(4)]
        again.prompt = "cd"
        assert again.step().shape == exact[-1].shape
        assert cache_bytes(generator, cache, torch.float32) == cache_of(stream).bytes


def test_models_that_cannot(picture):
    with pytest.raises(CacheError, match="^cache: .* steps make 3 latent frames, got float8-past"):
        build_few_step(3, None, 3, 5).use_cache("float8-past")
    rolling = SAMPLING.__class__((1.0, 0.5), refresh=0.0, rolling=True)
    generator = build_few_step(1, None, 1, 3, sampling=rolling)
    with pytest.raises(CacheError, match="^cache: expected model for a rolling model, "):
        generator.use_cache("float8")
    assert generator.cache == "model"
    stream = generator.open(None, "ab")
    assert cache_bytes(generator, "model", torch.float32) == cache_of(stream).bytes


def test_replays_equal_eager_steps_once_the_cache_is_checked(monkeypatch, picture):
    eager = make_generator("float8-past")
    expected = play(eager.open(picture, "ab"), WALK)
    calls = []
    checked = self_check.check_stored
    monkeypatch.setattr(
        self_check, "check_stored", lambda *given: calls.append(given[1]) or checked(*given)
    )
    monkeypatch.setattr("aapt_kernels.kv_cache.check_stored", self_check.check_stored)
    monkeypatch.setattr(memory, "capture", stand_in)
    stream = make_generator("float8-past").open(picture, "ab")
    assert calls == []  # neither in the calls before a capture nor for text, which is exact
    frames, launched = [], []
    for control in WALK:
        with Outside() as outside:
            frames.append(stream.step(control))
        launched.append(multiplies(outside))
    assert np.array_equal(np.concatenate(frames), expected)
    # Steps with the sink, and two with the window, have no graph
    assert launched == [True] * 3 + [False] * (len(WALK) - 3)
    assert set(calls) == {"advance"} and len(calls) >= 3
    calls.clear()
    stream.recheck()
    with Outside() as outside:
        stream.step(WALK[0])
    assert len(calls) == 3 and multiplies(outside)


def launches(stream, controls):
    """True for each step whose operations run one by one, not as a graph."""
    launched = []
    for control in controls:
        with Outside() as outside:
            stream.step(control)
        launched.append(multiplies(outside))
    return launched


def test_every_stream_is_checked_until_it_has_seen_the_window(monkeypatch, picture):
    monkeypatch.setattr(memory, "capture", stand_in)
    generator = make_generator("float8-past")
    with generator.open(picture, "ab") as stream:
        used, before = stream._memory, stream.snapshot()
        assert launches(stream, WALK[:2]) == [True] * 2
        stream.restore(before)
        assert launches(stream, WALK[:4]) == [True] * 3 + [False]
        stream.restore(before)
        assert launches(stream, WALK[:1]) == [False]
        late = stream.snapshot()
    again = generator.open(picture, "ab")
    assert again._memory is used  # with checks of its own
    assert launches(again, WALK[:4]) == [True] * 3 + [False]
    again.restore(late)
    assert launches(again, WALK[:1]) == [False]
    generator.use_cache("float8-past", self_check=False)
    unchecked = generator.open(picture, "ab")
    unchecked.recheck()
    assert launches(unchecked, WALK[:2]) == [False] * 2


def test_a_stream_takes_no_scales_from_the_one_before(generator, picture):
    expected = play(generator.open(picture, "ab"), WALK)
    with generator.open(picture, "ab") as stream:
        used, snapshot = stream._memory, stream.snapshot()
        for name, tensor in snapshot.cache.tensors().items():
            if name.endswith("_scale"):
                tensor.mul_(3)
        stream.restore(snapshot)
    again = generator.open(picture, "ab")
    assert again._memory is used
    assert np.array_equal(play(again, WALK), expected)


@pytest.mark.parametrize("name", FLOAT8)
def test_a_model_that_loses_too_much_says_so(monkeypatch, picture, name):
    """Values a million times larger than their weights promise are cut."""
    generator = make_generator(name)
    monkeypatch.setattr("aapt.model.caches.VALUE_SIZE", 4e6)
    place = "write_text" if name == "float8" else "advance"
    with pytest.raises(CacheError) as caught:
        stream = generator.open(picture, "ab")
        play(stream, WALK[:3])
    said = "cache: this model loses too much in float8; choose the cache model: "
    assert str(caught.value).startswith(f"{said}{place}: expected v as stored to be within 6 %")
    if name == "float8-past":
        with pytest.raises(RuntimeError, match="half way"):
            stream.step(WALK[0])
    generator.use_cache(name, self_check=False)
    play(generator.open(picture, "ab"), WALK[:3])


def test_a_loss_in_a_shared_pass_is_said(monkeypatch, picture):
    generator = make_generator("float8")
    streams = [generator.open(picture, "ab", seed) for seed in (0, 1)]
    for stream in streams:
        cache_of(stream).v_scale.mul_(1e-6)
    with pytest.raises(
        CacheError, match="^cache: this model loses too much in float8; .* kv_append"
    ):
        step_together(streams, WALK[:2])
    for stream in streams:
        cache_of(stream).v_scale.mul_(1e6)
    assert [call().shape for call in step_together(streams, WALK[:2])] == [
        (4, HEIGHT, WIDTH, 3)
    ] * 2


def test_a_walk_names_its_cache(picture):
    generator = make_generator("float8-past")
    walk = Walk("small", "0" * 64, picture, "ab", 5, cache=generator.cache)
    stream = generator.open(picture, "ab", 5)
    for number in range(4):
        step = Step(0.5, 1.0, "ab")
        walk.append(0, number, step._replace(crc=frames_crc(make(stream, step))))
    lines = list(walk.lines("0"))
    read = load_walk(lines)
    assert read.cache == "float8-past" and read.copy().cache == "float8-past"
    replay = Replay(generator, read)
    for step in read.path(0, 4):
        replay.step(step)
    assert replay.differing == []
    with pytest.raises(CacheError, match="^walk: expected cache model, got float8-past; choose"):
        Replay(make_generator(), read)
    assert '"cache"' not in next(Walk("small", "0" * 64, picture, "ab", 5).lines("0"))
    bad = lines[0].replace("float8-past", "float9")
    with pytest.raises(ValueError, match="^walk: line 1: cache: expected one of model, float8, "):
        load_walk([bad])
