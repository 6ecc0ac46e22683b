"""Norm, rotation and the write into the cache slot that the counter on the device names: one launch
per layer and step, for any GPU that Triton serves (docs/method.md#4, #5)."""

import torch
import triton
import triton.language as tl

from ..triton_rows import (
    dense_or_none,
    load_angles,
    load_halves,
    locate,
    normalise,
    offsets,
    rotate,
    store_halves,
    store_queries,
    tiling,
)

INTEGERS = ["rows", "text_tokens", "tokens_per_frame", "ring_frames", "sink_frames"]


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
    rows,
    heads,
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
):
    batch, token, head, active, out = locate(
        tl.program_id(0), rows, tokens_per_frame, heads, HEAD_DIM, ROWS, ACROSS
    )

    # Load everything before the first use
    frame = tl.load(step)
    q_at = offsets(batch, token, head, q_batch_stride, q_token_stride, q_head_stride)
    k_at = offsets(batch, token, head, k_batch_stride, k_token_stride, k_head_stride)
    v_at = offsets(batch, token, head, v_batch_stride, v_token_stride, v_head_stride)
    q_low, q_high = load_halves(q, q_at, active, HEAD_DIM, WIDTH)
    k_low, k_high = load_halves(k, k_at, active, HEAD_DIM, WIDTH)
    v_low, v_high = load_halves(v, v_at, active, HEAD_DIM, WIDTH)
    c, s = load_angles(cos, sin, token, active, HEAD_DIM, WIDTH, WIDE)

    in_ring = sink_frames + (frame - sink_frames) % ring_frames
    slot = tl.where(frame < sink_frames, frame, in_ring)
    key = text_tokens + slot * tokens_per_frame + token
    k_at = offsets(
        batch, key, head, k_cache_batch_stride, k_cache_token_stride, k_cache_head_stride
    )
    v_at = offsets(
        batch, key, head, v_cache_batch_stride, v_cache_token_stride, v_cache_head_stride
    )

    # Value: a copy, bit for bit
    store_halves(v_cache, v_at, v_low, v_high, active, HEAD_DIM, WIDTH)

    k_low, k_high = normalise(
        k_low, k_high, k_weight, head, heads, EPS, HEAD_DIM, WIDTH, ACROSS, WIDE
    )
    low, high = rotate(k_low, k_high, c, s)
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
    )


def forward(q, k, v, k_cache, v_cache, step, q_weight, k_weight, *arguments):
    *tables, eps, text_tokens, tokens_per_frame, window_frames, sink_frames = arguments
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q_sink = q.new_empty(0 if tables[2] is None else q.shape)
    rows, constants = tiling(q, k_weight if q_weight is None else q_weight, eps)
    if q.numel():
        with torch.cuda.device_of(q):
            kv_append_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                q,
                k,
                v,
                k_cache,
                v_cache,
                step,
                *dense_or_none((q_weight, k_weight, *tables)),
                q_out,
                q_sink,
                *(stride for x in (q, k, v, k_cache, v_cache) for stride in x.stride()[:3]),
                rows,
                q.shape[2],
                text_tokens,
                tokens_per_frame,
                window_frames + 1,
                sink_frames,
                **constants,
            )
    return q_out, q_sink
