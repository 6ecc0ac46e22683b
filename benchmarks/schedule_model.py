"""Predicts the stream-K schedule of cached_attention on a GPU; nothing is measured.

    python -m benchmarks.schedule_model

The work of all query tiles is laid end to end, in steps of one query tile x 128 keys, and cut into
equal shares, one per CTA (csrc/cached_attention/schedule.h). *Wave efficiency* is useful work,
exact queries x exact keys, over what all multiprocessors could do until the last of them is done:
padding, idle multiprocessors and uneven shares count against it. *Overheads* adds what a piece of a
tile costs besides its steps. *Device memory* is what an L2 cache does not serve (l2_model.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .l2_model import count_misses
from .loop_model import STRETCHES, forward_rates, narrow_busy

MULTIPROCESSORS = 132
TILE = 128  # keys of a step
BLOCK = 64  # queries of a warpgroup; a last tile of at most as many is narrow

PEAK_FLOPS = 989e12  # dense BF16, H100 and H200
PEAK_BYTES = 4.8e12  # per second, H200
TARGET_FLOPS = 620e12
GOALS = {3: 640e12, 6: 640e12, 24: 700e12}  # FLOP/s by heads, as far as there is one

L2_BYTES = 2.5e12  # per second, shared by all multiprocessors: assumed
MEETING_SECONDS = 2e-6  # the last CTA of a tile waits for the memory of the others: assumed
PIECE_SECONDS = 1e-6  # prologue and epilogue of a piece: assumed


@dataclass(frozen=True)
class Shape:
    """One frame's queries against the cache. `intervals`: lengths of the visible intervals of
    keys, one where the text slot is full, else text and frames. `warpgroups`: those that share a
    query tile, 64 rows each; the kernel has 2 at head_dim 128, 3 at head_dim 64."""

    queries: int
    intervals: tuple[int, ...]
    heads: int
    head_dim: int = 128
    batch: int = 1
    warpgroups: int = 2

    @property
    def rows(self) -> int:
        """Queries of a whole tile."""
        return BLOCK * self.warpgroups

    @property
    def keys(self) -> int:
        return sum(self.intervals)

    @property
    def key_tiles(self) -> int:
        return sum(-(-length // TILE) for length in self.intervals)

    @property
    def tile_steps(self) -> list[int]:
        """Steps of every query tile of one head, the narrow one last."""
        wide = (self.queries + self.rows - BLOCK - 1) // self.rows
        narrow = self.queries > wide * self.rows
        return [self.key_tiles] * wide + [-(-self.key_tiles // self.warpgroups)] * narrow

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim

    @property
    def bytes(self) -> int:
        """Every key, value and query read once, every output written once, in BF16."""
        rows = 2 * self.keys + 2 * self.queries
        return 2 * self.batch * self.heads * rows * self.head_dim


@dataclass(frozen=True)
class Piece:
    """The share of one query tile that one CTA computes."""

    tile: int
    first: int  # step of the tile
    steps: int
    whole: bool  # the whole tile: nothing to meet
    narrow: bool
    rotation: int = 0  # steps by which the order of its keys is turned

    def key_tiles(self, shape: Shape) -> int:
        """Return the number of key tiles that the piece reads."""
        if not self.narrow:
            return self.steps
        end = min((self.first + self.steps) * shape.warpgroups, shape.key_tiles)
        return end - self.first * shape.warpgroups

    def keys(self, shape: Shape, step: int) -> tuple[tuple[int, int], ...]:
        """The (head, key tile) that its step reads: one for each warpgroup if it is narrow."""
        head = self.tile // len(shape.tile_steps)
        at = self.first + (step + self.rotation) % self.steps
        if not self.narrow:
            return ((head, at),)
        first = shape.warpgroups * at
        tiles = range(first, min(first + shape.warpgroups, shape.key_tiles))
        return tuple((head, tile) for tile in tiles)


def pieces(shape: Shape, multiprocessors: int = MULTIPROCESSORS) -> list[list[Piece]]:
    """The pieces of every CTA, in the order in which it does them: from the last to the first."""
    head = shape.tile_steps
    has_narrow = len(head) * shape.rows - shape.queries >= shape.rows - BLOCK
    tiles = head * (shape.batch * shape.heads)
    total = sum(tiles)
    ctas = min(multiprocessors, total)
    shares, tile, done = [], 0, 0
    for cta in range(ctas):
        left = (cta + 1) * total // ctas - cta * total // ctas
        share = []
        while left:
            steps = min(left, tiles[tile] - done)
            narrow = has_narrow and tile % len(head) == len(head) - 1
            share.append(Piece(tile, done, steps, steps == tiles[tile], narrow))
            left -= steps
            done += steps
            if done == tiles[tile]:
                tile, done = tile + 1, 0
        shares.append(rotated(share[::-1]))
    return shares


def rotated(share: list[Piece]) -> list[Piece]:
    """Turns whole tiles, and a share that is one piece, so that step n is at key tile n."""
    done, turned = 0, []
    for piece in share:
        rotation = 0
        if not piece.narrow and (piece.whole or done == 0):
            rotation = (done - piece.first) % piece.steps
        turned.append(replace(piece, rotation=rotation))
        done += piece.steps
    return turned


def key_reads(shape: Shape, shares: list[list[Piece]]) -> Iterator[list[tuple[int, int]]]:
    """The (head, key tile) that all CTAs read together, step by step."""
    reads = [
        [piece.keys(shape, step) for piece in share for step in range(piece.steps)]
        for share in shares
    ]
    for step in range(max(map(len, reads))):
        yield [tile for read in reads if step < len(read) for tile in read[step]]


@dataclass(frozen=True)
class Prediction:
    """Efficiencies are of 1, times in seconds."""

    naive: float  # wave efficiency of one CTA per query tile
    stream_k: float
    most_pieces: int  # of one CTA
    fixup_bytes: int
    overhead: float  # pieces of the busiest CTA and the fix-up
    bytes_floor: float
    flops_floor: float
    at_target: float
    device_bytes: float  # keys and values that the L2 cache does not serve

    @property
    def rates(self) -> tuple[float, float]:
        """FLOP/s of the whole, lowest and highest, with the inner loop of loop_model.py."""
        flops = TARGET_FLOPS * self.at_target
        low, high = (
            flops / (flops / (rate * self.stream_k) + self.overhead) for rate in forward_rates()
        )
        return low, high

    @property
    def main_loop_flops(self) -> float:
        """The rate at which the inner loop makes the whole reach TARGET_FLOPS; infinite if the
        overheads alone take longer."""
        left = self.at_target - self.overhead
        if left <= 0:
            return float("inf")
        return TARGET_FLOPS * self.at_target / (left * self.stream_k)


def useful_steps(shape: Shape) -> float:
    """Steps that the exact queries and keys would fill."""
    return shape.batch * shape.heads * shape.queries * shape.keys / (shape.rows * TILE)


def wave_efficiency(shape: Shape, shares: list[list[Piece]], multiprocessors: int) -> float:
    longest = max(sum(piece.steps for piece in share) for share in shares)
    return useful_steps(shape) / (multiprocessors * longest)


def predict(shape: Shape, multiprocessors: int = MULTIPROCESSORS) -> Prediction:
    tiles = shape.batch * shape.heads * -(-shape.queries // shape.rows)
    waves = -(-tiles // multiprocessors)
    shares = pieces(shape, multiprocessors)
    most_pieces = max(map(len, shares))
    fixup = sum(fixup_bytes(piece, shape) for share in shares for piece in share)
    tile_bytes = 2 * 2 * TILE * shape.head_dim  # of keys and values, BF16
    meeting = MEETING_SECONDS + 2 * fixup / L2_BYTES if fixup else 0.0  # written, then read
    return Prediction(
        naive=useful_steps(shape) / (multiprocessors * waves * shape.key_tiles),
        stream_k=wave_efficiency(shape, shares, multiprocessors),
        most_pieces=most_pieces,
        fixup_bytes=fixup,
        overhead=most_pieces * PIECE_SECONDS + meeting,
        bytes_floor=shape.bytes / PEAK_BYTES,
        flops_floor=shape.flops / PEAK_FLOPS,
        at_target=shape.flops / TARGET_FLOPS,
        device_bytes=tile_bytes * count_misses(key_reads(shape, shares), tile_bytes),
    )


def fixup_bytes(piece: Piece, shape: Shape) -> int:
    """A part of a tile leaves float32 sums: of 64 rows per warpgroup, which all share the rows of a
    narrow tile."""
    warpgroups = 1 if piece.narrow else shape.warpgroups
    return 0 if piece.whole else warpgroups * BLOCK * shape.head_dim * 4


def shapes() -> list[Shape]:
    """The two resolutions of aapt-8b, on one GPU (24 heads) and under Ulysses."""
    return [
        Shape(queries, (512 + frames * queries,), heads)
        for queries, frames in ((1196, 32), (3600, 17))
        for heads in (3, 6, 12, 24)
    ]


def table() -> str:
    rows = [
        "PREDICTION, nothing here was measured: 132 multiprocessors, BF16, head_dim 128",
        "",
        "| queries x keys x heads | naive | stream-K | pieces per CTA | fix-up MB | overheads us |"
        " bytes floor us | FLOP floor us | us at 620 TFLOP/s | main loop TFLOP/s for that |"
        " device memory TB/s then | TFLOP/s | their middle beside the goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes():
        model = predict(shape)
        goal = GOALS.get(shape.heads)
        gap = f"{100 * (sum(model.rates) / 2 / goal - 1):+.0f} %" if goal else ""
        rows.append(
            f"| {shape.queries} x {shape.keys} x {shape.heads} | {model.naive:.3f} "
            f"| {model.stream_k:.3f} | {model.most_pieces} | {model.fixup_bytes / 1e6:.1f} "
            f"| {1e6 * model.overhead:.1f} | {1e6 * model.bytes_floor:.0f} "
            f"| {1e6 * model.flops_floor:.0f} | {1e6 * model.at_target:.0f} "
            f"| {model.main_loop_flops / 1e12:.0f} "
            f"| {model.device_bytes / model.at_target / 1e12:.2f} "
            f"| {' to '.join(f'{rate / 1e12:.0f}' for rate in model.rates)} | {gap} |"
        )
    return "\n".join([*rows, "", *narrow_heads()])


def narrow_heads() -> list[str]:
    """Lines of a table of head_dim 64: what a third warpgroup gains."""
    rows = [
        "| head_dim 64, queries x keys x heads | stream-K with 2 / 3 warpgroups |"
        " times tensor cores busy, softmax " + ", ".join(f"x {x}" for x in STRETCHES) + " | gain |",
        "|---|---|---|---|",
    ]
    for shape in shapes():
        pair = {
            groups: wave_efficiency(dealt, pieces(dealt), MULTIPROCESSORS)
            for groups in (2, 3)
            for dealt in [replace(shape, head_dim=64, warpgroups=groups)]
        }
        busy = [[pair[groups] * narrow_busy(groups, x) for groups in pair] for x in STRETCHES]
        rows.append(
            f"| {shape.queries} x {shape.keys} x {shape.heads} "
            f"| {pair[2]:.3f} / {pair[3]:.3f} "
            f"| {', '.join(f'{two:.3f} / {three:.3f}' for two, three in busy)} "
            f"| {', '.join(f'{100 * (three / two - 1):+.0f} %' for two, three in busy)} |"
        )
    return rows


if __name__ == "__main__":
    print(table())
