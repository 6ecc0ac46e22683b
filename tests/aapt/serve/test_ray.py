"""Two replicas on CPUs: load spreads, and a replica that dies takes its own worlds alone."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray itself
pytest.importorskip("fastapi", reason="needs the extra serve")
ray = pytest.importorskip("ray", reason="needs the extra ray")

import websockets  # noqa: E402

from aapt.serve.client import Client  # noqa: E402

from .conftest import free_port  # noqa: E402
from .test_play import encoded, get_log, video  # noqa: E402


@pytest.fixture
def address(checkpoint, monkeypatch):
    from ray import serve

    from aapt.serve.ray import build

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Ray starts its processes at a niceness of 15 and gives up a proxy that is not ready in 5 s
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray does in a replica of one CPU: other threads, other bits
    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"AAPT_MODEL": str(checkpoint), "AAPT_SESSIONS": "1"}), name="play")
        yield f"ws://127.0.0.1:{port}/ws"
    finally:
        serve.shutdown()
        ray.shutdown()
        torch.set_num_threads(threads)


def replicas():
    """Process numbers of the replicas: grandchildren of this process, under its raylet."""

    def parent(process):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            title = (process / "cmdline").read_bytes()
            raylet = process.parent / str(parent(process))
            if title.startswith(b"ray::ServeReplica:play") and parent(raylet) == os.getpid():
                found.append(int(process.name))
    return found


async def placed(address, **fields):
    """Opens a world on a replica with a free place: Ray may choose a full one, or a dead one."""
    while True:
        with contextlib.suppress(websockets.WebSocketException, OSError):
            client = await Client.connect(address)
            await client.send("open", image="sample", **fields)
            if (await client.text("opened", "queued"))["type"] == "opened":
                return client
            await client.socket.close()
        await asyncio.sleep(0.1)


def test_a_replica_that_dies_leaves_the_others_as_they_are(address, talk, generator):
    async def to(client, step):
        made = {}
        while max(made, default=0) < step:
            frames = await client.frames()
            made[frames.header.step] = frames
        return made

    async def conversation():
        # One place per replica: two worlds are open at once only on two replicas
        clients = [await placed(address, seed=seed) for seed in range(2)]
        for client in clients:
            await client.send("play")
            await to(client, 5)
        running = replicas()
        assert len(running) == 2
        os.kill(running[0], signal.SIGKILL)
        tasks = [asyncio.create_task(to(client, 200)) for client in clients]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [isinstance(result, websockets.ConnectionClosed) for result in results]
        assert sorted(lost) == [False, True], results
        survivor = lost.index(False)
        await clients[survivor].send("pause")
        walk = await get_log(clients[survivor])
        await clients[survivor].socket.close()
        async with await placed(address):  # there is a place again
            pass
        return survivor, results[survivor], walk

    survivor, made, walk = talk(conversation())
    assert walk.seed == survivor
    alone = video(generator, walk)
    for step, frames in made.items():
        assert frames.images == encoded(alone[step])
