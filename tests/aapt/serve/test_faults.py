"""Visitors that die, send garbage, flood or do not read: nobody else notices, memory returns."""

import asyncio
import gc
import itertools
import json
import os
import socket
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve import connection  # noqa: E402
from aapt.serve.client import Client, Frames, Refused  # noqa: E402
from aapt.serve.scheduler import QUANTUM  # noqa: E402
from aapt.streaming.actions import Replay  # noqa: E402

from .test_play import encoded, get_log, opened, step_to  # noqa: E402


def resident():
    """Memory of this process, in bytes, after what is free is given back."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept(running):
    """True while a lost world is kept that will be forgotten at once."""
    return running.play.kept and not running.play.settings.keep_seconds


async def settled(running):
    """Waits until all worlds are closed."""
    while running.play.sessions or running.play.line.taken or kept(running):
        await asyncio.sleep(0.01)


async def play_to_the_end(running, seed, steps):
    """A well-behaved visitor: plays, and checks every frame that came with a run alone."""
    async with await Client.connect(running.url) as client:
        await opened(client, seed=seed)
        await client.input(yaw=(seed % 3 - 1) / 2, forward=1.0)
        made = await step_to(client, steps)
        return made, await get_log(client)


async def killed(running, seed):
    """Dies in the middle of a frame, again and again."""
    for _ in range(3):
        client = await Client.connect(running.url)
        await opened(client, seed=seed)
        await client.send("play")
        await client.frames()
        await client.send("seek", branch=0, step=1)
        client.socket.transport.abort()


async def garbage(running):
    """Sends what is not of the protocol; each time one line comes back and the connection ends."""
    for data in (
        "{",
        "[]",
        '{"type":"hello","protocol":1}',
        '{"type":"input"}',
        json.dumps({"type": "x" * 1000}),
    ):
        client = await Client.connect(running.url)
        await opened(client)
        await client.send("play")
        await client.socket.send(data)
        with pytest.raises(Refused) as error:
            while True:
                await client.receive()
        assert "\n" not in str(error.value)


async def oversize(running):
    client = await Client.connect(running.url)
    with pytest.raises(Refused, match="message: expected at most 65536 bytes, got 100045"):
        await client.send("prompt", sequence=1, text="x" * 100_000)
        await client.text("never")


async def flood(running):
    client = await Client.connect(running.url)
    await opened(client)
    with pytest.raises(Refused, match="messages: expected (at most 20 per second|a client that)"):
        for _ in range(5000):
            await client.send("ping", time=0)
            await asyncio.sleep(0)
        await client.text("never")


async def slow(running, over):
    """Reads nothing until the others have finished; then its frames are soon of the present."""
    client = await Client.connect(running.url, max_queue=1, ping_interval=None)
    await opened(client)
    await client.send("play")
    await over.wait()
    session = running.play.sessions[client.welcome["token"]]
    while (await client.frames()).header.step < session.place.step - 3:
        pass
    client.socket.transport.abort()


def test_eight_visitors_and_their_faults(serve, talk, generator, monkeypatch):
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 1e6)  # the slow one may be slow
    running = serve(sessions=8, messages_per_second=20)
    steps = 30

    async def conversation():
        over = asyncio.Event()
        bad = [killed(running, 50), killed(running, 51), garbage(running), oversize(running)]
        tasks = [asyncio.create_task(task) for task in (*bad, flood(running), slow(running, over))]
        good = [play_to_the_end(running, seed, steps) for seed in (1, 2, 3)]
        results = await asyncio.gather(*good)
        over.set()
        await asyncio.gather(*tasks)
        await settled(running)
        return results

    for made, walk in talk(conversation()):
        assert max(made) >= steps
        stream = Replay(generator, walk)
        for number, step in enumerate(walk.path(0, walk.branches[0].end), start=1):
            frames = stream.step(step)
            assert number not in made or made[number].images == encoded(frames)
        assert stream.differing == []
    play = running.play
    assert play.line.taken == 0 and not play.scheduler._order
    assert all(place.history is None for _, place in play.kept.values())


def test_worlds_that_are_played_at_once_get_equal_shares(serve, talk):
    """Each gets as much of the device's time on a machine that cannot keep the pace, up to a slice
    and what a turn may save."""
    running = serve(sessions=4)
    spent, slices = [0.0] * 4, []

    def timed(number, run):
        def run_and_time():
            started = time.perf_counter()
            run()
            slices.append(time.perf_counter() - started)
            spent[number] += slices[-1]

        return run_and_time

    async def conversation():
        clients = [await Client.connect(running.url, ping_interval=None) for _ in range(4)]
        for seed, client in enumerate(clients):
            await opened(client, seed=seed)
        sessions = list(running.play.sessions.values())
        for session in sessions:
            session.period = 0.0  # every step is due at once
        for client in clients:
            await client.send("play")
        while min(session.place.step for session in sessions) < 5:
            await asyncio.sleep(0.01)
        for number, session in enumerate(sessions):
            session.run = timed(number, session.run)
        begun = [session.place.step for session in sessions]
        while min(s.place.step - start for s, start in zip(sessions, begun)) < 100:
            await asyncio.sleep(0.01)
        shares = list(spent)
        for client in clients:
            client.socket.transport.abort()
        await settled(running)
        return shares

    shares = talk(conversation())
    owed = 2 * (max(slices) + QUANTUM)
    assert max(shares) - min(shares) <= owed + 0.1 * max(shares)


def test_two_hundred_opens_and_closes_leave_nothing(serve, talk):
    running = serve(sessions=2, keep_seconds=0.0)

    async def visit(count):
        for number in range(count):
            client = await Client.connect(running.url)
            await opened(client, seed=number)
            await client.send("play")
            await client.frames()
            if number % 2:
                client.socket.transport.abort()
            else:
                await client.socket.close()
        await settled(running)

    async def conversation():
        await visit(20)
        before, decoders = resident(), len(running.play.generator._idle)
        await visit(200)
        return before, decoders, resident()

    before, decoders, after = talk(conversation())
    assert len(running.play.generator._idle) <= max(decoders, 3)
    assert after - before < 8 << 20
    assert not running.play.scheduler._order and not running.play.scheduler._credit


async def step_time(client, count=100):
    """Milliseconds of a step: a low percentile of the next ones, without the machine's pauses."""
    spent = []
    while len(spent) < count:
        message = await client.receive()
        if isinstance(message, Frames):
            spent.append(message.header.model_ms)
    return float(np.percentile(spent, 10))


@pytest.mark.parametrize("name", ["small-world", "tiny-world"])
def test_a_long_walk_neither_grows_nor_slows(serve, talk, name):
    """Memory and time of a step have no slope over five minutes' worth of steps."""
    bundled = name == "tiny-world"
    running = serve(model=name if bundled else None, history_mib=16 if bundled else 1)
    count, part = 1800, 300  # five minutes at 24 fps, and the length of a sample

    async def conversation():
        memory = []
        async with await Client.connect(running.url, ping_interval=None) as client:
            await opened(client)
            session = next(iter(running.play.sessions.values()))
            session.period = 0.0
            await client.input(forward=1.0)
            await client.send("play")
            for end in range(part, count + 1, part):
                while session.place.step < end:
                    await client.receive()
                memory.append(resident())
            async with await Client.connect(running.url, ping_interval=None) as other:
                await opened(other)
                fresh = running.play.sessions[other.welcome["token"]]
                fresh.period = 0.0
                await other.send("play")
                while fresh.place.step < 20:  # the window is full
                    await other.receive()
                seconds = await asyncio.gather(step_time(client), step_time(other))
        await settled(running)
        return memory, seconds

    memory, (old, new) = talk(conversation())
    # A step of the log takes about 300 bytes, a leaked latent frame 15 kB. The allocator's arenas
    # grow by jumps, hence the median of all slopes.
    slopes = [
        (memory[end] - memory[start]) / (end - start)
        for start, end in itertools.combinations(range(1, len(memory)), 2)
    ]
    assert np.median(slopes) < part * 4000
    assert old < 1.5 * new


def test_a_half_open_handshake_holds_no_place(serve, talk):
    running = serve(sessions=1)
    host, port = running.address.split(":")
    halves = [socket.create_connection((host, int(port))) for _ in range(20)]
    for half in halves:
        half.sendall(b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\n")

    async def conversation():
        silent = await Client.connect(running.url)  # said hello, opens nothing
        async with await Client.connect(running.url) as client:
            await opened(client)
        await silent.socket.close()

    talk(conversation())
    for half in halves:
        half.close()


def test_a_world_that_fails_ends_alone(serve, talk, generator):
    running = serve()

    async def conversation():
        async with (
            await Client.connect(running.url) as bad,
            await Client.connect(running.url) as good,
        ):
            await opened(bad)
            await opened(good)
            session = running.play.sessions[bad.welcome["token"]]
            session.world.lanes[0].stream._trouble = "broken by the test"
            await bad.send("play")
            error = await bad.text("error")
            assert error["code"] == "failed" and not error["fatal"]
            assert "broken" not in error["message"]
            assert (await bad.text("ended"))["reason"] == "failed"
            await step_to(good, 5)
            await opened(bad)  # another world may follow
            await step_to(bad, 3)

    talk(conversation())
