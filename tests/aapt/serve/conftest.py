"""A server of a small random model on a free port, ten times as fast as the bundled one."""

import asyncio
import contextlib
import dataclasses
import os
import random
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from aapt import StreamingGenerator
from aapt.checkpoint import save_config, save_module

from ...progress import Progress
from ..helpers import CAMERA
from ..streaming.test_generator import HEIGHT, VAE, WIDTH, build

HANGS = 1800  # seconds after which a conversation counts as stuck, on the busiest machine too


def free_port():
    """A port that stays free until it is listened on.

    The system hands out ports from 32768 up, Ray's workers take 10002 to 19999.
    """
    for port in random.sample(range(20000, 32768), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no free port among 100 between 20000 and 32767")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "small-world"
    path.mkdir()
    model, vae = build()
    save_module(path / "model.safetensors", model)
    save_module(path / "vae.safetensors", vae)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "sample.png")
    sample = {"image": "sample.png", "prompt": "ab"}
    facts = {"height": HEIGHT, "width": WIDTH, "fps": 240, "prompts": ["ab", "cd"]}
    parts = {"model": model.config, "camera": CAMERA, "vae": VAE}
    parts = {name: dataclasses.asdict(part) for name, part in parts.items()}
    save_config(path, {**facts, "sample": sample, **parts})
    return path


@pytest.fixture(scope="session")
def generator(checkpoint):
    return StreamingGenerator.from_pretrained(checkpoint)


@pytest.fixture
def picture(generator):
    return np.asarray(Image.open(generator.sample_image()))


class Running:
    """A server on a thread.

    Attributes:
        play: Its `PlayServer`.
        address: "127.0.0.1:PORT".
    """

    def __init__(self, generator, checkpoint, **settings):
        import uvicorn

        from aapt.serve.app import create_app
        from aapt.serve.settings import Settings

        app = create_app(generator, str(checkpoint), Settings(**settings))
        self.play = app.state.server
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            log_level="warning",
            ws_per_message_deflate=False,
            ws_ping_interval=None,  # a client that is starved answers late
            timeout_graceful_shutdown=5,
        )
        self.server = uvicorn.Server(config)
        started = threading.Event()

        async def main():
            serving = asyncio.create_task(self.server.serve([listener]))
            while not self.server.started and not serving.done():
                await asyncio.sleep(0.01)
            started.set()
            await serving

        self.thread = threading.Thread(target=asyncio.run, args=(main(),))
        self.thread.start()
        assert started.wait(HANGS)

    @property
    def url(self):
        return f"ws://{self.address}/ws"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(HANGS)
        assert not self.thread.is_alive()


@pytest.fixture
def serve(generator, checkpoint):
    """Starts servers with the given settings; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start(model=None, **settings):
            loaded = StreamingGenerator.from_pretrained(model) if model else generator
            running = Running(loaded, model or checkpoint, **settings)
            stack.callback(running.stop)
            return running

        yield start


@pytest.fixture
def talk():
    """Runs a conversation with a server."""

    def run(conversation):
        return asyncio.run(asyncio.wait_for(watched(conversation), HANGS))

    return run


async def watched(conversation):
    """Awaits a conversation. AssertionError once neither it nor a server does any work."""
    task, progress = asyncio.ensure_future(conversation), Progress(os.getpid())
    while not (await asyncio.wait({task}, timeout=5))[0]:
        progress.check()
    return task.result()
