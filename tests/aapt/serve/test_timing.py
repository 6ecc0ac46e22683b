"""When a session's next slice is due, and what it is: a step on time, an early one, a redo."""

import sys

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve import protocol  # noqa: E402
from aapt.serve.metrics import Metrics  # noqa: E402
from aapt.serve.scheduler import Scheduler  # noqa: E402
from aapt.serve.server import SWITCH_SECONDS  # noqa: E402
from aapt.serve.session import EARLY, SETTLE, Place, Session  # noqa: E402
from aapt.serve.settings import Settings  # noqa: E402
from aapt.serve.world import World  # noqa: E402
from aapt.streaming.actions import Walk  # noqa: E402


class Clock:
    """Stands still until a test moves it."""

    now = 1000.0

    def perf_counter(self):
        return self.now

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("aapt.serve.session.time", clock)
    return clock


@pytest.fixture
def session(generator, picture, clock):
    """A session that has made its first step at second 1000, whose slices the test runs."""
    world = World(generator, Walk("small", "5e0c", picture, "ab", seed=0), Settings())
    place = Place(world.walk, 0, 0, world.prompt)
    session = Session(world, place, Scheduler(), Metrics(), lambda message, lane: None, "jpeg")
    session.post(session.resume())
    session.post(session.play(True))
    while session._jobs:
        session.run()
    session.run()
    assert session.place.step == 1 and session.due() == 1000.0 + session.period
    yield session
    session.close(lambda place: None)
    session.run()


def press(session, sequence, shown=None, **control):
    facts = {"type": "input", "sequence": sequence, "time": 0.0, "shown": shown}
    session.put_input(protocol.Input(**facts, **control))


def test_a_changed_control_makes_the_next_step_early(session, clock):
    clock.now += 0.1 * session.period
    press(session, 1, yaw=1.0)
    assert session.due() == 1000.0 + EARLY * session.period
    press(session, 2, yaw=1.0)  # says it again: nothing has changed
    assert session.due() == 1000.0 + EARLY * session.period
    clock.now = session.due()
    session.run()
    step = session.world.walk.branches[0].steps[-1]
    assert session.place.step == 2 and step.yaw == 1.0
    # The pace stays: the step after it is as late as if this one had been on time
    assert session.due() == pytest.approx(1000.0 + 2 * session.period)


def test_controls_that_change_in_every_step_gain_a_quarter_of_a_period_once(session, clock):
    """Each step a quarter earlier than the one before would leave the page without frames, for as
    long, once the keys rest."""
    for number in range(1, 7):
        clock.now += 0.1 * session.period
        press(session, number, yaw=1.0 if number % 2 else -1.0)
        clock.now = session.due()
        assert clock.now == pytest.approx(1000.0 + (number - 1 + EARLY) * session.period)
        session.run()
    assert session.due() == pytest.approx(1000.0 + 7 * session.period)


def test_an_early_step_waits_for_more_keys_but_no_step_is_late_for_them(session, clock):
    session.period = 1.0
    session._due, session._earliest = 1001.0, 1000.75
    clock.now = 1000.8
    press(session, 1, yaw=1.0)
    clock.now += SETTLE / 2
    press(session, 2, yaw=1.0, forward=1.0)
    assert session.due() == 1000.8 + SETTLE
    session._due = 1000.805
    assert session.due() == 1000.805


def test_a_redo_waits_for_more_keys_and_gives_way_to_a_step(session, clock):
    session.world.redo = True
    session._due = clock.now
    session.run()
    session._due = 1002.0
    press(session, 1, yaw=1.0, shown=protocol.Shown(step=2, frames=1))
    assert session.due() == 1000.0 + SETTLE and not session.is_step()
    clock.now += SETTLE
    session.run()
    again = session.world.walk.branches[0].steps[-1]
    assert session.place.step == 2 and (again.yaw, len(again.redone)) == (1.0, 1)
    assert session.due() == 1002.0
    press(session, 2, yaw=-1.0, shown=protocol.Shown(step=2, frames=1))
    clock.now = 1002.0
    assert session.is_step()  # which honours the key anyway
    session.run()
    steps = session.world.walk.branches[0].steps
    assert [(step.yaw, len(step.redone)) for step in steps[1:]] == [(1.0, 1), (-1.0, 0)]


@pytest.mark.parametrize(
    ("step", "frames", "told", "sent", "seen"),
    [
        (7, 1, 0.0, 9.0, 1),  # the page has just said so
        (7, 1, 1.2, 9.0, 2),  # about one frame ago
        (7, 4, 0.0, 9.0, 4),
        (7, 3, 9.0, 9.0, 4),  # there are no more
        (6, 3, 2.2, 9.0, 1),  # one frame of the step before was left
        (6, 3, 0.0, 9.0, 0),
        (6, 4, 2.0, 0.8, 1),  # the page has waited for this step
        (8, 0, 0.0, 9.0, 4),  # not of this step: nothing of it is to be shown
    ],
)
def test_frames_seen_follow_from_what_the_page_said(session, step, frames, told, sent, seen):
    """Times in frames before the moment that is asked for."""
    fps, at = session.world.generator.fps, 2000.0
    session._shown = protocol.Shown(step=step, frames=frames)
    session._shown_at, session._sent_at = at - told / fps, at - sent / fps
    assert session._seen(7, 4, at) == seen


def test_without_word_from_the_page_all_frames_count_as_seen(session):
    assert session._seen(7, 4, 2000.0) == 4


def test_the_event_loop_need_not_wait_long_for_the_generator_thread(serve):
    before = sys.getswitchinterval()
    try:
        serve()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    finally:
        sys.setswitchinterval(before)
