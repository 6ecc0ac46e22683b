"""Predicts the sm_90a kernels of block_causal_attention on a GPU; nothing is measured.

    python -m benchmarks.training_model

Counted exactly, as csrc/block_causal_attention/{mask,schedule}.h cut and deal the work: *waste*,
the elements of all tiles over those that the mask shows, less one; *edges*, the share of tiles that
need masking arithmetic; *balance*, mean over largest share of a multiprocessor; *device memory*,
what an L2 cache does not serve (l2_model.py). Assumed: what an item of work costs besides its
tiles. The rates of the inner loops are those of loop_model.py, the middle of its range.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from aapt_kernels import FrameLayout

from .l2_model import count_misses
from .loop_model import backward_rates, forward_rates
from .shapes import TRAINING_CUDA, TrainingShape

MULTIPROCESSORS = 132
TILE = 128  # keys
DQ_ROWS = 128  # query rows of the kernel for dq alone
PAIRS_TOGETHER = 24  # (batch, head) pairs that take turns

PEAK_FLOPS = 989e12  # dense BF16, H100 and H200
PEAK_BYTES = 4.8e12  # per second, H200
COPY_RATE = 0.75  # of it, in kernels bound by memory: assumed
FORWARD_FLOPS, BACKWARD_FLOPS = sum(forward_rates()) / 2, sum(backward_rates()) / 2
ITEM_SECONDS = 1e-6  # last products and store, with the next queries on their way: assumed
FORWARD_TARGET, BACKWARD_TARGET = 650e12, 520e12


@dataclass(frozen=True)
class Tile:
    """A tile of one operand: its first row, and the tiles of the other that it meets."""

    row: int
    count: int
    clean: int
    reads: tuple[int, ...] = ()  # first rows of the other operand's tiles


def rows_of_forward(shape: TrainingShape) -> int:
    """Rows of a query tile in the forward kernel."""
    return 192 if shape.head_dim == 64 else 128


def rows_of_backward(shape: TrainingShape) -> int:
    """Rows of a query tile in the backward kernel of keys."""
    return 128 if shape.head_dim == 64 else 80


def row_view(layout: FrameLayout, row: int) -> tuple[int, int, int]:
    """End of the sink, begin and end of the window that a query row sees."""
    text = layout.text_tokens
    if row < text:
        return text, text, text
    _, sink, window = layout.intervals((row - text) // layout.tokens_per_frame)
    return sink[1], *window


def query_tiles(shape: TrainingShape, rows: int, pinned: bool = False) -> list[Tile]:
    """The work of the forward, or of the kernel for dq, in tiles of `rows` query rows, in order.
    pinned: with q_sink."""
    layout = shape.layout
    text, length = layout.text_tokens, layout.query_length
    return [
        _query_tile(layout, first, min(first + rows, length) - 1, text, pinned)
        for first in range(0, length, rows)
    ]


def _query_tile(layout: FrameLayout, first: int, last: int, text: int, pinned: bool) -> Tile:
    views = [row_view(layout, row) for row in (first, last)]
    intervals = [(0, text)]
    if last >= text:
        sink_end, _, window_end = views[1]
        oldest = row_view(layout, max(first, text))[1]
        intervals += [(text, sink_end), (max(oldest, sink_end), window_end)]
    joined = []
    for start, end in intervals:
        if start == end:
            continue
        if joined and joined[-1][1] == start and not pinned:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    head_end = views[0][2] if views[1][0] == views[1][1] else views[0][0]
    count = clean = 0
    reads = []
    for start, end in joined:
        for row in range(start, end, TILE):
            stop = row + TILE
            seen = stop <= head_end or (row >= views[1][1] and stop <= views[0][2])
            reads.append(row)
            count += 1
            clean += seen and stop <= end
    return Tile(first, count, clean, tuple(reads))


def key_tiles(shape: TrainingShape, pinned: bool = False) -> list[Tile]:
    """The work of the backward, in order of keys."""
    layout = shape.layout
    sink_end = layout.sink[1]
    starts = [0, layout.text_tokens, sink_end] if pinned else [0, sink_end]
    regions = zip(starts, [*starts[1:], layout.key_length], strict=True)
    return [
        _key_tile(layout, row, min(row + TILE, end), rows_of_backward(shape))
        for start, end in regions
        for row in range(start, end, TILE)
    ]


def rows_that_see(layout: FrameLayout, key: int) -> tuple[int, int]:
    text, tokens = layout.text_tokens, layout.tokens_per_frame
    if key < text:
        return 0, layout.query_length
    frame, before = (key - text) // tokens, layout.key_frames - layout.frames
    first, last = max(frame - before, 0), layout.frames
    if frame >= layout.sink_frames and layout.window_frames is not None:
        last = max(min(last, frame + layout.window_frames - before + 1), first)
    return text + first * tokens, text + last * tokens


def _key_tile(layout: FrameLayout, row: int, end: int, rows: int) -> Tile:
    first, last = rows_that_see(layout, row), rows_that_see(layout, end - 1)
    stop = layout.query_length if row < layout.text_tokens else last[1]
    if first[0] == stop:
        return Tile(row, 0, 0)
    count = -(-stop // rows) - first[0] // rows
    clean = first[1] // rows - -(-last[0] // rows) if end - row == TILE else 0
    begin = first[0] // rows
    return Tile(row, count, max(clean, 0), tuple(range(begin * rows, (begin + count) * rows, rows)))


def deal(
    tiles: list[Tile],
    pairs: int,
    ctas: int = MULTIPROCESSORS,
    together: int = PAIRS_TOGETHER,
) -> Iterator[tuple[int, int, Tile]]:
    """(cta, pair, tile) of all work, in the order in which a CTA does its own. `tiles`: the longest
    first."""
    index = 0
    for first in range(0, pairs, together):
        for tile in tiles:
            for pair in range(first, min(first + together, pairs)):
                turn, place = divmod(index, ctas)
                yield (place if turn % 2 == 0 else ctas - 1 - place), pair, tile
                index += 1


def device_bytes(
    shape: TrainingShape, tiles: list[Tile], rows: int, together: int = PAIRS_TOGETHER
) -> int:
    """Bytes that a kernel reads of its second operand from device memory, in tiles of `rows`
    rows."""
    reads: list[list[tuple[int, int]]] = [[] for _ in range(MULTIPROCESSORS)]
    for cta, pair, tile in deal(tiles, shape.batch * shape.heads, together=together):
        reads[cta] += [(pair, row) for row in tile.reads]
    steps = (
        [read[step] for read in reads if step < len(read)] for step in range(max(map(len, reads)))
    )
    tile_bytes = 2 * 2 * rows * shape.head_dim  # keys and values, or queries and dout, BF16
    return tile_bytes * count_misses(steps, tile_bytes)


@dataclass(frozen=True)
class Direction:
    """One kernel: times in seconds."""

    tiles: int  # of one head
    waste: float
    edges: float
    balance: float
    seconds: float


def schedule(
    shape: TrainingShape, tiles: list[Tile], rows: int, products: int, rate: float
) -> Direction:
    """Predicts a kernel of `products` products per tile of rows x TILE, whose inner loop runs at
    `rate`."""
    step = 2 * products * rows * TILE * shape.head_dim / (rate / MULTIPROCESSORS)
    shares = [[0, 0] for _ in range(MULTIPROCESSORS)]
    for cta, _, tile in deal(tiles, shape.batch * shape.heads):
        shares[cta][0] += tile.count
        shares[cta][1] += 1
    count = sum(tile.count for tile in tiles)
    most = max(steps for steps, _ in shares)
    return Direction(
        tiles=count,
        waste=count * rows * TILE / shape.visible - 1,
        edges=1 - sum(tile.clean for tile in tiles) / count,
        balance=count * shape.batch * shape.heads / MULTIPROCESSORS / most,
        seconds=max(steps * step + items * ITEM_SECONDS for steps, items in shares),
    )


@dataclass(frozen=True)
class Prediction:
    forward: Direction
    backward: Direction
    around: float  # seconds of what comes before and after the backward's main kernel
    deterministic: float  # seconds of the whole backward in that mode
    sums_bytes: float  # per second, that the main kernel adds to dq

    @property
    def backward_seconds(self) -> float:
        return self.backward.seconds + self.around


def predict(shape: TrainingShape) -> Prediction:
    query_rows, rows = rows_of_forward(shape), rows_of_backward(shape)
    queries, keys = query_tiles(shape, query_rows)[::-1], key_tiles(shape)
    forward = schedule(shape, queries, query_rows, 2, FORWARD_FLOPS)
    backward = schedule(shape, keys, rows, 5, BACKWARD_FLOPS)
    copy = COPY_RATE * PEAK_BYTES
    statistics = shape.bytes(2, 0) / copy  # out and dout
    convert = shape.bytes(2 + 2 + 1, 0) / copy  # float32 sums cleared and read, dq written
    of_keys = schedule(shape, keys, rows, 4, BACKWARD_FLOPS)
    of_queries = schedule(shape, query_tiles(shape, DQ_ROWS)[::-1], DQ_ROWS, 3, BACKWARD_FLOPS)
    added = backward.tiles * shape.batch * shape.heads * rows * shape.head_dim * 4
    return Prediction(
        forward,
        backward,
        around=statistics + convert,
        deterministic=of_keys.seconds + of_queries.seconds + statistics,
        sums_bytes=added / backward.seconds,
    )


def tables() -> str:
    rows = [
        "PREDICTION, nothing here was measured: 132 multiprocessors, BF16, text of 512 tokens,",
        "24 heads of 128 unless named otherwise",
        "",
        "| frames x tokens | tiles of a head, forward / backward | waste | edges | balance |",
        "|---|---|---|---|---|",
    ]
    predictions = {name: predict(shape) for name, shape in TRAINING_CUDA.items()}
    for name, model in predictions.items():
        both = (model.forward, model.backward)
        cells = [" / ".join(str(x.tiles) for x in both)]
        for field in ("waste", "edges"):
            cells.append(" / ".join(f"{100 * getattr(x, field):.1f} %" for x in both))
        cells.append(" / ".join(f"{x.balance:.4f}" for x in both))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += [
        "",
        "| frames x tokens | floors of the forward, bytes / FLOPs ms | of the backward |"
        f" forward ms, TFLOP/s, beside {FORWARD_TARGET / 1e12:.0f} |"
        f" backward ms, TFLOP/s, beside {BACKWARD_TARGET / 1e12:.0f} |"
        " deterministic | sums of dq TB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in predictions.items():
        shape = TRAINING_CUDA[name]
        if shape.head_dim != 128:
            continue  # no rate is known to assume
        floors = [
            f"{1e3 * size / PEAK_BYTES:.2f} / {1e3 * flops / PEAK_FLOPS:.1f}"
            for size, flops in (
                (shape.bytes(2, 2), shape.flops(2)),
                (shape.bytes(4, 4), shape.flops(5)),
            )
        ]
        seconds = (model.forward.seconds, model.backward_seconds)
        rates = []
        goals = (FORWARD_TARGET, BACKWARD_TARGET)
        for time, products, target in zip(seconds, (2, 5), goals, strict=True):
            rate = shape.flops(products) / time
            rates.append(f"{1e3 * time:.1f}, {rate / 1e12:.0f}, {100 * (rate / target - 1):+.0f} %")
        cost = model.deterministic / model.backward_seconds - 1
        rows.append(
            f"| {name} | {' | '.join(floors)} | {' | '.join(rates)} | +{100 * cost:.0f} % "
            f"| {model.sums_bytes / 1e12:.2f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(tables())
