"""Fast CPU implementation: query rows attend to the keys they see, gathered by interval.

Forward, PyTorch's own flash attention runs once per frame, and once more for a sink with queries of
its own. Backward, which that attention has for a lone frame that sees every key alone, runs in
tiles.

A tile is a chunk of (batch, head) pairs times the rows of one frame, or of several if a frame is
small. All its keys fit one softmax, whose probabilities are computed anew. The backward computes
half precision in float32; factors of its products are rounded to bfloat16 if the inputs are
bfloat16 (`products_of`). Every large temporary is scratch that all tiles share, because fresh pages
cost more than the arithmetic.

Rows of several frames share keys that only some of them see. A weight of zero hides the others, but
not NaN and infinity: if the inputs hold any, every frame gets a tile of its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..flash import FLASH_BACKWARD, clips_of_one_text, flash, merge, without_float16
from ..layout import FrameLayout, Interval
from ..precision import dense, wide

TILE_ROWS = 64  # rows up to which small frames are grouped
MAX_TILE_ROWS = 512  # rows beyond which a frame is split
TILE_SCORES = 1 << 19  # scores per tile: 2 MB in float32, so a tile stays in the cache

PRECISION_LOCK = threading.Lock()


class Tile(NamedTuple):
    """Query rows, and the keys that any of them sees."""

    rows: Interval
    keys: tuple[Interval, Interval, Interval]  # text, sink, window
    hidden: Tensor | None  # (rows, keys) bool; None if every row sees every key

    def pieces(self, unwanted: Interval = (0, 0)) -> list[tuple[int, int, int]]:
        """Return (column, start, end) of all keys but the unwanted ones, neighbours joined."""
        pieces, column = [], 0
        for start, end in self.keys:
            for a, b in ((start, min(end, unwanted[0])), (max(start, unwanted[1]), end)):
                if b <= a:
                    continue
                if pieces and pieces[-1][2] == a:
                    pieces[-1] = (*pieces[-1][:2], b)
                else:
                    pieces.append((column + a - start, a, b))
            column += end - start
        return pieces

    @property
    def sizes(self) -> list[int]:
        """Keys of text, sink and window."""
        return [end - start for start, end in self.keys]


def tiles(layout: FrameLayout, grouped: bool) -> Iterator[Tile]:
    """Cover the query: text, then frames, small ones `grouped` or each in a tile of its own."""
    text, tokens = layout.text_tokens, layout.tokens_per_frame
    if text:
        yield Tile((0, text), ((0, text), (0, 0), (0, 0)), None)
    group = max(1, TILE_ROWS // tokens) if grouped else 1
    for first in range(0, layout.frames, group):
        last = min(first + group, layout.frames) - 1
        _, sink, window = layout.intervals(last)
        oldest = max(sink[1], min(layout.intervals(first)[2][0], window[0]))
        keys = ((0, text), sink, (oldest, window[1]))
        start, end = text + first * tokens, text + (last + 1) * tokens
        hidden = None
        if last > first:
            query = torch.arange(start, end)[:, None]
            key = torch.cat([torch.arange(*interval) for interval in keys])
            hidden = ~layout.mask_mod(key, key, query, key)
        elif tokens > MAX_TILE_ROWS:
            for row in range(start, end, MAX_TILE_ROWS):
                yield Tile((row, min(row + MAX_TILE_ROWS, end)), keys, None)
            continue
        yield Tile((start, end), keys, hidden)


class Scratch:
    """Buffers that grow to the largest tile; callers get contiguous views."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the start of buffer `name` in this shape, of three dimensions."""
        size = shape[0] * shape[1] * shape[2]
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size, dtype=self.dtype)
        return buffer[:size].view(shape)


class Problem:
    """Inputs in head-major order, (batch x heads, length, head_dim), and the steps they share."""

    def __init__(self, dout, q, k, v, text_lens, q_sink, arguments):
        *integers, scale, prefix_grad = arguments
        self.layout = FrameLayout(*integers)
        self.no_gradient = (0, 0) if prefix_grad else self.layout.prefix
        self.dtype = wide(q.dtype)
        self.batch, _, self.heads, self.head_dim = q.shape
        self.scale = scale
        self.q = self.head_major(q).mul_(scale)
        self.k, self.v = self.head_major(k), self.head_major(v)
        self.q_sink = None if q_sink is None else self.head_major(q_sink).mul_(scale)
        self.dout = self.head_major(dout)
        self.scratch = Scratch(self.dtype)
        self.hidden_text = self.no_text = None
        if text_lens is not None:
            lens = text_lens.repeat_interleave(self.heads)[:, None, None]
            self.hidden_text = torch.arange(self.layout.text_tokens) >= lens
            self.no_text = lens <= 0
            self.clear_padding(self.k, self.v)

    def tiles(self) -> Iterator[Tile]:
        """Cover the query."""
        tensors = (self.q, self.k, self.v, self.q_sink, self.dout)
        small = 2 * self.layout.tokens_per_frame <= TILE_ROWS
        # A sum is finite if no element is NaN or infinite; one that overflows costs only time
        grouped = small and all(x.sum().isfinite() for x in tensors if x is not None)
        return tiles(self.layout, grouped)

    def clear_padding(self, *tensors: Tensor) -> None:
        """Set the rows of padded text to zero, in place."""
        if self.hidden_text is not None:
            for x in tensors:
                x[:, : self.layout.text_tokens].masked_fill_(self.hidden_text.transpose(1, 2), 0)

    def head_major(self, x: Tensor) -> Tensor:
        """Return a copy (B x H, L, D) in the dtype of the computation."""
        x = x.transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return x.flatten(0, 1)

    def token_major(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B x H, L, D) as a contiguous (B, L, H, D) of the given dtype."""
        x = x.unflatten(0, (self.batch, self.heads)).transpose(1, 2)
        return x.to(dtype, memory_format=torch.contiguous_format, copy=True)

    def chunks(self, tile: Tile) -> Iterator[slice]:
        """Slice the (batch, head) pairs so that the scores of a tile stay in the cache."""
        pairs = self.batch * self.heads
        scores = (tile.rows[1] - tile.rows[0]) * sum(tile.sizes)
        step = max(1, min(pairs, TILE_SCORES // max(1, scores)))
        for start in range(0, pairs, step):
            yield slice(start, min(start + step, pairs))

    def gather(self, name: str, x: Tensor, pairs: slice, tile: Tile) -> Tensor:
        """Return the tile's keys (or values) side by side: a view if they are one interval."""
        keys = [x[pairs, start:end] for _, start, end in tile.pieces()]
        if len(keys) == 1:
            return keys[0]
        out = self.scratch.take(name, keys[0].shape[0], sum(tile.sizes), self.head_dim)
        return torch.cat(keys, dim=1, out=out)

    def scatter_add(self, total: Tensor, weights: Tensor, x: Tensor, pairs: slice, tile: Tile):
        """Add weights^T x to `total` at the tile's keys, except keys that take no gradient."""
        for column, start, end in tile.pieces(unwanted=self.no_gradient):
            columns = weights[:, :, column : column + end - start].transpose(1, 2)
            part = self.scratch.take("part", x.shape[0], end - start, self.head_dim)
            total[pairs, start:end] += torch.bmm(columns, x, out=part)

    def uses_q_sink(self, tile: Tile) -> bool:
        """Return whether the tile meets the sink with queries of its own."""
        return self.q_sink is not None and tile.sizes[1] > 0

    def sink_rows(self, tile: Tile) -> slice:
        """Return the tile's rows in q_sink, which has none for text."""
        return slice(*(row - self.layout.text_tokens for row in tile.rows))

    def sink_columns(self, tile: Tile) -> slice:
        """Return the columns of the sink among the tile's keys."""
        text, sink, _ = tile.sizes
        return slice(text, text + sink)

    def scores(self, pairs: slice, tile: Tile, k: Tensor) -> Tensor:
        """Return the masked scores of the tile, in scratch."""
        q = self.q[pairs, slice(*tile.rows)]
        s = self.scratch.take("scores", q.shape[0], q.shape[1], k.shape[1])
        torch.bmm(q, k.transpose(1, 2), out=s)
        if self.uses_q_sink(tile):
            columns = self.sink_columns(tile)
            sink_q = self.q_sink[pairs, self.sink_rows(tile)]
            s[:, :, columns] = torch.bmm(sink_q, k[:, columns].transpose(1, 2))
        if tile.hidden is not None:
            s.masked_fill_(tile.hidden, -torch.inf)
        if self.hidden_text is not None:
            s[:, :, : tile.sizes[0]].masked_fill_(self.hidden_text[pairs], -torch.inf)
        return s

    def softmax_(self, s: Tensor, pairs: slice, tile: Tile) -> Tensor:
        """Turn scores into probabilities in place: zero in a row of text that sees nothing."""
        torch.softmax(s, dim=-1, out=s)
        if self.no_text is not None and sum(tile.sizes[1:]) == 0:
            s.masked_fill_(self.no_text[pairs], 0)
        return s


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 matrices in bfloat16 inside, if that is the dtype of the inputs.

    oneDNN rounds the factors and sums in float32: twice as fast on a processor with AVX512-BF16,
    and no different on one without. The setting is the process's: one backward at a time has it,
    and float32 products of other threads are rounded meanwhile.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    with PRECISION_LOCK:
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def is_dense(q: Tensor, q_sink: Tensor | None, layout: FrameLayout) -> bool:
    """Return whether the query is one frame that sees every key, the sink as any other."""
    if layout.text_tokens or layout.frames != 1 or q_sink is not None or q.numel() == 0:
        return False
    seen = sum(end - start for start, end in layout.intervals(0))
    return seen == layout.key_length


def dense_backward(dout, q, k, v, out, lse, layout, scale, prefix_grad) -> list[Tensor]:
    """Return dq, dk and dv of one frame that sees every key."""
    tensors = (x.transpose(1, 2) for x in without_float16(dout, q, k, v, out))
    gradients = FLASH_BACKWARD(*tensors, lse, 0.0, False, scale=scale)
    dq, dk, dv = (dense(x.transpose(1, 2), q.dtype) for x in gradients)
    if not prefix_grad:
        for x in (dk, dv):
            x[:, slice(*layout.prefix)] = 0
    return [dq, dk, dv]


def queries_of(layout: FrameLayout) -> Iterator[tuple[slice, Interval, Interval]]:
    """Yield the rows of text, then of each frame, with the sink and the window that they see."""
    text, tokens = layout.text_tokens, layout.tokens_per_frame
    if text:
        yield slice(0, text), (0, 0), (0, 0)
    for frame in range(layout.frames):
        _, sink, window = layout.intervals(frame)
        start = text + frame * tokens
        yield slice(start, start + tokens), sink, window


def take(x: Tensor, intervals: list[Interval]) -> Tensor:
    """Return the tokens of intervals of x (B, L, H, D) side by side: a view of neighbours."""
    joined = intervals[:1]
    for start, end in intervals[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    parts = [x[:, start:end] for start, end in joined]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def forward(q, k, v, text_lens, q_sink, *arguments):
    *integers, scale, _ = arguments
    layout, text = FrameLayout(*integers), integers[0]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((len(q), q.shape[2], q.shape[1]), dtype=wide(q.dtype))
    q, k, v, q_sink = without_float16(q, k, v, q_sink)
    whole = [(slice(0, len(q)), text)]
    for clips, length in whole if text_lens is None else clips_of_one_text(text_lens, text):
        keys, values = k[clips], v[clips]
        for rows, sink, window in queries_of(layout):
            query = q[clips, rows]
            calls = [(query, [(0, length), sink, window])]
            if q_sink is not None and rows.start >= text:
                turned = q_sink[clips, rows.start - text : rows.stop - text]
                calls = [(query, [(0, length), window]), (turned, [sink])]
            parts = []
            for query, intervals in calls:
                seen = [(start, end) for start, end in intervals if end > start]
                if seen and query.numel():
                    parts.append(flash(query, take(keys, seen), take(values, seen), scale))
            if parts:
                part, lse[clips, :, rows] = merge(parts)
                out[clips, rows] = part.transpose(1, 2)
            else:  # text that has no text to see
                out[clips, rows], lse[clips, :, rows] = 0, -torch.inf
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, text_lens, q_sink, *arguments):
    *integers, scale, prefix_grad, _ = arguments
    layout = FrameLayout(*integers)
    if dlse is None and is_dense(q, q_sink, layout):
        gradients = dense_backward(dout, q, k, v, out, lse, layout, scale, prefix_grad)
        return *gradients, q.new_empty(0)
    with products_of(q.dtype):
        return tiled_backward(dout, dlse, q, k, v, text_lens, q_sink, arguments[:-1])


def tiled_backward(dout, dlse, q, k, v, text_lens, q_sink, arguments) -> tuple[Tensor, ...]:
    """Return dq, dk, dv and dq_sink; dq_sink is empty without a q_sink."""
    problem = Problem(dout, q, k, v, text_lens, q_sink, arguments)
    dlse = None if dlse is None else dlse.to(problem.dtype).flatten(0, 1)[..., None]
    dq, dk, dv = (torch.zeros_like(x) for x in (problem.q, problem.k, problem.v))
    dq_sink = None if q_sink is None else torch.zeros_like(problem.q_sink)
    take = problem.scratch.take
    for tile in problem.tiles():
        rows = slice(*tile.rows)
        for pairs in problem.chunks(tile):
            keys = problem.gather("k", problem.k, pairs, tile)
            values = problem.gather("v", problem.v, pairs, tile)
            p = problem.softmax_(problem.scores(pairs, tile, keys), pairs, tile)
            tile_dout = problem.dout[pairs, rows]
            problem.scatter_add(dv, p, tile_dout, pairs, tile)

            ds = torch.bmm(tile_dout, values.transpose(1, 2), out=take("ds", *p.shape))
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
            if dlse is not None:
                ds.addcmul_(p, dlse[pairs, rows])
            if problem.uses_q_sink(tile):
                sink, sink_rows = slice(*tile.keys[1]), problem.sink_rows(tile)
                sink_ds = ds[:, :, problem.sink_columns(tile)]
                dq_sink[pairs, sink_rows] = torch.bmm(sink_ds, problem.k[pairs, sink])
                if problem.no_gradient == (0, 0):
                    sink_q = problem.q_sink[pairs, sink_rows]
                    dk[pairs, sink] += torch.bmm(sink_ds.transpose(1, 2), sink_q)
                sink_ds.zero_()
            problem.scatter_add(dk, ds, problem.q[pairs, rows], pairs, tile)
            dq[pairs, rows] = torch.bmm(ds, keys, out=take("out", *tile_dout.shape))
    problem.clear_padding(dk, dv)
    dq = problem.token_major(dq.mul_(problem.scale), q.dtype)
    if q_sink is None:
        dq_sink = q.new_empty(0)
    else:
        dq_sink = problem.token_major(dq_sink.mul_(problem.scale), q.dtype)
    return dq, problem.token_major(dk, k.dtype), problem.token_major(dv, v.dtype), dq_sink
