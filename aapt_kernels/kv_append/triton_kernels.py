"""Norm, rotation and the write into the cache slots that the counter on the device names: one
launch per layer and step, for any GPU that Triton serves (docs/method.md#4, #5)."""

import torch
import triton
import triton.language as tl

from ..backend import capability_of
from ..checks import cache_limit
from ..kv_cache import QUANTISED
from ..triton_rows import (
    dense_or_none,
    load_angles,
    load_halves,
    locate,
    multiply_hadamard,
    normalise,
    offsets,
    rotate,
    store_halves,
    store_queries,
    tiling,
)
from ..triton_tiles import FLOAT8_CAPABILITY, to_e4m3

KEYS = 64  # of a tile of values
INTEGERS = ["rows", "length", "text_tokens", "tokens_per_frame", "ring_frames", "sink_frames"]
INTEGERS += ["value_programs"]


@triton.jit
def first_key(frame, text_tokens, tokens_per_frame, ring_frames, sink_frames):
    """Return the first row of the cache that keeps a frame."""
    in_ring = sink_frames + (frame - sink_frames) % ring_frames
    slot = tl.where(frame < sink_frames, frame, in_ring)
    return text_tokens + slot * tokens_per_frame


@triton.jit
def store_transposed(
    program,
    v,
    v_cache,
    v_scale,
    step,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    v_cache_batch_stride,
    v_cache_head_stride,
    v_cache_column_stride,
    heads,
    length,
    text_tokens,
    tokens_per_frame,
    ring_frames,
    sink_frames,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Store KEYS values of one head and frame in a float8 cache, where the keys of a column are
    side by side."""
    tiles = tl.cdiv(tokens_per_frame, KEYS)
    frames = length // tokens_per_frame
    head = program % heads
    within = program // heads % tiles * KEYS + tl.arange(0, KEYS)
    frame = program // heads // tiles % frames
    batch = (program // heads // tiles // frames).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (within < tokens_per_frame)[:, None] & (column < HEAD_DIM)
    token = (frame * tokens_per_frame + within).to(tl.int64)[:, None]
    source = batch * v_batch_stride + head.to(tl.int64) * v_head_stride + token * v_token_stride
    values = tl.load(v + source + column, mask=mask, other=0)
    key = first_key(tl.load(step) + frame, text_tokens, tokens_per_frame, ring_frames, sink_frames)
    at = batch * v_cache_batch_stride + head.to(tl.int64) * v_cache_head_stride
    at += column.to(tl.int64) * v_cache_column_stride + (key + within)[:, None]
    tl.store(v_cache + at, to_e4m3(values, tl.load(v_scale + head)), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def kv_append_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    step,
    q_weight,
    k_weight,
    cos,
    sin,
    cos_sink,
    sin_sink,
    k_scale,
    v_scale,
    q_out,
    q_sink_out,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    k_cache_batch_stride,
    k_cache_token_stride,
    k_cache_head_stride,
    v_cache_batch_stride,
    v_cache_token_stride,
    v_cache_head_stride,
    v_cache_column_stride,
    value_programs,
    rows,
    heads,
    length,
    text_tokens,
    tokens_per_frame,
    ring_frames,
    sink_frames,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
    HADAMARD: tl.constexpr,
):
    program = tl.program_id(0)
    if v_scale is not None:
        if program < value_programs:
            store_transposed(
                program,
                v,
                v_cache,
                v_scale,
                step,
                v_batch_stride,
                v_token_stride,
                v_head_stride,
                v_cache_batch_stride,
                v_cache_head_stride,
                v_cache_column_stride,
                heads,
                length,
                text_tokens,
                tokens_per_frame,
                ring_frames,
                sink_frames,
                HEAD_DIM,
                2 * WIDTH,
                KEYS,
            )
            return
        program -= value_programs
    batch, token, head, active, out = locate(program, rows, length, heads, HEAD_DIM, ROWS, ACROSS)

    # Load everything before the first use
    frame = tl.load(step) + token // tokens_per_frame
    q_at = offsets(batch, token, head, q_batch_stride, q_token_stride, q_head_stride)
    k_at = offsets(batch, token, head, k_batch_stride, k_token_stride, k_head_stride)
    q_low, q_high = load_halves(q, q_at, active, HEAD_DIM, WIDTH)
    k_low, k_high = load_halves(k, k_at, active, HEAD_DIM, WIDTH)
    c, s = None, None
    if cos is not None:
        c, s = None, None
        if cos is not None:
            c, s = load_angles(cos, sin, token, active, HEAD_DIM, WIDTH, WIDE)
    key = first_key(frame, text_tokens, tokens_per_frame, ring_frames, sink_frames)
    key += token % tokens_per_frame

    if v_scale is None:
        # Value: a copy, bit for bit
        v_at = offsets(batch, token, head, v_batch_stride, v_token_stride, v_head_stride)
        v_low, v_high = load_halves(v, v_at, active, HEAD_DIM, WIDTH)
        v_at = offsets(
            batch, key, head, v_cache_batch_stride, v_cache_token_stride, v_cache_head_stride
        )
        store_halves(v_cache, v_at, v_low, v_high, active, HEAD_DIM, WIDTH)

    k_at = offsets(
        batch, key, head, k_cache_batch_stride, k_cache_token_stride, k_cache_head_stride
    )
    dtype: tl.constexpr = k_low.dtype
    k_low, k_high = normalise(
        k_low, k_high, k_weight, head, heads, EPS, HEAD_DIM, WIDTH, ACROSS, WIDE
    )
    low, high = rotate(k_low, k_high, c, s)
    if HADAMARD:
        low, high = multiply_hadamard(low, high, dtype, HEAD_DIM)
    if k_scale is not None:
        scale = tl.load(k_scale + head, mask=head < heads, other=1.0)[:, None]
        low, high = to_e4m3(low, scale), to_e4m3(high, scale)
    store_halves(k_cache, k_at, low, high, active, HEAD_DIM, WIDTH)

    store_queries(
        q_low,
        q_high,
        q_weight,
        c,
        s,
        cos_sink,
        sin_sink,
        q_out,
        q_sink_out,
        out,
        token,
        head,
        active,
        heads,
        EPS,
        HEAD_DIM,
        WIDTH,
        ACROSS,
        WIDE,
        HADAMARD,
    )


def limit(q, k=None, v=None, k_cache=None, *rest) -> str | None:
    """Return why the kernel does not take this cache, None if it does."""
    if k_cache is None or k_cache.dtype not in QUANTISED:
        return cache_limit(q, k_cache)
    if q.dtype == torch.float64:
        return "q: expected at most float32 with a cache of float8, got torch.float64"
    if q.is_cuda and capability_of(q.device) < FLOAT8_CAPABILITY:
        return f"k_cache: float8 needs a device of sm_89 or later, got {capability_of(q.device)}"
    if rest and rest[-1] and not 32 <= q.shape[-1] <= 512:
        return f"q: expected a head_dim of 32 to 512 with use_hadamard, got {q.shape[-1]}"
    return None


def forward(q, k, v, k_cache, v_cache, step, q_weight, k_weight, *arguments):
    *arguments, k_scale, v_scale, use_hadamard = arguments
    *tables, eps, text_tokens, tokens_per_frame, window_frames, sink_frames = arguments
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q_sink = q.new_empty(0 if tables[2] is None else q.shape)
    rows, constants = tiling(q, k_weight if q_weight is None else q_weight, eps)
    value_programs = 0
    if v_scale is not None:
        frames = q.shape[1] // tokens_per_frame
        tiles = triton.cdiv(tokens_per_frame, KEYS)
        value_programs = q.shape[0] * q.shape[2] * frames * tiles
    if q.numel():
        with torch.cuda.device_of(q):
            kv_append_kernel[(value_programs + triton.cdiv(rows, constants["ROWS"]),)](
                q,
                k,
                v,
                k_cache,
                v_cache,
                step,
                *dense_or_none((q_weight, k_weight, *tables)),
                k_scale,
                v_scale,
                q_out,
                q_sink,
                *(stride for x in (q, k, v, k_cache, v_cache) for stride in x.stride()[:3]),
                v_cache.stride(3),
                value_programs,
                rows,
                q.shape[2],
                q.shape[1],
                text_tokens,
                tokens_per_frame,
                window_frames + 1,
                sink_frames,
                KEYS=KEYS,
                HADAMARD=use_hadamard,
                **constants,
            )
    return q_out, q_sink
