"""Block-causal attention forward and backward, for any GPU that Triton serves.

The forward and the gradient of the queries go through the keys that a tile of query rows sees, the
gradients of the keys through the query rows that see a tile of keys; which ones those are, a
program finds out from the integers of the layout. Tiles that every row sees whole come first, in a
loop without a mask, then those at an edge. Nothing is added in memory, so results do not depend on
timing. csrc/block_causal_attention/mask.h has the same mask in words.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..cached_attention.triton_kernels import LOG2_E, dot, limit, load_rows
from ..layout import FrameLayout

__all__ = ["backward", "forward", "limit"]

STATS_ROWS = 16


class Config(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int


# By bytes per element and padded head_dim: the forward, the gradients of keys, that of queries.
CONFIGS = {
    (2, 32): (Config(128, 64, 4, 3), Config(64, 128, 4, 2), Config(128, 64, 4, 2)),
    (2, 64): (Config(128, 64, 4, 3), Config(64, 128, 8, 2), Config(128, 64, 8, 2)),
    (2, 128): (Config(128, 64, 8, 3), Config(32, 128, 8, 2), Config(128, 32, 8, 2)),
    (4, 32): (Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    (4, 64): (Config(64, 16, 4, 2), Config(16, 32, 8, 1), Config(32, 16, 8, 1)),
    (4, 128): (Config(16, 32, 8, 2), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


@triton.jit
def views(row, text, tokens, before, window, sinks):
    """sink_end, window_begin, window_end of query rows, as key rows; nothing for text."""
    in_frame = row >= text
    position = before + tl.maximum(row - text, 0) // tokens
    shown = tl.minimum(sinks, position + 1)
    oldest = tl.maximum(position - window, shown)
    sink_end = text + tl.where(in_frame, shown * tokens, 0)
    window_begin = text + tl.where(in_frame, oldest * tokens, 0)
    window_end = text + tl.where(in_frame, (position + 1) * tokens, 0)
    return sink_end, window_begin, window_end


@triton.jit
def text_length(text_lens, batch, text):
    if text_lens is None:
        return text
    else:
        return tl.minimum(tl.maximum(tl.load(text_lens + batch), 0), text).to(tl.int32)


@triton.jit
def cut(begin, clean_begin, clean_end, end, TILE: tl.constexpr):
    """An interval in tiles from `begin` on: its begin and end, how many tiles come before the clean
    ones, how many those are, and how many all are. Clean is a tile within the clean interval."""
    count = tl.maximum(tl.cdiv(end - begin, TILE), 0)
    ahead = tl.minimum(tl.maximum(tl.cdiv(clean_begin - begin, TILE), 0), count)
    clean = tl.maximum((tl.minimum(clean_end, end) - begin) // TILE - ahead, 0)
    return begin, end, ahead, clean, count


@triton.jit
def clean_place(index, here, there, TILE: tl.constexpr):
    """Where the clean tile of this index begins, those of both intervals counted."""
    in_here = index < here[3]
    return tl.where(
        in_here,
        here[0] + (here[2] + index) * TILE,
        there[0] + (there[2] + index - here[3]) * TILE,
    )


@triton.jit
def edge_place(index, here, there, TILE: tl.constexpr):
    """Where the edge tile of this index begins, and where its interval ends."""
    edges = here[4] - here[3]
    in_here = index < edges
    within = tl.where(in_here, index, index - edges)
    ahead = tl.where(in_here, here[2], there[2])
    within += tl.where(within < ahead, 0, tl.where(in_here, here[3], there[3]))
    begin = tl.where(in_here, here[0], there[0])
    return begin + within * TILE, tl.where(in_here, here[1], there[1])


@triton.jit
def visible_keys(row, rows, length, text, tokens, before, window, sinks, SPLIT: tl.constexpr):
    """What query rows see: per row head_end (all keys below, but for padding), window_begin and
    window_end; and the intervals of text, sink and window as (begin, clean_begin, clean_end, end).
    Joined where they touch for all rows, unless SPLIT, for a sink with a query of its own."""
    row = tl.minimum(row, rows - 1)
    sink_end, window_begin, window_end = views(row, text, tokens, before, window, sinks)
    last_sink = tl.max(sink_end, 0)
    last = tl.max(window_end, 0)
    # The first window is that of the first frame
    oldest = tl.min(tl.where(row >= text, window_begin, last), 0)
    start = tl.maximum(oldest, last_sink)
    clean_sink = tl.min(sink_end, 0)
    clean_start = tl.max(window_begin, 0)
    clean_last = tl.min(window_end, 0)
    head_end = tl.where(window_begin == sink_end, window_end, sink_end)
    joined = clean_start == last_sink
    if SPLIT:
        joined = joined & False
    sink_begin = tl.where((length == text) & (not SPLIT), 0, text)
    text_end = tl.where(sink_begin < text, 0, length)
    sink_stop = tl.where(joined, last, last_sink)
    sink_clean_stop = tl.where(joined, clean_last, clean_sink)
    start = tl.where(joined, last, start)
    return (
        (head_end, window_begin, window_end),
        (text_end,),
        (sink_begin, sink_begin, sink_clean_stop, sink_stop),
        (start, clean_start, clean_last, last),
    )


@triton.jit
def hide(s, key, end, view):
    """Scores (rows, keys) at an edge: what a row does not see, or lies beyond `end`, is -inf."""
    head_end, window_begin, window_end = view
    key = key[None, :]
    seen = (key < head_end[:, None]) | (
        (key >= window_begin[:, None]) & (key < window_end[:, None])
    )
    return tl.where(seen & (key < end), s, float("-inf"))


@triton.jit
def attend(
    result,
    highest,
    total,
    q,
    k,
    v,
    key,
    end,
    view,
    k_stride,
    v_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of keys; at an edge `end` is where they end, else None."""
    active = None
    if end is not None:
        active = key < end
    k_tile = load_rows(k, key, k_stride, active, HEAD_DIM, WIDTH)
    s = dot(q, tl.trans(k_tile))
    if end is not None:
        s = hide(s, key, end, view)
    before = highest
    highest = tl.maximum(before, tl.max(s, 1) * scale)
    offset = highest
    if end is not None:
        offset = tl.where(highest == float("-inf"), 0, highest)
    p = tl.exp2(s * scale - offset[:, None])
    decay = tl.exp2(before - offset)
    total = total * decay + tl.sum(p, 1)
    v_tile = load_rows(v, key, v_stride, active, HEAD_DIM, WIDTH)
    result = dot(p.to(v_tile.dtype), v_tile, result * decay[:, None])
    return result, highest, total


@triton.jit
def sweep(
    result,
    highest,
    total,
    q,
    k,
    v,
    here,
    there,
    view,
    k_stride,
    v_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """All keys of two intervals."""
    lane = tl.arange(0, KEYS)
    for i in range(here[3] + there[3]):
        key = clean_place(i, here, there, KEYS) + lane
        result, highest, total = attend(
            result,
            highest,
            total,
            q,
            k,
            v,
            key,
            None,
            view,
            k_stride,
            v_stride,
            scale,
            HEAD_DIM,
            WIDTH,
        )
    for i in tl.range(here[4] - here[3] + there[4] - there[3], num_stages=1):
        at, end = edge_place(i, here, there, KEYS)
        result, highest, total = attend(
            result,
            highest,
            total,
            q,
            k,
            v,
            at + lane,
            end,
            view,
            k_stride,
            v_stride,
            scale,
            HEAD_DIM,
            WIDTH,
        )
    return result, highest, total


@triton.jit
def differentiate(
    result,
    q,
    dout,
    lse,
    delta,
    k,
    v,
    key,
    end,
    view,
    k_stride,
    v_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dq / softmax scale of one tile of keys; as `attend`."""
    active = None
    if end is not None:
        active = key < end
    k_tile = load_rows(k, key, k_stride, active, HEAD_DIM, WIDTH)
    v_tile = load_rows(v, key, v_stride, active, HEAD_DIM, WIDTH)
    s = dot(q, tl.trans(k_tile))
    if end is not None:
        s = hide(s, key, end, view)
    p = tl.exp2(s * scale - lse[:, None])
    ds = p * (dot(dout, tl.trans(v_tile)) - delta[:, None])
    return dot(ds.to(k_tile.dtype), k_tile, result)


@triton.jit
def sweep_backward(
    result,
    q,
    dout,
    lse,
    delta,
    k,
    v,
    here,
    there,
    view,
    k_stride,
    v_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    lane = tl.arange(0, KEYS)
    for i in range(here[3] + there[3]):
        key = clean_place(i, here, there, KEYS) + lane
        result = differentiate(
            result,
            q,
            dout,
            lse,
            delta,
            k,
            v,
            key,
            None,
            view,
            k_stride,
            v_stride,
            scale,
            HEAD_DIM,
            WIDTH,
        )
    for i in tl.range(here[4] - here[3] + there[4] - there[3], num_stages=1):
        at, end = edge_place(i, here, there, KEYS)
        result = differentiate(
            result,
            q,
            dout,
            lse,
            delta,
            k,
            v,
            at + lane,
            end,
            view,
            k_stride,
            v_stride,
            scale,
            HEAD_DIM,
            WIDTH,
        )
    return result
