"""Places, and messages for slow clients."""

import asyncio

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve.line import Line  # noqa: E402
from aapt.serve.outbox import MAX_FRAMES, MAX_TEXT_BYTES, MAX_TEXTS, Outbox  # noqa: E402
from aapt.serve.protocol import Pong, Uploaded  # noqa: E402


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_places_are_given_in_the_order_of_asking():
    async def visit():
        line, told = Line(2), {name: [] for name in "abcde"}
        tasks = {}
        for name in "abcde":
            tasks[name] = asyncio.create_task(line.enter(told[name].append))
            await settle()
        assert [tasks[name].done() for name in "abcde"] == [True, True, False, False, False]
        assert (line.taken, line.waiting) == (2, 3)
        tasks["d"].cancel()
        await settle()
        line.leave()
        await settle()
        assert tasks["c"].done() and not tasks["e"].done()
        assert told == {"a": [], "b": [], "c": [1], "d": [2], "e": [3, 2, 1]}
        line.leave()
        line.leave()
        await settle()
        assert tasks["e"].done() and (line.taken, line.waiting) == (1, 0)

    asyncio.run(visit())


def test_a_place_given_to_one_that_leaves_is_not_lost():
    async def visit():
        line = Line(1)
        await line.enter(print)
        first, second = (asyncio.create_task(line.enter(lambda place: None)) for _ in range(2))
        await settle()
        line.leave()  # the first has it, and leaves before it knows
        first.cancel()
        await settle()
        assert first.cancelled() and second.done() and line.taken == 1

    asyncio.run(visit())


def test_of_unsent_frames_the_oldest_are_dropped():
    async def send():
        outbox = Outbox()
        for number in range(5):
            outbox.put(bytes([number]), lane=number % 2)
            outbox.put(Pong(time=number))
        got = [await outbox.get() for _ in range(9)]
        assert [item[0] for item in got if isinstance(item, bytes)] == [1, 2, 3, 4]
        assert [item for item in got if isinstance(item, str)] == [
            f'{{"type":"pong","time":{number}.0}}' for number in range(5)
        ]
        assert outbox.dropped == 5 - 2 * MAX_FRAMES + 0
        assert not outbox.full

    asyncio.run(send())


def test_an_outbox_that_nobody_empties_is_full():
    outbox = Outbox()
    for number in range(MAX_TEXTS + 1):
        assert not outbox.full
        outbox.put(Pong(time=number))
    assert outbox.full


def test_a_file_that_waits_is_no_sign_of_a_client_that_has_stopped_reading():
    outbox = Outbox()
    outbox.put(bytes(MAX_TEXT_BYTES + 1))
    assert not outbox.full
    for _ in range(2):
        outbox.put(Uploaded(error="x" * (MAX_TEXT_BYTES // 2)))
    assert outbox.full
