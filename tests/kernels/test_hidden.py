"""Hidden rows do not exist: NaN and infinity that a query does not see reach neither its output nor
a gradient, on any backend."""

import pytest
import torch

from aapt_kernels import FrameLayout, KVCache, cached_attention, kv_append, use_backend
from aapt_kernels.backend import interpreted

from .broken import check_broken_frame, differentiate, make_tensors, normal

NAMES = ["triton"] if interpreted() else ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16] if interpreted() else [torch.float32, torch.float64]
BAD = [torch.nan] if interpreted() else [torch.nan, torch.inf, -torch.inf]
# The interpreter takes seconds for each
ALONE = [pytest.param((x,), marks=[pytest.mark.slow] * interpreted()) for x in "vk"]
LAYOUTS = {
    "tiny frames": FrameLayout(5, 3, 12, 2),
    "frames of less than a tile": FrameLayout(5, 23, 6, 1, sink_frames=2),
    "after a past": FrameLayout(3, 7, 8, 2, past_frames=2),
    "no text": FrameLayout(0, 40, 4, 0),
}


@pytest.fixture(params=NAMES, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiny frames", "after a past"])
def test_padded_text(name, dtype, clamped, bad):
    layout, lens = LAYOUTS[name], torch.tensor([0, 2])
    tensors, dout, dlse = make_tensors(layout, dtype, clamped)
    results = []
    for value in (0.0, bad):
        for x in (tensors["k"], tensors["v"]):
            x[0, : layout.text_tokens] = value
            x[1, 2 : layout.text_tokens] = value
        results.append(differentiate(tensors, layout, lens, dout, dlse))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bad", BAD[:2])
@pytest.mark.parametrize("names", [("q", "k", "v"), *ALONE, ("dout",)], ids=str)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_broken_frame(layout, dtype, clamped, names, bad):
    tensors, dout, dlse = make_tensors(layout, dtype, clamped)
    check_broken_frame(layout, tensors, dout, dlse, names, bad)


TEXT, TOKENS, WINDOW = 4, 3, 2


def make_cache(dtype=torch.float32):
    sizes = dict(text_tokens=TEXT, tokens_per_frame=TOKENS, window_frames=WINDOW)
    return KVCache(2, 1, 2, 16, **sizes, dtype=dtype)


def step(cache, frame, clamped):
    q, k, v, q_sink = frame
    kv_append(q, k, v, cache, 0, None, None, None, None)
    out = cached_attention(q, cache, 0, q_sink=q_sink if clamped else None, return_lse=True)
    cache.advance()
    return out


@pytest.mark.parametrize("bad", BAD[:2])
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_of_a_cache_that_are_not_seen(dtype, clamped, bad):
    """Rows are hidden before the ring is full, and padding in the slot of the text."""
    text = normal(2, 3, 2, 16, dtype=dtype)
    frames = normal(6, 4, 2, TOKENS, 2, 16, dtype=dtype)
    results = []
    for value in (0.0, bad):
        cache = make_cache(dtype)
        cache.k.fill_(value)
        cache.v.fill_(value)
        padded = text.clone()
        padded[0, 1:], padded[1] = value, value
        cache.write_text(0, padded, padded, torch.tensor([1, 0]))
        assert cache.k[0, :, :TEXT].isfinite().all() and cache.v[0, :, :TEXT].isfinite().all()
        results.append([step(cache, frame, clamped) for frame in frames])
    for ours, expected in zip(*results, strict=True):
        for x, y in zip(ours, expected, strict=True):
            assert torch.equal(x, y)


def test_a_stream_recovers_by_reset(backend):
    cache = make_cache()
    text = normal(2, TEXT, 2, 16, dtype=torch.float32)
    cache.write_text(0, text, text)
    frames = normal(8, 4, 2, TOKENS, 2, 16, dtype=torch.float32)
    expected = [step(cache, frame, True) for frame in frames]
    for frame in frames:
        assert step(cache, torch.full_like(frame, torch.nan), True)[0].isnan().all()
    cache.reset()
    assert not cache.k[:, :, TEXT:].any() and not cache.v[:, :, TEXT:].any()
    assert torch.equal(cache.k[0, :, :TEXT], text)
    for frame, (out, lse) in zip(frames, expected, strict=True):
        ours = step(cache, frame, True)
        assert torch.equal(ours[0], out) and torch.equal(ours[1], lse)
