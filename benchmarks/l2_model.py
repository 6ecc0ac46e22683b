"""Counts what a schedule reads from device memory, through an L2 cache with least-recent eviction.

A model: all multiprocessors take a step at the same time, and nothing else is in the cache.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable

# H100 and H200 have 50 MB in two halves, and a line that both halves read is kept twice: assumed.
L2_BYTES = 30e6


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
