"""What is kept of a world: when it closes, around its replay, and how many branches."""

import threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve import protocol  # noqa: E402
from aapt.serve.metrics import Metrics  # noqa: E402
from aapt.serve.scheduler import Scheduler  # noqa: E402
from aapt.serve.sender import Sender  # noqa: E402
from aapt.serve.session import Place, Session  # noqa: E402
from aapt.serve.settings import Settings  # noqa: E402
from aapt.serve.world import World  # noqa: E402
from aapt.streaming.actions import Walk  # noqa: E402

from .conftest import HANGS  # noqa: E402


@pytest.fixture
def start(generator, picture):
    """The place of a world that nobody has opened."""
    walk = Walk("small", "5e0c", picture, "ab", seed=0, cache=generator.cache)
    return Place(walk, 0, 0, walk.prompt)


class Visit:
    """A session of a place, whose slices the test runs."""

    def __init__(self, generator, place, **settings):
        self.heard, self.kept = [], []
        world = World(generator, place.walk, Settings(**settings))
        self.scheduler = Scheduler()
        flow = self.scheduler, Metrics()
        self.session = Session(world, place, *flow, self.hear, "jpeg")
        self.session.post(self.session.resume())

    def hear(self, message, lane):
        self.heard.append(message)

    def work(self):
        """Runs all jobs."""
        while self.session._jobs:
            self.scheduler.run_slice()
        return self

    def play(self, steps):
        self.session.post(self.session.play(True))
        self.work()
        for _ in range(steps):
            self.session.run()
        return self

    def close(self):
        """Returns the place that is kept."""
        self.session.close(self.kept.append)
        self.work()
        assert self.session not in self.scheduler._credit and not self.session.world.lanes
        (place,) = self.kept
        return place


def test_a_world_that_is_lost_again_before_it_is_open_stands_where_it_stood(generator, start):
    place = Visit(generator, start).work().play(3).close()
    assert (place.branch, place.step) == (0, 3) and place.snapshot
    place = replace(place, prompt="cd")
    assert Visit(generator, place).close() == place
    again = Visit(generator, place).work()
    assert again.session.place.step == 3 and again.session.world.prompt == "cd"
    assert again.close().step == 3


def test_a_world_that_is_lost_in_its_replay_stands_where_it_stood(generator, start):
    place = Visit(generator, start).work().play(3).close()
    place = replace(place, snapshot=None, frames=None)
    visit = Visit(generator, place)
    for _ in range(2):
        visit.scheduler.run_slice()
    assert visit.session.world.lanes[0].seeking and visit.session.place == place
    assert visit.close() == place


def test_a_world_without_memory_for_its_snapshot_is_closed_none_the_less(
    generator, start, monkeypatch, caplog
):
    visit = Visit(generator, start).work().play(2)

    def snapshot():
        raise MemoryError("full")

    monkeypatch.setattr(visit.session.world.lanes[0].stream, "snapshot", snapshot)
    place = visit.close()
    assert place.step == 2 and place.snapshot is None
    assert "the snapshot of a closed world could not be taken" in caplog.text


def test_a_world_that_has_failed_is_replayed(generator, start):
    place = Visit(generator, start).work().play(2).close()
    visit = Visit(generator, place)
    visit.session.fail(RuntimeError("broken"))
    kept = visit.close()
    assert (kept.step, kept.snapshot, kept.frames) == (2, None, None)


def test_branches_have_a_limit(generator, start):
    """Work per step grows with them. A split needs two; a step in the past begins one."""
    visit = Visit(generator, start, branches=3).work().play(2)
    session = visit.session

    def split():
        session.post(session.split(0, 1, [None, None]))
        visit.work()

    split()
    assert len(session.world.walk.branches) == 3
    session.post(session.join())
    split()
    error = visit.heard[-1]
    assert error.message == "split: expected at most 3 branches, got 3 and two more"
    session.post(session.seek(0, 1))
    visit.play(1)
    assert len(session.world.walk.branches) == 4 and session.ended is None
    session.run()
    assert session.ended == "limit" and visit.heard[-1] == protocol.Ended(reason="limit")


def test_all_is_sent_before_the_next_world_may_open():
    """Video is encoded on a thread of its own, which may be behind."""
    order, encodes, closed = [], threading.Event(), threading.Event()

    class Encoder:
        format = "h264"

        def encode(self, frames):
            assert encodes.wait(HANGS)
            return [b"image"] * len(frames)

    sender = Sender(lambda message, lane: order.append(lane), Encoder())
    header = protocol.FrameHeader(branch=0, step=1, count=1, lane=1)
    for _ in range(2):
        sender.send_frames(header, np.zeros((1, 16, 16, 3), np.uint8))
    sender.send(protocol.Ended(reason="limit"))
    sender.close(lambda: (order.append("closed"), closed.set()))
    assert order == []
    encodes.set()
    assert closed.wait(HANGS)
    assert order == [1, 1, None, "closed"]
