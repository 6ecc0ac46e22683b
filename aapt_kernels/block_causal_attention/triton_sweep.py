"""Steps that the Triton kernels of both directions share: the loop over visible keys, and the way
of rows back to memory."""

import triton
import triton.language as tl

from .triton_mask import clean_place, edge_place


@triton.jit
def sweep(
    STEP: tl.constexpr,
    state,
    queries,
    k,
    v,
    a,
    b,
    c,
    shown,
    layout,
    k_stride,
    v_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Run STEP, `attend` or `differentiate`, on all keys of three intervals, each `cut`."""
    lane = tl.arange(0, KEYS)
    for i in range(a[3] + b[3] + c[3]):
        key = clean_place(i, a, b, c, KEYS) + lane
        state = STEP(
            state,
            queries,
            k,
            v,
            key,
            None,
            shown,
            layout,
            k_stride,
            v_stride,
            scale,
            HEAD_DIM,
            WIDTH,
        )
    for i in tl.range(a[4] - a[3] + b[4] - b[3] + c[4] - c[3], num_stages=1):
        at, end = edge_place(i, a, b, c, KEYS)
        key = at + lane
        state = STEP(
            state,
            queries,
            k,
            v,
            key,
            end,
            shown,
            layout,
            k_stride,
            v_stride,
            scale,
            HEAD_DIM,
            WIDTH,
        )
    return state


@triton.jit
def store_rows(x, tile, batch, head, row, first, length, heads, HEAD_DIM, WIDTH):
    """Store rows first ... length - 1 of a tile to a dense (B, length, heads, HEAD_DIM)."""
    column = tl.arange(0, WIDTH)[None, :]
    active = (row >= first) & (row < length)
    at = ((batch * length + row) * heads + head)[:, None] * HEAD_DIM + column
    tl.store(x + at, tile, mask=active[:, None] & (column < HEAD_DIM))
