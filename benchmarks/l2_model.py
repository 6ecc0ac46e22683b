"""Counts what a schedule reads from device memory, through an L2 cache with least-recent eviction.

    python -m benchmarks.l2_model

A model: all multiprocessors take a step at the same time, and nothing else is in the cache. The
command prints what a part of the cache that persists from step to step could save.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

# H100 and H200 have 50 MB in two halves, and a line that both halves read is kept twice: assumed.
L2_BYTES = 30e6
PERSISTING_BYTES = 32e6  # cudaDevAttrMaxPersistingL2CacheSize of an H100: assumed
PEAK_BYTES = 3.0e12  # per second, of an H100's memory


def count_misses(steps: Iterable[Iterable[Hashable]], tile_bytes: int) -> int:
    """Returns how many tiles are read from device memory.

    steps: the tiles that the multiprocessors read together, one after another; a tile that several
    of them read in one step is read once.
    """
    capacity = int(L2_BYTES / tile_bytes)
    cache: OrderedDict[Hashable, None] = OrderedDict()
    misses = 0
    for step in steps:
        for tile in dict.fromkeys(step):
            if tile in cache:
                cache.move_to_end(tile)
                continue
            misses += 1
            cache[tile] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
    return misses


@dataclass(frozen=True)
class Pinned:
    """The rows of a cache that every step reads again: text and first frame, in bfloat16.

    step_seconds: of a whole step, predicted (`aapt bench stream --predict h100`).
    """

    layers: int
    rows: int
    width: int
    step_seconds: float

    @property
    def bytes(self) -> int:
        return 2 * 2 * self.layers * self.rows * self.width  # keys and values

    @property
    def saved(self) -> float:
        """The largest share of a step that a window of L2 persistence can save: reading from the
        device's memory what fits it, while nothing else does its work from L2."""
        return min(self.bytes, PERSISTING_BYTES) / PEAK_BYTES / self.step_seconds


PINNED = {
    "aapt-8b, 736x416": Pinned(36, 512 + 1196, 3072, 59e-3),
    "aapt-8b, 1280x720": Pinned(36, 512 + 3600, 3072, 236e-3),
    "tiny-world, 128x80": Pinned(6, 24 + 40, 192, 0.63e-3),
}


def table() -> str:
    rows = [
        "PREDICTION, nothing here was measured: an L2 window over pinned text and first frame",
        "",
        "| model | pinned MB | MB that may persist | saved at most |",
        "|---|---|---|---|",
    ]
    for name, pinned in PINNED.items():
        kept = min(pinned.bytes, PERSISTING_BYTES)
        rows.append(
            f"| {name} | {pinned.bytes / 1e6:.1f} | {kept / 1e6:.1f} | {pinned.saved:.3%} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
