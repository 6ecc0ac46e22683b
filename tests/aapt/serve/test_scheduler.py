"""The generator thread: fair parts of measured time, errors that hurt one flow alone."""

import threading
from collections import Counter

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve import scheduler as module  # noqa: E402
from aapt.serve.scheduler import Scheduler  # noqa: E402


class Clock:
    """A clock that slices of flows put forward."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Slices:
    """A flow whose slices each cost `cost` seconds, due every `period` seconds after the last."""

    def __init__(self, clock, cost, period=0.0):
        self.clock, self.cost, self.period = clock, cost, period
        self.next = self.spent = self.late = 0.0

    def due(self):
        return self.next

    def run(self):
        self.late = max(self.late, self.clock.now - self.next)
        self.next = self.clock.now + self.period
        self.clock.now += self.cost
        self.spent += self.cost


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run(scheduler, clock, seconds):
    """Runs slices on this thread; where nothing is due the clock is put forward."""
    while clock.now < seconds:
        if all(flow.due() > clock.now for flow in scheduler._order):
            clock.now = min(flow.due() for flow in scheduler._order)
        scheduler.run_slice()


@pytest.mark.parametrize("costs", [(0.03, 0.03), (0.01, 0.1), (0.001, 0.02, 0.3), (0.05,) * 8])
def test_flows_that_wait_get_equal_time(clock, costs):
    scheduler = Scheduler()
    flows = [Slices(clock, cost) for cost in costs]
    for flow in flows:
        scheduler.add(flow)
    run(scheduler, clock, 60.0)
    share = clock.now / len(flows)
    for flow in flows:
        assert abs(flow.spent - share) < 0.1 * share


def test_a_flow_that_never_waits_is_served_at_once(clock):
    """One stream of 30 ms a step keeps its pace beside recordings that always want more."""
    scheduler = Scheduler()
    stream = Slices(clock, 0.03, period=0.167)
    for flow in (stream, Slices(clock, 0.04), Slices(clock, 0.04)):
        scheduler.add(flow)
    run(scheduler, clock, 60.0)
    assert stream.late <= 0.04 + 0.04 + 1e-9  # one slice of each of the others
    assert stream.spent / clock.now > 0.03 / (0.167 + 0.08)


class Joining(Slices):
    """A flow whose slices several flows can make at once, at the cost of one."""

    joined = 0  # slices made with others

    def is_step(self):
        return True

    @staticmethod
    def together(flows):
        for flow in flows:
            flow.late = max(flow.late, flow.clock.now - flow.next)
            flow.next = flow.clock.now + flow.cost + flow.period
            flow.spent += flow.cost / len(flows)
            flow.joined += 1
        flows[0].clock.now += flows[0].cost


class Apart(Slices):
    """A flow of a scheduler with joint slices whose own are never among them."""

    def is_step(self):
        return False


def test_flows_that_join_share_their_time_fairly(clock):
    scheduler = Scheduler(Joining.together)
    joining, apart = [Joining(clock, 0.03) for _ in range(3)], Apart(clock, 0.1)
    for flow in (joining[0], apart, *joining[1:]):
        scheduler.add(flow)
    run(scheduler, clock, 60.0)
    share = clock.now / 4
    for flow in (*joining, apart):
        assert abs(flow.spent - share) < 0.1 * share
    assert joining[0].joined > 0.9 * 3 * share / 0.03  # each slice was for all three


def test_a_flow_that_is_not_due_does_not_join(clock):
    scheduler = Scheduler(Joining.together)
    flows = [Joining(clock, 0.01, period=0.1), Joining(clock, 0.01, period=0.1)]
    flows[1].next = 0.05
    for flow in flows:
        scheduler.add(flow)
    run(scheduler, clock, 10.0)
    assert [flow.joined for flow in flows] == [0, 0]
    assert all(flow.spent > 0.8 for flow in flows)


class Steps(Slices):
    """A flow on the real clock that fails in a given slice."""

    def __init__(self, count, fails=None):
        self.count, self.fails, self.made = count, fails, 0
        self.over, self.error = threading.Event(), None

    def due(self):
        return 0.0 if self.made < self.count and self.error is None else None

    def run(self):
        self.made += 1
        if self.made == self.fails:
            raise RuntimeError("broken")
        if self.made == self.count:
            self.over.set()

    def fail(self, error):
        self.error = str(error)
        self.over.set()


def test_an_error_ends_its_flow_alone():
    scheduler = Scheduler()
    flows = [Steps(5), Steps(5, fails=2), Steps(5)]
    for flow in flows:
        scheduler.add(flow)
    scheduler.start()
    assert all(flow.over.wait(60) for flow in flows)
    assert [flow.made for flow in flows] == [5, 2, 5]
    assert [flow.error for flow in flows] == [None, "broken", None]
    assert scheduler.alive
    scheduler.stop()
    assert not scheduler.alive


def test_a_flow_that_is_taken_out_is_not_run(clock):
    scheduler = Scheduler()
    flows = [Slices(clock, 1.0), Slices(clock, 1.0)]
    for flow in flows:
        scheduler.add(flow)
    run(scheduler, clock, 10.0)
    scheduler.remove(flows[0])
    scheduler.remove(flows[0])
    before = Counter(spent=flows[0].spent)
    run(scheduler, clock, 20.0)
    assert flows[0].spent == before["spent"] and flows[1].spent > 10
