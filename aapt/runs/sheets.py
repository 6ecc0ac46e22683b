"""The moments to draw sheets of samples, which together take a small share of the time."""

import time
from collections.abc import Callable

SHARE = 0.05  # of the time of training


class Sheets:
    """Decides when sheets are drawn, and measures what they cost.

    A sheet that would bring all sheets above SHARE of the time so far, if it took as long as the
    last one, waits for a later update. The first sheet is always drawn.

    Args:
        every: Updates from one sheet to the next.
    """

    def __init__(self, every: int, clock: Callable[[], float] = time.perf_counter):
        self.every, self.clock = every, clock
        self.begun = clock()
        self.spent = self.last = 0.0
        self.waiting = False

    def due(self, done: int) -> bool:
        """True if a sheet is to be drawn after `done` updates. Called after every update."""
        self.waiting |= done % self.every == 0
        elapsed = self.clock() - self.begun
        return self.waiting and self.spent + self.last <= SHARE * (elapsed + self.last)

    def drawn(self, seconds: float) -> None:
        """Record that a sheet was drawn, and how many seconds it took."""
        self.last = seconds
        self.spent += seconds
        self.waiting = False
