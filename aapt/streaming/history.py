"""A bounded history of snapshots: dense in the last minute, thinner the older it is."""

from dataclasses import dataclass

import numpy as np

from .actions import Walk
from .snapshot import Snapshot


@dataclass(frozen=True)
class Kept:
    """The snapshot after a step of a branch, the step's video frames, and the time in steps at
    which it was added."""

    branch: int
    step: int
    added: int
    snapshot: Snapshot
    frames: np.ndarray

    @property
    def bytes(self) -> int:
        return self.snapshot.bytes + self.frames.nbytes


class History:
    """Snapshots of a walk within `budget` bytes, one every `every` steps.

    When they exceed the budget, the snapshot goes whose absence costs least: the replay between its
    neighbours, divided by its age. Those of the last `recent` steps are spared unless they fill
    two thirds of the budget. A snapshot larger than the budget is not kept; a jump then replays
    from the first frame.
    """

    def __init__(self, walk: Walk, budget: int, every: int, recent: int):
        self.walk, self.budget, self.every, self.recent = walk, budget, every, recent
        self.bytes = 0
        self._clock = 0
        self._kept: dict[tuple[int, int], Kept] = {}

    def wants(self, branch: int, step: int) -> bool:
        """True if no snapshot of the last `every` - 1 steps before this step is kept."""
        nearest = self.nearest(branch, step)
        return nearest is None or step - nearest.step >= self.every

    def add(self, branch: int, step: int, snapshot: Snapshot, frames: np.ndarray) -> None:
        """Keeps a snapshot, and drops others if the budget asks for it."""
        self.discard(branch, step)
        self._clock += self.every
        kept = Kept(branch, step, self._clock, snapshot, frames)
        self._kept[branch, step] = kept
        self.bytes += kept.bytes
        while self.bytes > self.budget:
            recent = {place for place, kept in self._kept.items() if self._age(kept) < self.recent}
            full = 3 * sum(self._kept[place].bytes for place in recent) > 2 * self.budget
            spared = set() if full else recent
            self.discard(*min(self._kept.keys() - spared, key=self._worth))

    def _age(self, kept: Kept) -> int:
        return self._clock - kept.added

    def discard(self, branch: int, step: int) -> None:
        """Drops the snapshot of a step, if there is one."""
        if kept := self._kept.pop((branch, step), None):
            self.bytes -= kept.bytes

    def _worth(self, place: tuple[int, int]) -> float:
        kept = self._kept[place]
        before = self.nearest(kept.branch, kept.step - 1) if kept.step else None
        after = [k.step for k in self._kept.values() if k.branch == kept.branch]
        following = min((step for step in after if step > kept.step), default=None)
        end = self.walk.branches[kept.branch].end if following is None else following
        gap = end - (before.step if before else 0)
        return (gap + 1) / (self._age(kept) + self.every)

    def nearest(self, branch: int, step: int) -> Kept | None:
        """Returns the latest snapshot at or before a step on the path to it, if any."""
        for part, first, last in self.walk.lineage(branch, step):
            lowest = 0 if part == 0 else first
            on_path = [
                kept
                for kept in self._kept.values()
                if kept.branch == part and lowest <= kept.step <= last
            ]
            if on_path:
                return max(on_path, key=lambda kept: kept.step)
        return None

    def places(self) -> list[tuple[int, int]]:
        """Returns (branch, step) of all snapshots."""
        return sorted(self._kept)

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self._kept

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0
