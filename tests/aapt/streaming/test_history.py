"""Histories of snapshots: within their budget, dense lately and thin before."""

from dataclasses import dataclass

import numpy as np
import pytest

from aapt.streaming.actions import Step, Walk
from aapt.streaming.history import History

BYTES = 1000
FRAMES = np.zeros((4, 8, 8, 3), np.uint8)
ONE = BYTES + FRAMES.nbytes


@dataclass(frozen=True)
class FakeSnapshot:
    name: str
    bytes: int = BYTES


def played(steps, budget, every=10, recent=60):
    """A history after `steps` steps of branch 0."""
    walk = Walk("small", "5e0c", FRAMES[0], "ab", 0)
    history = History(walk, budget, every, recent)
    for number in range(steps + 1):
        if number:
            walk.append(0, number - 1, Step(0.0, 0.0, "ab"))
        if history.wants(0, number):
            history.add(0, number, FakeSnapshot(f"0:{number}"), FRAMES)
    return walk, history


def test_all_snapshots_stay_within_a_large_budget():
    _, history = played(100, budget=100 * ONE)
    assert history.places() == [(0, step) for step in range(0, 101, 10)]
    assert history.bytes == 11 * ONE


@pytest.mark.parametrize("count", [3, 12, 20])
def test_the_budget_holds_and_old_snapshots_are_thinned(count):
    _, history = played(3000, budget=count * ONE)
    assert history.bytes == count * ONE
    steps = [step for _, step in history.places()]
    gaps = np.diff([0, *steps, 3000])
    if count > 6:
        recent = [step for step in steps if step >= 2945]
        assert len(recent) >= 5, "the last minute is dense"
        assert gaps.max() > 100, "older steps are not"
    longest = np.array([3000 - step for step in steps])[:-1]
    assert (gaps[1:-1] <= 2 * longest + 60).all(), "no gap is much longer than it is old"


def test_a_snapshot_above_the_budget_is_not_kept():
    _, history = played(50, budget=BYTES)
    assert history.places() == [] and history.bytes == 0
    assert history.nearest(0, 50) is None


def test_the_nearest_snapshot_is_on_the_path():
    walk, history = played(50, budget=100 * ONE)
    branch = walk.split(0, 25)
    for number in range(25, 40):
        walk.append(branch, number, Step(1.0, 0.0, "ab"))
    history.add(branch, 33, FakeSnapshot("1:33"), FRAMES)
    for place, expected in (
        ((0, 50), "0:50"),
        ((0, 49), "0:40"),
        ((0, 9), "0:0"),
        ((branch, 40), "1:33"),
        ((branch, 33), "1:33"),
        ((branch, 32), "0:20"),  # 0:30 is in another future
        ((branch, 12), "0:10"),
    ):
        assert history.nearest(*place).snapshot.name == expected


def test_a_snapshot_takes_the_place_of_that_of_its_step():
    _, history = played(10, budget=100 * ONE)
    history.add(0, 10, FakeSnapshot("again", 3 * BYTES), FRAMES)
    assert history.nearest(0, 10).snapshot.name == "again"
    assert history.bytes == 2 * ONE + 2 * BYTES
    history.clear()
    assert history.bytes == 0 and (0, 10) not in history
