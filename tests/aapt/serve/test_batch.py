"""Sessions stepped in one pass: near a run alone, marked in their logs, failing alone."""

from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt import Control  # noqa: E402
from aapt.serve.batch import run_together  # noqa: E402
from aapt.serve.client import Client  # noqa: E402
from aapt.serve.metrics import Metrics  # noqa: E402
from aapt.serve.scheduler import Scheduler  # noqa: E402
from aapt.serve.session import Place, Sample, Session  # noqa: E402
from aapt.serve.settings import Settings  # noqa: E402
from aapt.serve.world import World  # noqa: E402
from aapt.streaming.actions import Replay, Walk  # noqa: E402

from .test_play import get_log, opened, step_to  # noqa: E402


@pytest.fixture
def sessions(generator, picture):
    """Three sessions being played, at steps 0, 1 and 2, whose slices the test runs."""
    with playing(generator, picture) as made:
        yield made


@contextmanager
def playing(generator, picture):
    """Makes the three sessions of `sessions` for this generator, and closes them."""
    made = []
    for number, prompt in enumerate(("ab", "cd", "ab")):
        walk = Walk("small", "5e0c", picture, prompt, seed=number, cache=generator.cache)
        world = World(generator, walk, Settings())
        place = Place(world.walk, 0, 0, world.prompt)
        flow = Scheduler(), Metrics()
        session = Session(world, place, *flow, lambda message, lane: None, "jpeg")
        session.post(session.resume())
        session.post(session.play(True))
        for _ in range(2 + number):
            session.run()
        assert world.place() == (0, number)
        made.append(session)
    yield made
    for session in made:
        session.close(lambda place: None)
        run_jobs(session)


def run_jobs(session):
    """Runs slices of one session until its jobs are done."""
    while session._jobs:
        session.run()


def assert_replayed(session, shared, together):
    """The log replays near what was played, and does not complain of it."""
    world = session.world
    path = world.walk.path(*world.place())
    assert [step.together for step in path] == together
    replay = Replay(world.generator, world.walk)
    for step in path:
        frames = replay.step(step)
    assert (replay.shared, replay.differing) == (shared, [])
    assert np.abs(frames.astype(int) - world.lanes[0].frames).max() <= 1
    replay.close()


def test_logs_mark_the_steps_of_a_shared_pass(sessions):
    for _ in range(4):
        for number, session in enumerate(sessions):
            session._inputs[0] = Sample(held=Control((number - 1) / 2, 1.0))
        run_together(sessions)
    for number, session in enumerate(sessions):
        assert session.place.step == number + 4
        assert_replayed(session, number + 1, [1] * number + [3] * 4)


def test_seeks_redos_and_splits_are_those_of_one_session(sessions):
    first, second, third = sessions
    first.world.redo = True
    run_together(sessions)
    run_together(sessions)
    first.world.again(first.world.lanes[0], Control(-1.0, 0.0), 2)
    second.post(second.seek(0, 1), seek=True)
    second.post(second.play(True))
    third.post(third.split(0, 3, [None, None]))
    for session in (second, third):
        assert not session.is_step()
        run_jobs(session)
    run_together(sessions)
    second.run()
    assert_replayed(first, 1, [3, 1, 3])
    assert third.world.walk.branches[1].end == 4
    assert second.world.place() == (1, 3)


def broken(*_):
    raise RuntimeError("no memory")


def test_a_session_that_fails_ends_alone(sessions, monkeypatch):
    decoder = sessions[1].world.lanes[0].stream._memory.decoder
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "next", broken)
        run_together(sessions)
    assert [session.ended for session in sessions] == [None, "failed", None]
    run_together([sessions[0], sessions[2]])
    assert_replayed(sessions[0], 1, [3, 2])
    assert_replayed(sessions[2], 3, [1, 1, 3, 2])


def test_after_a_pass_that_fails_each_session_is_stepped_alone(sessions, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("aapt.serve.batch.step_together", broken)
        run_together(sessions)
    assert all(session.ended is None for session in sessions)
    for number, session in enumerate(sessions):
        assert_replayed(session, None, [1] * (number + 1))


@pytest.mark.parametrize("batch", [False, True])
def test_a_server_says_whether_worlds_share_passes(serve, talk, generator, batch):
    async def conversation():
        async with await Client.connect(serve(batch=batch).url) as client:
            assert client.welcome["batch"] is batch
            await opened(client)
            await step_to(client, 4)
            return await get_log(client)

    walk = talk(conversation())  # one visitor has the bits of a run alone either way
    replay = Replay(generator, walk)
    for step in walk.path(0, walk.branches[0].end):
        replay.step(step)
    assert (replay.shared, replay.differing) == (None, [])
