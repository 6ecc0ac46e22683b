"""Streaming = parallel: kv_append and cached_attention, step by step, give what qk_norm_rope and
block_causal_attention give at once, before and after the ring wraps."""

import pytest
import torch

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    kv_append,
    qk_norm_rope,
)
from aapt_kernels.cached_attention import ref
from aapt_kernels.testing import assert_error_ratio

BATCH, LAYERS, HEADS, HEAD_DIM, TEXT, TOKENS = 2, 2, 3, 8, 4, 5
SINK_TABLES = ("cos_sink", "sin_sink")


class Stream:
    """Random sequence, rotated in parallel and frame by frame."""

    def __init__(self, frames, clamped, dtype=torch.float64):
        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(dtype)

        self.frames, self.clamped = frames, clamped
        self.q, self.k, self.v = normal(3, BATCH, TEXT + frames * TOKENS, HEADS, HEAD_DIM)
        self.weights = tuple(normal(2, HEAD_DIM))
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        angles = torch.rand(2, frames * TOKENS, HEAD_DIM // 2, dtype=torch.float64) * 6.3
        self.tables = [f(angle).to(precise) for angle in angles for f in (torch.cos, torch.sin)]

    def rows(self, frame):
        return slice(TEXT + frame * TOKENS, TEXT + (frame + 1) * TOKENS)

    def sink_tables(self, rows=slice(None)):
        if not self.clamped:
            return {}
        return {name: x[rows] for name, x in zip(SINK_TABLES, self.tables[2:], strict=True)}

    def text(self):
        q, k = qk_norm_rope(self.q[:, :TEXT], self.k[:, :TEXT], *self.weights, None, None)
        return q, k, self.v[:, :TEXT]

    def parallel(self, window, sink_frames, text_lens):
        q, k, *q_sink = qk_norm_rope(
            self.q[:, TEXT:],
            self.k[:, TEXT:],
            *self.weights,
            *self.tables[:2],
            **self.sink_tables(),
        )
        text_q, text_k, _ = self.text()
        return block_causal_attention(
            torch.cat([text_q, q], dim=1),
            torch.cat([text_k, k], dim=1),
            self.v,
            FrameLayout(TEXT, TOKENS, self.frames, window, sink_frames),
            text_lens=text_lens,
            q_sink=q_sink[0] if q_sink else None,
            return_lse=True,
        )

    def new_cache(self, window, sink_frames, text_lens):
        cache = KVCache(
            BATCH,
            LAYERS,
            HEADS,
            HEAD_DIM,
            text_tokens=TEXT,
            tokens_per_frame=TOKENS,
            window_frames=window,
            sink_frames=sink_frames,
            dtype=self.q.dtype,
        )
        _, k, v = self.text()
        for layer in range(LAYERS):
            cache.write_text(layer, k, v, text_lens)
        return cache

    def append(self, cache, layer, frame):
        rows = slice(frame * TOKENS, (frame + 1) * TOKENS)
        inputs = (x[:, self.rows(frame)] for x in (self.q, self.k, self.v))
        tables = (x[rows] for x in self.tables[:2])
        appended = kv_append(
            *inputs, cache, layer, *self.weights, *tables, **self.sink_tables(rows)
        )
        return appended if self.clamped else (appended, None)

    def step(self, cache, frame):
        for layer in range(LAYERS):
            q, q_sink = self.append(cache, layer, frame)
            result = cached_attention(q, cache, layer, q_sink=q_sink, return_lse=True)
        cache.advance()
        return result


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("lens", [None, (4, 4), (3, 3), (0, 2)])
@pytest.mark.parametrize(("window", "sink_frames"), [(0, 1), (1, 0), (2, 1), (1, 2), (20, 1)])
def test_streaming_equals_parallel(backend, window, sink_frames, lens, clamped):
    stream = Stream(frames=8, clamped=clamped)
    text_lens = None if lens is None else torch.tensor(lens)
    expected, expected_lse = stream.parallel(window, sink_frames, text_lens)
    cache = stream.new_cache(window, sink_frames, text_lens)
    for frame in range(stream.frames):
        out, lse = stream.step(cache, frame)
        rows = stream.rows(frame)
        torch.testing.assert_close(out, expected[:, rows], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse, expected_lse[:, :, rows], rtol=1e-11, atol=1e-11)
        assert out.is_contiguous()
    assert int(cache.step) == stream.frames


@pytest.mark.parametrize("clamped", [False, True])
def test_second_segment_continues_from_the_prefix(backend, clamped):
    """A stream of 6 frames, then 3 in parallel on its prefix, are the rest of one long pass."""
    stream, window, lens = Stream(frames=9, clamped=clamped), 2, torch.tensor([2, 4])
    expected, _ = stream.parallel(window, 1, lens)
    cache = stream.new_cache(window, 1, lens)
    for frame in range(6):
        stream.step(cache, frame)
    k_prefix, v_prefix = cache.prefix(layer=1)
    assert cache.past_frames == window

    rest = slice(6 * TOKENS, None)
    q, k, *q_sink = qk_norm_rope(
        stream.q[:, TEXT:][:, rest],
        stream.k[:, TEXT:][:, rest],
        *stream.weights,
        *(x[rest] for x in stream.tables[:2]),
        **stream.sink_tables(rest),
    )
    text_q, text_k, text_v = stream.text()
    out = block_causal_attention(
        torch.cat([text_q, q], dim=1),
        torch.cat([text_k, k_prefix, k], dim=1),
        torch.cat([text_v, v_prefix, stream.v[:, TEXT:][:, rest]], dim=1),
        FrameLayout(TEXT, TOKENS, 3, window, past_frames=cache.past_frames),
        text_lens=lens,
        q_sink=q_sink[0] if q_sink else None,
        prefix_grad=False,
    )
    torch.testing.assert_close(out[:, TEXT:], expected[:, TEXT:][:, rest])


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype, clamped):
    stream = Stream(frames=6, clamped=clamped, dtype=dtype)
    cache = stream.new_cache(2, 1, torch.tensor([1, 4]))
    for frame in range(6):
        q, q_sink = stream.append(cache, 0, frame)
        out, lse = cached_attention(q, cache, 0, q_sink=q_sink, return_lse=True)

        def plain(dtype, q=q, q_sink=q_sink):
            tensors = (x.to(dtype) for x in (q, cache.k[0], cache.v[0]))
            sink = None if q_sink is None else q_sink.to(dtype)
            scale = HEAD_DIM**-0.5
            return ref.forward(*tensors, cache.step, cache.text_lens, sink, *cache.integers, scale)

        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        for ours, exact, baseline in zip(
            (out, lse), plain(torch.float64), plain(dtype), strict=True
        ):
            assert_error_ratio(ours, exact, baseline)
        cache.advance()


def test_append_writes_one_slot_and_nothing_else(backend):
    """Frame i >= sink goes to ring slot (i - sink) mod (window + 1); the values are copied
    bit for bit, k as qk_norm_rope gives it."""
    window, sink = 2, 1
    stream = Stream(frames=7, clamped=False)
    cache = stream.new_cache(window, sink, None)
    _, k_all = qk_norm_rope(
        stream.q[:, TEXT:], stream.k[:, TEXT:], *stream.weights, *stream.tables[:2]
    )
    for frame in range(7):
        before_k, before_v = cache.k.clone(), cache.v.clone()
        stream.append(cache, 1, frame)
        slot = frame if frame < sink else sink + (frame - sink) % (window + 1)
        rows = stream.rows(slot)
        torch.testing.assert_close(cache.k[1][:, rows], k_all[:, frame * TOKENS :][:, :TOKENS])
        assert torch.equal(cache.v[1][:, rows], stream.v[:, stream.rows(frame)])
        before_k[1][:, rows], before_v[1][:, rows] = cache.k[1][:, rows], cache.v[1][:, rows]
        assert torch.equal(cache.k, before_k)
        assert torch.equal(cache.v, before_v)
        cache.advance()
