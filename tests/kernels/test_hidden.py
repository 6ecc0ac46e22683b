"""Hidden rows do not exist: NaN and infinity that a query does not see reach neither its output nor
a gradient, on any backend."""

import pytest
import torch

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    kv_append,
    use_backend,
)
from aapt_kernels.backend import interpreted

from .oracles import spec_mask

NAMES = ["triton"] if interpreted() else ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16] if interpreted() else [torch.float32, torch.float64]
BAD = [torch.nan] if interpreted() else [torch.nan, torch.inf, -torch.inf]
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


def normal(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def differentiate(tensors, layout, text_lens, dout, dlse):
    """out, lse, dq, dk, dv and dq_sink; rows that see nothing have no gradient of their lse."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    options = dict(layout=layout, text_lens=text_lens, return_lse=True)
    out, lse = block_causal_attention(**leaves, **options)
    dlse = torch.where(lse == -torch.inf, 0, dlse)
    return out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))


def make_tensors(layout, dtype, clamped):
    q, k, v = (
        normal(2, length, 2, 16, dtype=dtype)
        for length in (layout.query_length, layout.key_length, layout.key_length)
    )
    tensors = {"q": q, "k": k, "v": v}
    if clamped:
        frame_rows = layout.query_length - layout.text_tokens
        tensors["q_sink"] = normal(2, frame_rows, 2, 16, dtype=dtype)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    return tensors, torch.randn_like(q), normal(2, 2, layout.query_length, dtype=precise)


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
@pytest.mark.parametrize("names", [("q", "k", "v"), ("v",), ("k",), ("dout",)], ids=str)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_broken_frame(layout, dtype, clamped, names, bad):
    """Frame 2 of the query holds NaN. Rows that do not see it keep output and gradient, and so do
    keys that no broken row sees."""
    tensors, dout, dlse = make_tensors(layout, dtype, clamped)
    tokens = layout.tokens_per_frame
    query = slice(layout.text_tokens + 2 * tokens, layout.text_tokens + 3 * tokens)
    start = layout.key_length - layout.query_length
    key = slice(query.start + start, query.stop + start)
    results = []
    for value in (0.0, bad):
        for name in names:
            rows = key if name in ("k", "v") else query
            (dout if name == "dout" else tensors[name])[:, rows] = value
        results.append(differentiate(tensors, layout, None, dout, dlse))

    mask = spec_mask(layout)[0]
    broken_rows = torch.zeros(layout.query_length, dtype=torch.bool)
    if names != ("v",) and names != ("k",):
        broken_rows[query] = True
    if names != ("dout",):
        broken_rows |= mask[:, key].any(1)
    broken_keys = mask[broken_rows].any(0)
    assert broken_rows.any() and not broken_rows.all()
    out_rows = torch.zeros_like(broken_rows) if names == ("dout",) else broken_rows
    sound = {"out": ~out_rows, "q": ~broken_rows, "k": ~broken_keys, "v": ~broken_keys}
    sound["q_sink"] = ~broken_rows[layout.text_tokens :]
    (out, lse, *gradients), (clean_out, clean_lse, *clean_gradients) = results[1], results[0]
    torch.testing.assert_close(lse[:, :, sound["out"]], clean_lse[:, :, sound["out"]])
    torch.testing.assert_close(out[:, sound["out"]], clean_out[:, sound["out"]])
    for name, ours, expected in zip(tensors, gradients, clean_gradients, strict=True):
        rows = sound[name]
        assert expected[:, rows].isfinite().all()
        torch.testing.assert_close(
            ours[:, rows], expected[:, rows], msg=lambda m, n=name: f"d{n}: {m}"
        )
    if bad != bad and names != ("dout",):  # what is seen is not swept away
        assert out[:, out_rows].isnan().any(-1).all()


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
