"""Norm and rotation for any GPU that Triton serves: one launch forward, one backward."""

import torch
import triton
import triton.language as tl

from ..precision import wide
from ..triton_rows import (
    COUNTS,
    dense_or_none,
    inverse_rms,
    load_angles,
    load_halves,
    load_weight,
    locate,
    mean,
    multiprocessors,
    normalise,
    offsets,
    rotate,
    store_halves,
    store_queries,
    tiling,
)


@triton.jit
def rotate_back(low, high, cos, sin):
    if cos is not None:
        low, high = low * cos + high * sin, high * cos - low * sin
    return low, high


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_kernel(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    cos_sink,
    sin_sink,
    q_out,
    k_out,
    q_sink_out,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    rows,
    length,
    heads,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, token, head, active, out = locate(
        tl.program_id(0), rows, length, heads, HEAD_DIM, ROWS, ACROSS
    )

    # Load everything before the first use
    q_at = offsets(batch, token, head, q_batch_stride, q_token_stride, q_head_stride)
    k_at = offsets(batch, token, head, k_batch_stride, k_token_stride, k_head_stride)
    q_low, q_high = load_halves(q, q_at, active, HEAD_DIM, WIDTH)
    k_low, k_high = load_halves(k, k_at, active, HEAD_DIM, WIDTH)
    c, s = None, None
    if cos is not None:
        c, s = None, None
        if cos is not None:
            c, s = load_angles(cos, sin, token, active, HEAD_DIM, WIDTH, WIDE)

    k_low, k_high = normalise(
        k_low, k_high, k_weight, head, heads, EPS, HEAD_DIM, WIDTH, ACROSS, WIDE
    )
    low, high = rotate(k_low, k_high, c, s)
    store_halves(k_out, out, low, high, active, HEAD_DIM, WIDTH)

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


@triton.jit
def normalise_backward(
    dn_low,
    dn_high,
    x,
    at,
    weight,
    dx,
    out,
    sum_low,
    sum_high,
    head,
    active,
    heads,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store dx and return the sums of dweight, one per row and column, with these rows added."""
    if weight is not None:
        low, high = load_halves(x, at, active, HEAD_DIM, WIDTH)
        low, high = low.to(WIDE), high.to(WIDE)
        inverse = inverse_rms(low, high, heads, EPS, HEAD_DIM, ACROSS)
        # NOTE: an inactive row has an infinite inverse if eps is 0
        low, high = tl.where(active, low * inverse, 0), tl.where(active, high * inverse, 0)
        sum_low += dn_low * low
        sum_high += dn_high * high
        weight_low, weight_high = load_weight(weight, head, heads, HEAD_DIM, WIDTH, ACROSS)
        dn_low *= weight_low.to(WIDE)
        dn_high *= weight_high.to(WIDE)
        projection = mean(dn_low * low, dn_high * high, heads, HEAD_DIM, ACROSS)
        dn_low = (dn_low - low * projection) * inverse
        dn_high = (dn_high - high * projection) * inverse
    store_halves(dx, out, dn_low, dn_high, active, HEAD_DIM, WIDTH)
    return sum_low, sum_high


@triton.jit
def store_sums(
    dweight,
    program,
    low,
    high,
    head,
    heads,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
):
    if dweight is not None:
        if ACROSS:
            at = ((program * heads + head) * HEAD_DIM)[:, None]
            store_halves(dweight, at, low, high, (head < heads)[:, None], HEAD_DIM, WIDTH)
        else:
            low = tl.sum(low, axis=0, keep_dims=True)
            high = tl.sum(high, axis=0, keep_dims=True)
            store_halves(dweight, program * HEAD_DIM, low, high, True, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_backward_kernel(
    dq,
    dk,
    dq_sink,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    cos_sink,
    sin_sink,
    dq_out,
    dk_out,
    dq_weight,
    dk_weight,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    rows,
    length,
    heads,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the gradients of q, k and both weights; incoming gradients are dense.

    A program sums its share of dweight in a fixed order and stores it to its own row:
    (programs, *weight.shape).
    """
    program = tl.program_id(0)
    q_sum_low = tl.zeros((ROWS, WIDTH), WIDE)
    q_sum_high = tl.zeros((ROWS, WIDTH), WIDE)
    k_sum_low = tl.zeros((ROWS, WIDTH), WIDE)
    k_sum_high = tl.zeros((ROWS, WIDTH), WIDE)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        batch, token, head, active, out = locate(block, rows, length, heads, HEAD_DIM, ROWS, ACROSS)

        c, s = None, None
        if cos is not None:
            c, s = load_angles(cos, sin, token, active, HEAD_DIM, WIDTH, WIDE)
        low, high = load_halves(dk, out, active, HEAD_DIM, WIDTH)
        low, high = rotate_back(low.to(WIDE), high.to(WIDE), c, s)
        at = offsets(batch, token, head, k_batch_stride, k_token_stride, k_head_stride)
        k_sum_low, k_sum_high = normalise_backward(
            low,
            high,
            k,
            at,
            k_weight,
            dk_out,
            out,
            k_sum_low,
            k_sum_high,
            head,
            active,
            heads,
            EPS,
            HEAD_DIM,
            WIDTH,
            ACROSS,
            WIDE,
        )

        low, high = load_halves(dq, out, active, HEAD_DIM, WIDTH)
        low, high = rotate_back(low.to(WIDE), high.to(WIDE), c, s)
        if dq_sink is not None:
            c, s = load_angles(cos_sink, sin_sink, token, active, HEAD_DIM, WIDTH, WIDE)
            sink_low, sink_high = load_halves(dq_sink, out, active, HEAD_DIM, WIDTH)
            sink_low, sink_high = rotate_back(sink_low.to(WIDE), sink_high.to(WIDE), c, s)
            low, high = low + sink_low, high + sink_high
        at = offsets(batch, token, head, q_batch_stride, q_token_stride, q_head_stride)
        q_sum_low, q_sum_high = normalise_backward(
            low,
            high,
            q,
            at,
            q_weight,
            dq_out,
            out,
            q_sum_low,
            q_sum_high,
            head,
            active,
            heads,
            EPS,
            HEAD_DIM,
            WIDTH,
            ACROSS,
            WIDE,
        )
    head = tl.arange(0, ROWS)
    store_sums(dq_weight, program, q_sum_low, q_sum_high, head, heads, HEAD_DIM, WIDTH, ACROSS)
    store_sums(dk_weight, program, k_sum_low, k_sum_high, head, heads, HEAD_DIM, WIDTH, ACROSS)


def forward(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps):
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    q_sink = q.new_empty(0 if cos_sink is None else q.shape)
    rows, constants = tiling(q, k_weight if q_weight is None else q_weight, eps)
    if q.numel():
        with torch.cuda.device_of(q):
            qk_norm_rope_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                q,
                k,
                *dense_or_none((q_weight, k_weight, cos, sin, cos_sink, sin_sink)),
                q_out,
                k_out,
                q_sink,
                *q.stride()[:3],
                *k.stride()[:3],
                rows,
                *q.shape[1:3],
                **constants,
            )
    return q_out, k_out, q_sink


def backward(dq, dk, dq_sink, q, k, q_weight, k_weight, *tables_and_eps):
    *tables, eps = tables_and_eps
    rows, constants = tiling(q, k_weight if q_weight is None else q_weight, eps)
    programs = min(triton.cdiv(rows, constants["ROWS"]), 4 * multiprocessors(q))
    dq_out, dk_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    weights = (q_weight, k_weight)
    partial = [
        None if w is None else q.new_empty((programs, *w.shape), dtype=wide(q.dtype))
        for w in weights
    ]
    if q.numel():
        with torch.cuda.device_of(q):
            qk_norm_rope_backward_kernel[(programs,)](
                *dense_or_none((dq, dk, dq_sink)),
                q,
                k,
                *dense_or_none((*weights, *tables)),
                dq_out,
                dk_out,
                *partial,
                *q.stride()[:3],
                *k.stride()[:3],
                rows,
                *q.shape[1:3],
                **constants,
            )
    dweights = [
        q.new_empty(0) if w is None else p.sum(0).to(w.dtype)
        for w, p in zip(weights, partial, strict=True)
    ]
    return dq_out, dk_out, *dweights
