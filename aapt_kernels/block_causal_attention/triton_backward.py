"""Block-causal attention backward in Triton. Queries and keys have a kernel each, which computes
the scores again: nothing is added up in memory, and results do not depend on timing."""

import triton
import triton.language as tl

from ..triton_tiles import dot, load_rows, zero_or_nan
from .triton_mask import (
    INTEGERS,
    clean_place,
    cut,
    edge_place,
    hide,
    rows_that_see,
    text_length,
    visible_tiles,
)
from .triton_sweep import store_rows, sweep


@triton.jit(do_not_specialize=["rows"])
def stats_kernel(
    out,
    dout,
    lse,
    dlse,
    stats,
    heads,
    rows,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write stats (2, B, H, rows): lse in units of log2, +inf if a row sees nothing; and
    rowsum(dout out) - dlse. All tensors are dense."""
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    active = row < rows
    start = (batch * rows * heads + head) * HEAD_DIM
    out_tile = load_rows(out + start, row, heads * HEAD_DIM, active, HEAD_DIM, WIDTH)
    dout_tile = load_rows(dout + start, row, heads * HEAD_DIM, active, HEAD_DIM, WIDTH)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    lse_row = tl.load(lse + pair * rows + row, mask=active, other=0)
    nothing = lse_row == float("-inf")
    if dlse is not None:
        delta -= tl.where(nothing, 0, tl.load(dlse + pair * rows + row, mask=active, other=0))
    in_log2 = tl.where(nothing, float("inf"), lse_row * 1.4426950408889634)
    tl.store(stats + pair * rows + row, in_log2, mask=active)
    tl.store(stats + (tl.num_programs(1) + pair) * rows + row, delta, mask=active)


@triton.jit
def differentiate(
    state, queries, k, v, key, end, shown, layout, k_stride, v_stride, scale, HEAD_DIM, WIDTH
):
    """Add one tile of keys to dq, as `attend` adds it to out: state is (sums,), queries
    (q, dout, lse, delta)."""
    q, dout, lse, delta = queries
    active, sound, broken = None, None, None
    if end is not None:
        active = key < end
        broken = zero_or_nan(k, key, k_stride, active, HEAD_DIM, WIDTH)
        sound = active & (broken == 0)
    k_tile = load_rows(k, key, k_stride, sound, HEAD_DIM, WIDTH)
    v_tile = load_rows(v, key, v_stride, active, HEAD_DIM, WIDTH)
    s = dot(q, tl.trans(k_tile)) * scale
    if end is not None:
        s = hide(s + broken[None, :], key, end, shown, layout)
    p = tl.exp2(s - lse[:, None])
    ds = p * (dot(dout, tl.trans(v_tile)) - delta[:, None])
    if end is not None:  # a value that is hidden may be NaN
        ds = tl.where(p == 0, 0, ds)
    return (dot(ds.to(k_tile.dtype), k_tile, state[0]),)


@triton.jit(do_not_specialize=INTEGERS)
def queries_backward_kernel(
    q,
    k,
    v,
    dout,
    stats,
    text_lens,
    q_sink,
    dq,
    dq_sink,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    q_sink_batch_stride,
    q_sink_token_stride,
    q_sink_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    heads,
    rows,
    text,
    tokens,
    frames,
    before,
    window,
    sinks,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write dq and dq_sink of a tile of query rows; scale is the softmax's."""
    layout = (text, tokens, frames, before, window, sinks)
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    k += batch * k_batch_stride + head * k_head_stride
    v += batch * v_batch_stride + head * v_head_stride
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    active = row < rows
    length = text_length(text_lens, batch, text)
    split: tl.constexpr = q_sink is not None
    shown = tl.minimum(row, rows - 1)
    tiles = visible_tiles(shown, length, layout, split, KEYS)
    text_tiles, sink_tiles, recent_tiles, nothing = tiles

    dout += (batch * rows * heads + head) * HEAD_DIM
    dout_tile = load_rows(dout, row, heads * HEAD_DIM, active, HEAD_DIM, WIDTH)
    lse = tl.load(stats + pair * rows + row, mask=active, other=float("inf"))
    delta = tl.load(stats + (tl.num_programs(1) + pair) * rows + row, mask=active, other=0)
    if split:
        q_sink += batch * q_sink_batch_stride + head * q_sink_head_stride
        in_frame = active & (row >= text)
        q_tile = load_rows(q_sink, row - text, q_sink_token_stride, in_frame, HEAD_DIM, WIDTH)
        (result,) = sweep(
            differentiate,
            (tl.zeros((ROWS, WIDTH), tl.float32),),
            (q_tile, dout_tile, lse, delta),
            k,
            v,
            nothing,
            sink_tiles,
            nothing,
            shown,
            layout,
            k_token_stride,
            v_token_stride,
            scale * 1.4426950408889634,
            HEAD_DIM,
            WIDTH,
            KEYS,
        )
        frame_rows = rows - text
        store_rows(
            dq_sink,
            result * scale,
            batch,
            head,
            row - text,
            0,
            frame_rows,
            heads,
            HEAD_DIM,
            WIDTH,
        )
        sink_tiles = nothing
    q += batch * q_batch_stride + head * q_head_stride
    q_tile = load_rows(q, row, q_token_stride, active, HEAD_DIM, WIDTH)
    (result,) = sweep(
        differentiate,
        (tl.zeros((ROWS, WIDTH), tl.float32),),
        (q_tile, dout_tile, lse, delta),
        k,
        v,
        text_tiles,
        sink_tiles,
        recent_tiles,
        shown,
        layout,
        k_token_stride,
        v_token_stride,
        scale * 1.4426950408889634,
        HEAD_DIM,
        WIDTH,
        KEYS,
    )
    store_rows(dq, result * scale, batch, head, row, 0, rows, heads, HEAD_DIM, WIDTH)


@triton.jit
def gather_keys(
    state,
    k_tile,
    v_tile,
    q,
    dout,
    lse,
    delta,
    row,
    stop,
    rows,
    first,
    seen_by,
    q_stride,
    dout_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add to dk / softmax scale and dv of a tile of keys what one tile of query rows gives.

    At an edge `stop` is where the query rows end, elsewhere None. `first`: the row of the query
    that is the first of q. A row whose softmax or gradient is broken counts as zero, so that it
    does not reach a key that it does not see, and makes each key that it sees NaN.
    """
    dk, dv = state
    active = None
    if stop is None:
        lse_row, delta_row = tl.load(lse + row), tl.load(delta + row)
    else:
        lse_row = tl.load(lse + row, mask=row < rows, other=float("inf"))
        delta_row = tl.load(delta + row, mask=row < rows, other=0)
        sound = (tl.abs(lse_row) < float("inf")) & (tl.abs(delta_row) < float("inf"))
        active = (row >= first) & (row < rows) & sound
    q_tile = load_rows(q, row - first, q_stride, active, HEAD_DIM, WIDTH)
    s = dot(k_tile, tl.trans(q_tile)) * scale
    p = tl.exp2(s - lse_row[None, :])
    if stop is not None:
        seen = (row[None, :] >= seen_by[0][:, None]) & (row[None, :] < seen_by[1][:, None])
        p = tl.where(seen, p + tl.where(sound, 0, float("nan"))[None, :], 0)
    dout_tile = load_rows(dout, row, dout_stride, active, HEAD_DIM, WIDTH)
    dv = dot(p.to(dout_tile.dtype), dout_tile, dv)
    ds = p * (dot(v_tile, tl.trans(dout_tile)) - delta_row[None, :])
    if stop is not None:
        ds = tl.where(p == 0, 0, ds)
    return dot(ds.to(q_tile.dtype), q_tile, dk), dv


@triton.jit(do_not_specialize=INTEGERS + ["head_end", "sink_end"])
def keys_backward_kernel(
    q,
    k,
    v,
    dout,
    stats,
    text_lens,
    q_sink,
    dk,
    dv,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    q_sink_batch_stride,
    q_sink_token_stride,
    q_sink_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    heads,
    rows,
    text,
    tokens,
    frames,
    before,
    window,
    sinks,
    key_rows,
    head_end,
    sink_end,
    scale,
    PREFIX_GRAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write dk and dv of a tile of keys.

    Tiles do not cross `sink_end` nor `head_end`. `head_end` is the end of the text if the sink has
    a query of its own, otherwise the end of the sink.
    """
    layout = (text, tokens, frames, before, window, sinks)
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    tile = tl.program_id(0)
    after_head = tile - tl.cdiv(head_end, KEYS)
    after_sink = after_head - tl.cdiv(sink_end - head_end, KEYS)
    in_head, in_rest = after_head < 0, after_sink >= 0
    start = head_end + after_head * KEYS
    start = tl.where(in_head, tile * KEYS, tl.where(in_rest, sink_end + after_sink * KEYS, start))
    end = tl.where(in_head, head_end, tl.where(in_rest, key_rows, sink_end))
    key = start + tl.arange(0, KEYS)
    active = key < end

    begin, stop = rows_that_see(key, end, text_length(text_lens, batch, text), rows, layout)
    first_row = tl.min(tl.where(stop > begin, begin, rows), 0)
    last_row = tl.max(tl.where(stop > begin, stop, 0), 0)
    prefix_end = text + before * tokens
    if not PREFIX_GRAD:
        hidden = (start >= text) & (tl.minimum(end, start + KEYS) <= prefix_end)
        last_row = tl.where(hidden, 0, last_row)
    first_tile = first_row // ROWS * ROWS
    a = cut(first_tile, tl.max(begin, 0), tl.min(stop, 0), last_row, ROWS)
    nothing = cut(0, 0, 0, 0, ROWS)

    q += batch * q_batch_stride + head * q_head_stride
    q_stride = q_token_stride
    first = 0
    if q_sink is not None:
        in_sink = (start >= head_end) & (start < sink_end)
        if in_sink:
            q = q_sink + batch * q_sink_batch_stride + head * q_sink_head_stride
            q_stride = q_sink_token_stride
            first = text
    k += batch * k_batch_stride + head * k_head_stride
    v += batch * v_batch_stride + head * v_head_stride
    dout += (batch * rows * heads + head) * HEAD_DIM
    lse = stats + pair * rows
    delta = stats + (tl.num_programs(1) + pair) * rows
    k_tile = load_rows(k, key, k_token_stride, active, HEAD_DIM, WIDTH)
    v_tile = load_rows(v, key, v_token_stride, active, HEAD_DIM, WIDTH)
    state = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    lane = tl.arange(0, ROWS)
    seen_by = (begin, stop)
    for i in range(a[3]):
        row = clean_place(i, a, nothing, nothing, ROWS) + lane
        state = gather_keys(
            state,
            k_tile,
            v_tile,
            q,
            dout,
            lse,
            delta,
            row,
            None,
            rows,
            first,
            seen_by,
            q_stride,
            heads * HEAD_DIM,
            scale * 1.4426950408889634,
            HEAD_DIM,
            WIDTH,
        )
    for i in tl.range(a[4] - a[3], num_stages=1):
        at, row_end = edge_place(i, a, nothing, nothing, ROWS)
        state = gather_keys(
            state,
            k_tile,
            v_tile,
            q,
            dout,
            lse,
            delta,
            at + lane,
            row_end,
            rows,
            first,
            seen_by,
            q_stride,
            heads * HEAD_DIM,
            scale * 1.4426950408889634,
            HEAD_DIM,
            WIDTH,
        )
    dk_tile, dv_tile = state
    if not PREFIX_GRAD:
        taken = ((key < text) | (key >= prefix_end))[:, None]
        dk_tile = tl.where(taken, dk_tile, 0)
        dv_tile = tl.where(taken, dv_tile, 0)
    column = tl.arange(0, WIDTH)[None, :]
    at = ((batch * key_rows + key) * heads + head)[:, None] * HEAD_DIM + column
    mask = active[:, None] & (column < HEAD_DIM)
    tl.store(dk + at, dk_tile * scale, mask=mask)
    tl.store(dv + at, dv_tile, mask=mask)
