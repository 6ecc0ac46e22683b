"""Block-causal attention forward, and the launches of both directions, for any GPU that Triton
serves. A program takes a tile of query rows of one head through the keys that they see."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import FrameLayout
from ..triton_tiles import LOG2_E, MOST_HEADS, dot, load_rows, zero_or_nan
from .triton_backward import keys_backward_kernel, queries_backward_kernel, stats_kernel
from .triton_mask import INTEGERS, hide, text_length, visible_tiles
from .triton_sweep import store_rows, sweep

STATS_ROWS = 16


class Config(NamedTuple):
    """Tile of a kernel (query rows x keys), warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# By bytes per element and padded head_dim: forward, gradient of queries, gradients of keys
CONFIGS = {
    (2, 32): (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    (2, 64): (Config(64, 64, 4, 3), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
    (2, 128): (Config(64, 32, 4, 3), Config(64, 32, 4, 2), Config(32, 64, 8, 2)),
    (4, 32): (Config(64, 32, 4, 2), Config(64, 16, 8, 1), Config(16, 32, 4, 1)),
    (4, 64): (Config(32, 16, 4, 2), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}
# For these major compute capabilities: a warpgroup multiplies at once, and shared memory is large
WIDE_CAPABILITIES = (9, 10)
WIDE_CONFIGS = CONFIGS | {
    (2, 32): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 128, 8, 2)),
    (2, 64): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 128, 8, 2)),
    (2, 128): (Config(128, 64, 8, 3), Config(128, 32, 8, 2), Config(32, 128, 8, 2)),
}


def limit(q: Tensor, *_) -> str | None:
    """Return why the kernels do not take q, None if they do.

    They pad a head_dim to the next of 32, 64 and 128; float32 with 128 would not fit the registers.
    """
    if q.shape[0] * q.shape[2] > MOST_HEADS:
        return f"it takes at most {MOST_HEADS} batch entries times heads, got {tuple(q.shape)}"
    most = 64 if q.dtype == torch.float32 else 128
    if q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[-1] <= most:
        return None
    return (
        "it takes float16 or bfloat16 with a head_dim up to 128, float32 up to 64, "
        f"got {q.dtype} with {q.shape[-1]}"
    )


def is_wide(q: Tensor) -> bool:
    """Return whether q is on a device of `WIDE_CONFIGS`."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] in WIDE_CAPABILITIES


@triton.jit
def attend(
    state, queries, k, v, key, end, shown, layout, k_stride, v_stride, scale, HEAD_DIM, WIDTH
):
    """Add one tile of keys to the softmax: state is (sums, maximum, total), queries (q,).

    At an edge `end` is where the keys end, elsewhere None. The maximum and `scale` are in units of
    log2. A value that holds NaN or infinity makes NaN of the rows that see it, and of no other.
    """
    sums, before, total = state
    active, broken = None, None
    if end is not None:
        active = key < end
        broken = zero_or_nan(v, key, v_stride, active, HEAD_DIM, WIDTH)
    k_tile = load_rows(k, key, k_stride, active, HEAD_DIM, WIDTH)
    s = dot(queries[0], tl.trans(k_tile))
    if end is not None:
        s = hide(s, key, end, shown, layout)
    highest = tl.maximum(before, tl.max(s, 1) * scale)
    offset = highest
    if end is not None:  # a row may see nothing yet
        offset = tl.where(highest == float("-inf"), 0, highest)
    p = tl.exp2(s * scale - offset[:, None])
    decay = tl.exp2(before - offset)
    total = total * decay + tl.sum(p, 1)
    if end is not None:
        p = tl.where(p == 0, 0, p + broken[None, :])
        active = active & (broken == 0)
    v_tile = load_rows(v, key, v_stride, active, HEAD_DIM, WIDTH)
    sums = dot(p.to(v_tile.dtype), v_tile, sums * decay[:, None])
    return sums, highest, total


@triton.jit(do_not_specialize=INTEGERS)
def block_causal_attention_kernel(
    q,
    k,
    v,
    text_lens,
    q_sink,
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
    """Write out and lse of a tile of query rows; the longest tile comes first.

    scale is positive and in units of log2; out and lse are dense.
    """
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

    state = (
        tl.zeros((ROWS, WIDTH), tl.float32),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )
    if split:
        q_sink += batch * q_sink_batch_stride + head * q_sink_head_stride
        in_frame = active & (row >= text)
        q_tile = load_rows(q_sink, row - text, q_sink_token_stride, in_frame, HEAD_DIM, WIDTH)
        state = sweep(
            attend,
            state,
            (q_tile,),
            k,
            v,
            nothing,
            sink_tiles,
            nothing,
            shown,
            layout,
            k_token_stride,
            v_token_stride,
            scale,
            HEAD_DIM,
            WIDTH,
            KEYS,
        )
        sink_tiles = nothing
    q += batch * q_batch_stride + head * q_head_stride
    q_tile = load_rows(q, row, q_token_stride, active, HEAD_DIM, WIDTH)
    result, highest, total = sweep(
        attend,
        state,
        (q_tile,),
        k,
        v,
        text_tiles,
        sink_tiles,
        recent_tiles,
        shown,
        layout,
        k_token_stride,
        v_token_stride,
        scale,
        HEAD_DIM,
        WIDTH,
        KEYS,
    )
    result = result / tl.where(total == 0, 1, total)[:, None]
    store_rows(out, result, batch, head, row, 0, rows, heads, HEAD_DIM, WIDTH)
    tl.store(lse + pair * rows + row, (highest + tl.log2(total)) * 0.6931471805599453, mask=active)


class Launch:
    """Arguments that the launches of one call share."""

    def __init__(self, q, k, v, text_lens, q_sink, arguments):
        *integers, self.scale, self.prefix_grad = arguments
        layout = FrameLayout(*integers)
        self.rows, self.key_rows = layout.query_length, layout.key_length
        self.batch, _, self.heads, self.head_dim = q.shape
        self.frame_rows = self.rows - layout.text_tokens
        if not self.frame_rows:
            q_sink = None
        frames = layout.key_frames
        window = frames if layout.window_frames is None else min(layout.window_frames, frames)
        self.layout = (
            layout.text_tokens,
            layout.tokens_per_frame,
            layout.frames,
            frames - layout.frames,
            window,
            min(layout.sink_frames, frames),
        )
        self.q, self.k, self.v = q, k, v
        self.text_lens, self.q_sink = text_lens, q_sink
        self.sink_end = layout.sink[1]
        self.head_end = layout.text_tokens if q_sink is not None else self.sink_end
        width = max(32, triton.next_power_of_2(self.head_dim))
        self.constants = {"HEAD_DIM": self.head_dim, "WIDTH": width}
        self.configs = (WIDE_CONFIGS if is_wide(q) else CONFIGS)[q.element_size(), width]

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of q, q_sink, k and v, without their last dimension."""
        sink = self.q if self.q_sink is None else self.q_sink
        tensors = (self.q, sink, self.k, self.v)
        return tuple(stride for x in tensors for stride in x.stride()[:3])

    def grid(self, tiles: int) -> tuple[int, int]:
        """Return the grid of `tiles` for every (batch, head) pair."""
        return tiles, self.batch * self.heads

    def options(self, config: Config) -> dict[str, int]:
        """Return the compile-time arguments of a launch."""
        return {
            "ROWS": config.rows,
            "KEYS": config.keys,
            "num_warps": config.warps,
            "num_stages": config.stages,
            **self.constants,
        }


def forward(q, k, v, text_lens, q_sink, *arguments):
    *integers, scale, prefix_grad = arguments
    if scale < 0:  # the running maximum is that of the scaled scores only for a scale > 0
        q, q_sink, scale = -q, None if q_sink is None else -q_sink, -scale
    call = Launch(q, k, v, text_lens, q_sink, (*integers, max(scale, 1e-30), prefix_grad))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((call.batch, call.heads, call.rows), dtype=torch.float32)
    if not q.numel():
        return out, lse
    config = call.configs[0]
    with torch.cuda.device_of(q):
        block_causal_attention_kernel[call.grid(triton.cdiv(call.rows, config.rows))](
            q,
            k,
            v,
            text_lens,
            call.q_sink,
            out,
            lse,
            *call.strides,
            call.heads,
            call.rows,
            *call.layout,
            call.scale * LOG2_E,
            **call.options(config),
        )
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, text_lens, q_sink, *arguments):
    call = Launch(q, k, v, text_lens, q_sink, arguments[:-1])  # deterministic as it is
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dq_sink = q.new_empty(0 if q_sink is None else q_sink.shape)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), dq_sink
    dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    stats = q.new_empty((2, *lse.shape), dtype=torch.float32)
    _, of_queries, of_keys = call.configs
    shared = (q, k, v, dout, stats, text_lens, call.q_sink)
    numbers = (*call.strides, call.heads, call.rows, *call.layout)
    regions = (call.head_end, call.sink_end - call.head_end, call.key_rows - call.sink_end)
    with torch.cuda.device_of(q):
        stats_kernel[call.grid(triton.cdiv(call.rows, STATS_ROWS))](
            out, dout, lse, dlse, stats, call.heads, call.rows, ROWS=STATS_ROWS, **call.constants
        )
        queries_backward_kernel[call.grid(triton.cdiv(call.rows, of_queries.rows))](
            *shared, dq, dq_sink, *numbers, call.scale, **call.options(of_queries)
        )
        tiles = sum(triton.cdiv(length, of_keys.keys) for length in regions)
        keys_backward_kernel[call.grid(tiles)](
            *shared,
            dk,
            dv,
            *numbers,
            call.key_rows,
            call.head_end,
            call.sink_end,
            call.scale,
            PREFIX_GRAD=call.prefix_grad,
            **call.options(of_keys),
        )
    return dq, dk, dv, dq_sink
