"""A cache whose past is float8, while text, sink and the newest frame stay as they are: against
attention in float64 to two sets of keys, made here."""

import re

import pytest
import torch

from aapt_kernels import KVCache, cached_attention, kv_append

from .past import E4M3, LAYER, TEXT, Stream, pairs, relative

BF16 = 2**-8


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize(("window", "sink"), [(1, 1), (2, 0), (3, 2)])
def test_the_past_is_rounded_and_nothing_else(backend, window, sink, use_hadamard, pinned):
    stream = Stream(window=window, sink=sink, use_hadamard=use_hadamard)
    for step in range(sink + 2 * window + 2):
        ours, exact, _ = stream.step(pinned, passes=1 + step % 2)
        for one, other in zip(ours, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert int(stream.cache.past.step) == 2 * window + 2


def test_autocast_does_not_choose_the_dtype_of_a_turned_query(backend):
    """The cache does, as for the newest frame."""
    stream = Stream(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            (out, lse), (exact, exact_lse), _ = stream.step()
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
            torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("use_hadamard", [False, True])
def test_kernels_lose_what_the_emulation_loses(kernel, schedule, use_hadamard, pinned):
    schedule(multiprocessors=3, seed=1)
    sizes = dict(tokens=70, heads=2, head_dim=128, dtype=torch.bfloat16)
    stream = Stream(kernel, use_hadamard=use_hadamard, **sizes)
    for _ in range(5):
        (out, lse), (exact, _), (emulated, emulated_lse) = stream.step(pinned)
        assert relative(out, exact) <= 1.1 * relative(emulated, exact) + BF16
        assert relative(out, emulated) < 0.05
        torch.testing.assert_close(lse.double(), emulated_lse, rtol=0, atol=5e-3)
    calls = {("cached_attention", LAYER, 70), ("advance", LAYER, 70)}
    assert calls <= stream.cache.past.checked


def test_state_is_copied_with_the_past(backend):
    stream, other = Stream(), Stream()
    for _ in range(5):
        stream.step()
    twin = stream.cache.clone()
    other.cache.load(stream.cache)
    names = {"k", "v", "step", "text_lens", "past.k", "past.v", "past.step", "past.text_lens"}
    assert twin.tensors().keys() == names | {"past.k_scale", "past.v_scale"}
    assert twin.bytes == sum(x.nbytes for x in twin.tensors().values())
    wanted = [stream.frames[i] for i in (0, 3, 4)]
    for cache in (stream.cache, twin, other.cache):
        for x, exact in zip(cache.prefix(LAYER), zip(*wanted, strict=True), strict=True):
            torch.testing.assert_close(x[:, :6], exact[0], rtol=1e-12, atol=1e-12)
            assert relative(x[:, 6:], torch.cat(exact[1:], 1)) < 0.04
    twin.past.v.zero_()
    assert stream.cache.past.v.float().count_nonzero()
    stream.cache.reset()
    assert int(stream.cache.step) == int(stream.cache.past.step) == 0
    stream.frames = []
    for _ in range(3):
        (out, _), (exact, _), _ = stream.step()
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_cache_filled_from_outside_continues_the_stream(steps):
    stream, other = Stream(), Stream()
    for _ in range(steps):
        stream.step()
    frames = stream.frames[:1] + stream.frames[1:][-2:]
    k, v = (torch.cat([x[:, :0] for x in other.text[:1]] + x, 1) for x in pairs(frames))
    other.cache.load_prefix(LAYER, k, v, steps)
    other.generator.set_state(stream.generator.get_state())
    other.frames = list(stream.frames)
    for _ in range(3):
        (out, lse), (exact, exact_lse), _ = other.step()
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-10, atol=1e-10)


def test_a_step_compiles_without_a_graph_break():
    torch._dynamo.reset()

    def step(x, cache):
        q = kv_append(x, x, x, cache, LAYER, None, None, None, None)
        out = cached_attention(q, cache, LAYER)
        cache.advance()
        return out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    cache = Stream(dtype=torch.float32).cache
    twin = cache.clone()
    for seed in range(4):
        x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(x, cache), step(x, twin))


def test_a_scale_that_does_not_fit_is_named_when_the_step_ends():
    stream = Stream()
    stream.step()
    stream.cache.past.v_scale[LAYER, 2] = 1e-4
    words = "advance: expected v as stored .* in head 2 of layer 1; set v_scale[1, 2] of the cache"
    with pytest.raises(RuntimeError, match=re.sub(r"[][]", r"\\\g<0>", words)):
        stream.step()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            dict(past_dtype=torch.bfloat16),
            TypeError,
            "past_dtype: expected torch.float8_e4m3fn beside a wider dtype, got torch.bfloat16 "
            "beside torch.float32",
        ),
        (
            dict(past_dtype=E4M3, dtype=E4M3),
            TypeError,
            "past_dtype: expected torch.float8_e4m3fn beside a wider dtype, got "
            "torch.float8_e4m3fn beside torch.float8_e4m3fn",
        ),
        (
            dict(past_dtype=E4M3, window_frames=0),
            ValueError,
            "window_frames: expected at least 1 with past_dtype, got 0",
        ),
    ],
)
def test_errors(options, error, words):
    sizes = dict(text_tokens=0, tokens_per_frame=1, window_frames=1)
    with pytest.raises(error, match=f"^{words}$"):
        KVCache(1, 1, 1, 8, **sizes | options)


def test_a_step_has_one_frame():
    cache = Stream().cache
    with pytest.raises(ValueError, match="frames: expected at most 1, the ring of this cache"):
        cache.advance(2)
    with pytest.raises(ValueError, match="cache: expected one of"):
        cache.load(KVCache(2, 2, 3, 8, text_tokens=TEXT, tokens_per_frame=6, window_frames=2))
