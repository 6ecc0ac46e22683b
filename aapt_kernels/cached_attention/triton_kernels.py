"""Flash attention on the cache in place, for any GPU that Triton serves.

A program takes a tile of queries of one head and a share of the key tiles. It computes the keys
itself, from the counter and the text lengths on the device. Whole tiles of all intervals come
first, in a loop without a mask, then the ragged ends. If one pass over the queries would leave
multiprocessors idle, the keys are shared out, and a second kernel merges the parts in order.

A cache of float8 has two products of float8 (docs/method.md#16): queries are rounded once, weights
in every tile, whose sums are added in float32.
"""

import sys
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import capability_of
from ..checks import cache_limit
from ..kv_cache import QUANTISED
from ..precision import as_bits
from ..triton_rows import multiprocessors
from ..triton_tiles import (
    FLOAT8_CAPABILITY,
    LOG2_E,
    MOST_HEADS,
    dot,
    load_rows,
    narrow_e4m3,
    to_e4m3,
)

MAX_HEAD_DIM = 128
MAX_SPLITS = 32
MERGE_ROWS = 16


class Config(NamedTuple):
    """Tile of the kernel (query rows x keys), warps, stages; programs: per multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


# By bytes per element of the cache and padded head_dim: for any number of queries, for at most 64,
# at most 16. Float8 at 128: with more keys the kernel would need a stack on sm_89.
CONFIGS = {
    (1, 32): (Config(64, 64, 4, 3, 2), Config(64, 64, 4, 3, 2), Config(16, 64, 4, 4, 4)),
    (1, 64): (Config(128, 64, 8, 3, 1), Config(64, 64, 4, 3, 2), Config(16, 64, 4, 4, 4)),
    (1, 128): (Config(128, 32, 8, 3, 1), Config(64, 32, 8, 3, 1), Config(16, 32, 4, 3, 2)),
    (2, 32): (Config(128, 64, 4, 3, 2), Config(64, 64, 4, 3, 3), Config(16, 64, 4, 4, 4)),
    (2, 64): (Config(128, 64, 8, 3, 1), Config(64, 64, 4, 3, 3), Config(16, 64, 4, 4, 4)),
    (2, 128): (Config(128, 64, 8, 3, 1), Config(64, 64, 8, 3, 1), Config(16, 64, 4, 3, 2)),
    (4, 32): (Config(64, 32, 4, 2, 2), Config(64, 32, 4, 2, 2), Config(16, 32, 4, 2, 4)),
    (4, 64): (Config(64, 16, 4, 2, 2), Config(64, 16, 4, 2, 2), Config(16, 32, 4, 2, 3)),
    (4, 128): (Config(16, 32, 8, 2, 1), Config(16, 32, 8, 2, 1), Config(16, 32, 8, 2, 1)),
}


@triton.jit
def load_float8(x, row, stride, active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load (rows, WIDTH) of one head from the bytes of a float8 cache."""
    return load_rows(x, row, stride, active, HEAD_DIM, WIDTH).to(tl.float8e4nv, bitcast=True)


@triton.jit
def load_columns(
    x, row, stride, column_stride, active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Load (WIDTH, rows) of one head from the bytes of a float8 cache, where the rows of a column
    are side by side."""
    column = tl.arange(0, WIDTH)[:, None]
    at = x + column.to(tl.int64) * column_stride + row.to(tl.int64)[None, :] * stride
    mask = column < HEAD_DIM
    if active is not None:
        mask = mask & active[None, :]
    return tl.load(at, mask=mask, other=0).to(tl.float8e4nv, bitcast=True)


@triton.jit
def round_queries(q):
    """Return rows in float8 and their scales, (rows,): the norm over 448, which no element
    exceeds."""
    q = q.to(tl.float32)
    scale = tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-15) * (1 / 448)
    return to_e4m3(q, scale[:, None]), scale


@triton.jit
def attend_tile(
    result,
    highest,
    total,
    q,
    k,
    v,
    key,
    end,
    k_stride,
    v_stride,
    v_column_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Add one tile of keys, those below `end` (None: all). `highest` is in units of log2.

    FLOAT8: scale is (rows,), and `highest` is less by 8, so that weights are at most 2^8.
    """
    seen = None
    if end is not None:
        seen = key < end
    if FLOAT8:
        k_tile = load_float8(k, key, k_stride, seen, HEAD_DIM, WIDTH)
        scales = scale[:, None]
    else:
        k_tile = load_rows(k, key, k_stride, seen, HEAD_DIM, WIDTH)
        scales = scale
    s = dot(q, tl.trans(k_tile))
    if end is not None:
        s = tl.where(seen[None, :], s, float("-inf"))
    before = highest
    highest = tl.max(s, 1) * scale
    if FLOAT8:
        highest -= 8
    highest = tl.maximum(before, highest)
    p = tl.exp2(s * scales - highest[:, None])
    decay = tl.exp2(before - highest)
    total = total * decay + tl.sum(p, 1)
    result = result * decay[:, None]
    if FLOAT8:
        v_tile = load_columns(v, key, v_stride, v_column_stride, seen, HEAD_DIM, WIDTH)
        # Not added by the tensor core, which keeps 13 fraction bits
        result += dot(narrow_e4m3(p), tl.trans(v_tile))
    else:
        v_tile = load_rows(v, key, v_stride, seen, HEAD_DIM, WIDTH)
        result = dot(p.to(v_tile.dtype), v_tile, result)
    return result, highest, total


@triton.jit
def attend_tiles(
    result,
    highest,
    total,
    q,
    k,
    v,
    text,
    text_end,
    start,
    end,
    first,
    last,
    k_stride,
    v_stride,
    v_column_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Add tiles first ... last of the keys [text, text_end) and [start, end): the whole tiles of
    both intervals, then the ragged ends."""
    lane = tl.arange(0, KEYS)
    whole_here = (text_end - text) // KEYS
    whole_there = (end - start) // KEYS
    whole = whole_here + whole_there
    for tile in range(tl.minimum(first, whole), tl.minimum(last, whole)):
        at = tl.where(tile < whole_here, text + tile * KEYS, start + (tile - whole_here) * KEYS)
        result, highest, total = attend_tile(
            result,
            highest,
            total,
            q,
            k,
            v,
            at + lane,
            None,
            k_stride,
            v_stride,
            v_column_stride,
            scale,
            HEAD_DIM,
            WIDTH,
            FLOAT8,
        )
    for tile in tl.range(tl.maximum(first, whole), tl.maximum(last, whole), num_stages=1):
        here = (tile == whole) & (text_end > text + whole_here * KEYS)
        at = tl.where(here, text + whole_here * KEYS, start + whole_there * KEYS)
        result, highest, total = attend_tile(
            result,
            highest,
            total,
            q,
            k,
            v,
            at + lane,
            tl.where(here, text_end, end),
            k_stride,
            v_stride,
            v_column_stride,
            scale,
            HEAD_DIM,
            WIDTH,
            FLOAT8,
        )
    return result, highest, total


@triton.jit(do_not_specialize=["length", "text_tokens", "tokens_per_frame", "slots", "sink_frames"])
def cached_attention_kernel(
    q,
    k_cache,
    v_cache,
    step,
    text_lens,
    q_sink,
    k_scale,
    v_scale,
    out,
    lse,
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
    v_column_stride,
    out_split_stride,
    out_batch_stride,
    out_token_stride,
    out_head_stride,
    heads,
    length,
    text_tokens,
    tokens_per_frame,
    slots,
    sink_frames,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write out and lse of a tile of queries and a share of the keys.

    scale is positive and in units of log2; lse (splits, B, H, L) is dense.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    pair = tl.program_id(2)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    k = k_cache + batch * k_batch_stride + head * k_head_stride
    v = v_cache + batch * v_batch_stride + head * v_head_stride
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    active = row < length

    # What these frames see: [text, end), with q_sink in three intervals
    frames = tl.minimum(tl.load(step) + length // tokens_per_frame, slots).to(tl.int32)
    text = text_tokens - tl.minimum(tl.maximum(tl.load(text_lens + batch), 0), text_tokens).to(
        tl.int32
    )
    end = text_tokens + frames * tokens_per_frame
    if q_sink is not None:
        start = text_tokens + tl.minimum(frames, sink_frames) * tokens_per_frame
        sink_tiles = tl.cdiv(start - text_tokens, KEYS)
        text_end = text_tokens
    else:
        start, text_end = text, text
        sink_tiles = 0
    tiles = sink_tiles + tl.cdiv(text_end - text, KEYS) + tl.cdiv(end - start, KEYS)
    first = split * tiles // splits
    last = (split + 1) * tiles // splits

    result = tl.zeros((ROWS, WIDTH), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if q_sink is not None:
        q_sink += batch * q_sink_batch_stride + head * q_sink_head_stride
        q_tile = load_rows(q_sink, row, q_sink_token_stride, active, HEAD_DIM, WIDTH)
        tile_scale = scale
        if k_scale is not None:
            q_tile, tile_scale = round_queries(q_tile)
            tile_scale *= scale * tl.load(k_scale + head)
        result, highest, total = attend_tiles(
            result,
            highest,
            total,
            q_tile,
            k,
            v,
            0,
            0,
            text_tokens,
            start,
            tl.minimum(first, sink_tiles),
            tl.minimum(last, sink_tiles),
            k_token_stride,
            v_token_stride,
            v_column_stride,
            tile_scale,
            HEAD_DIM,
            WIDTH,
            KEYS,
            k_scale is not None,
        )
    q += batch * q_batch_stride + head * q_head_stride
    q_tile = load_rows(q, row, q_token_stride, active, HEAD_DIM, WIDTH)
    tile_scale = scale
    if k_scale is not None:
        q_tile, tile_scale = round_queries(q_tile)
        tile_scale *= scale * tl.load(k_scale + head)
    result, highest, total = attend_tiles(
        result,
        highest,
        total,
        q_tile,
        k,
        v,
        text,
        text_end,
        start,
        end,
        tl.maximum(first - sink_tiles, 0),
        tl.maximum(last - sink_tiles, 0),
        k_token_stride,
        v_token_stride,
        v_column_stride,
        tile_scale,
        HEAD_DIM,
        WIDTH,
        KEYS,
        k_scale is not None,
    )

    # A split without a tile has total 0: its part is zero and weighs nothing
    result = result / tl.where(total == 0, 1, total)[:, None]
    if v_scale is not None:
        result *= tl.load(v_scale + head)
    out += split.to(tl.int64) * out_split_stride + batch * out_batch_stride + head * out_head_stride
    column = tl.arange(0, WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * out_token_stride + column
    tl.store(out + at, result, mask=active[:, None] & (column < HEAD_DIM))
    lse += (split.to(tl.int64) * tl.num_programs(2) + pair) * length
    tl.store(lse + row, (highest + tl.log2(total)) * 0.6931471805599453, mask=active)


@triton.jit(do_not_specialize=["length", "rows"])
def merge_kernel(
    parts,
    part_lses,
    out,
    lse,
    heads,
    length,
    rows,
    splits,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge parts that saw disjoint keys into one attention: (splits, B, H, L, D) -> (B, L, H, D).

    rows is B H L, SPLITS a power of two.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    active = row < rows
    split = tl.arange(0, SPLITS)[None, :]
    given = active[:, None] & (split < splits)
    lses = tl.load(part_lses + split * rows + row[:, None], mask=given, other=float("-inf"))
    lses = tl.where(active[:, None], lses, 0)
    highest = tl.max(lses, 1)
    merged = highest + tl.log(tl.sum(tl.exp(lses - highest[:, None]), 1))
    tl.store(lse + row, merged, mask=active)

    column = tl.arange(0, WIDTH)[None, :]
    mask = active[:, None] & (column < HEAD_DIM)
    wide_row = row.to(tl.int64)[:, None]
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(splits):
        weight = tl.exp(tl.load(part_lses + i * rows + row, mask=active, other=0) - merged)
        at = (i * rows + wide_row) * HEAD_DIM + column
        result += weight[:, None] * tl.load(parts + at, mask=mask, other=0)
    batch, head, token = row // (heads * length), row // length % heads, row % length
    at = ((batch * length + token).to(tl.int64) * heads + head)[:, None] * HEAD_DIM + column
    tl.store(out + at, result, mask=mask)


def limit(q: Tensor, k_cache: Tensor | None = None, *_) -> str | None:
    """Return why the kernel does not take q and the cache, None if it does. It pads a head_dim to
    the next of 32, 64 and 128."""
    if q.shape[0] * q.shape[2] > MOST_HEADS:
        return f"it takes at most {MOST_HEADS} batch entries times heads, got {tuple(q.shape)}"
    if q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[-1] <= MAX_HEAD_DIM:
        if k_cache is None or k_cache.dtype not in QUANTISED:
            return cache_limit(q, k_cache)
        return float8_limit(q)
    return (
        f"it takes float16, bfloat16 or float32 with a head_dim up to {MAX_HEAD_DIM}, "
        f"got {q.dtype} with {q.shape[-1]}"
    )


def float8_limit(x: Tensor) -> str | None:
    """Return why the kernel takes no cache of float8 on the device of x, None if it does."""
    if x.is_cuda and capability_of(x.device) < FLOAT8_CAPABILITY:
        return f"k_cache: float8 needs a device of sm_89 or later, got {capability_of(x.device)}"
    return None


def padded_width(head_dim: int) -> int:
    """Return the columns of a tile for this head_dim."""
    return max(32, triton.next_power_of_2(head_dim))


def choose_config(element_size: int, width: int, queries: int, shared: int) -> Config:
    """Return the tile for this number of queries, with stages that fit.

    element_size: bytes. width: padded head_dim. shared: bytes of shared memory per block.
    """
    several, few, handful = CONFIGS[element_size, width]

    def fitting(config: Config) -> int:
        free = shared - config.rows * width * element_size
        return free // (2 * config.keys * width * element_size)

    config = handful if queries <= 16 else few if queries <= 64 else several
    if fitting(config) < config.stages and config is several:
        config = few  # on a small device 128 rows would also spill registers
    return config._replace(stages=max(1, min(config.stages, fitting(config))))


def shared_bytes(q: Tensor) -> int:
    """Return the shared memory of a block on the device of q; the interpreter has no limit."""
    if not q.is_cuda:
        return sys.maxsize
    return torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin


@cache
def choose_splits(tiles: int, key_tiles: int, programs: int) -> int:
    """Return the number of shares of the keys that finishes first if `programs` run at once,
    counted in key tiles of the longest chain. A share costs about one more to start, three if it
    must be merged."""

    def cost(splits: int) -> int:
        waves = -(tiles * splits // -programs)
        return waves * (-(key_tiles // -splits) + (1 if splits == 1 else 3))

    return min(range(1, min(MAX_SPLITS, key_tiles) + 1), key=cost)


class Plan(NamedTuple):
    """How a call is divided: its tile, tiles of queries per head, shares of the keys."""

    config: Config
    row_tiles: int
    splits: int


def plan_of(queries: int, k_cache: Tensor) -> Plan:
    """Return the plan for this number of queries, from shapes and the device alone."""
    batch, capacity, heads, head_dim = k_cache.shape
    width = padded_width(head_dim)
    config = choose_config(k_cache.element_size(), width, queries, shared_bytes(k_cache))
    row_tiles = triton.cdiv(queries, config.rows)
    programs = config.programs * multiprocessors(k_cache)
    key_tiles = triton.cdiv(capacity, config.keys)
    return Plan(config, row_tiles, choose_splits(row_tiles * batch * heads, key_tiles, programs))


def workspace(k_cache: Tensor, tokens_per_frame: int) -> Tensor | None:
    """Return memory for the parts of a step of one frame, float32, empty if it does not split its
    keys. A longer step splits them seldom, and allocates its own. None if the kernel does not take
    this cache.

    k_cache: One layer, (batch, capacity, heads, head_dim).
    """
    if k_cache.shape[-1] > MAX_HEAD_DIM:
        return None
    if float8_limit(k_cache) if k_cache.dtype in QUANTISED else limit(k_cache):
        return None
    batch, _, heads, head_dim = k_cache.shape
    splits = plan_of(tokens_per_frame, k_cache).splits
    words = splits * batch * heads * tokens_per_frame * (head_dim + 1) if splits > 1 else 0
    return k_cache.new_empty(words, dtype=torch.float32)


def split_workspace(memory: Tensor | None, splits: int, lse: Tensor, head_dim: int):
    """Return parts (splits, *lse.shape, head_dim) and their lse (splits, *lse.shape), in `memory`
    if it is a workspace for this kernel that is large enough."""
    rows = splits * lse.numel()
    words = rows * (head_dim + 1)
    if memory is None or memory.dtype != torch.float32 or memory.numel() < words:
        memory = lse.new_empty(words)
    parts, lses = memory[:words].split([rows * head_dim, rows])
    return parts.view(splits, *lse.shape, head_dim), lses.view(splits, *lse.shape)


def forward(q, k_cache, v_cache, step, text_lens, q_sink, *arguments, splits: int | None = None):
    """Launch the kernel; splits: chosen from shapes alone, unless given."""
    *geometry, scale, k_scale, v_scale, memory = arguments
    text_tokens, tokens_per_frame, window_frames, sink_frames = geometry
    batch, length, heads, head_dim = q.shape
    if scale < 0:  # the running maximum is that of the scaled scores only for a scale > 0
        q, q_sink, scale = -q, None if q_sink is None else -q_sink, -scale
    scale = max(scale, 1e-30)
    config, row_tiles, chosen = plan_of(length, k_cache)
    k_cache, v_cache = as_bits(k_cache), as_bits(v_cache)
    splits = chosen if splits is None else splits
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if not q.numel():
        return out, lse
    if splits == 1:
        parts, part_lses, part_strides = out, lse, (0, *out.stride()[:3])
    else:
        parts, part_lses = split_workspace(memory, splits, lse, head_dim)
        part_strides = parts.transpose(2, 3).stride()[:4]
    constants = {"HEAD_DIM": head_dim, "WIDTH": padded_width(head_dim)}
    with torch.cuda.device_of(q):
        cached_attention_kernel[(row_tiles, splits, batch * heads)](
            q,
            k_cache,
            v_cache,
            step,
            text_lens,
            q_sink,
            k_scale,
            v_scale,
            parts,
            part_lses,
            *q.stride()[:3],
            *(q if q_sink is None else q_sink).stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride(),
            *part_strides,
            heads,
            length,
            text_tokens,
            tokens_per_frame,
            sink_frames + window_frames + 1,
            sink_frames,
            scale * LOG2_E,
            ROWS=config.rows,
            KEYS=config.keys,
            **constants,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if splits > 1:
            rows = lse.numel()
            merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
                parts,
                part_lses,
                out,
                lse,
                heads,
                length,
                rows,
                splits,
                **constants,
                ROWS=MERGE_ROWS,
                SPLITS=triton.next_power_of_2(splits),
            )
    return out, lse
