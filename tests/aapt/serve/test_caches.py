"""Worlds with a float8 cache: the bits of a run alone, logs, and a model that loses too much."""

import json
import logging

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt import StreamingGenerator  # noqa: E402
from aapt.serve.batch import run_together  # noqa: E402
from aapt.serve.client import Client  # noqa: E402

from .conftest import Running  # noqa: E402
from .test_batch import assert_replayed, playing  # noqa: E402
from .test_play import encoded, get_log, go_on, opened, saved_world, step_to, video  # noqa: E402


@pytest.fixture
def start(checkpoint):
    """Starts servers of a cache; they end with the test."""
    running = []

    def begin(cache, **settings):
        generator = StreamingGenerator.from_pretrained(checkpoint, cache=cache)
        running.append(Running(generator, checkpoint, **settings))
        return generator, running[-1]

    yield begin
    for each in running:
        each.stop()


@pytest.mark.parametrize("cache", ["float8", "float8-past"])
def test_a_world_has_the_bits_of_a_run_alone(start, talk, cache):
    generator, running = start(cache)

    async def conversation():
        async with await Client.connect(running.url) as client:
            await opened(client)
            made = await step_to(client, 6)
            await client.send("seek", branch=0, step=2)
            await client.text("sought")
            made |= {("again", n): frames for n, frames in (await step_to(client, 5)).items()}
            return made, await get_log(client)

    made, walk = talk(conversation())
    assert walk.cache == cache and len(walk.branches) == 2
    last = max(number for number in made if isinstance(number, int))
    assert made[last].images == encoded(video(generator, walk, 0)[last])
    last = max(number[1] for number in made if isinstance(number, tuple))
    assert made["again", last].images == encoded(video(generator, walk, 1)[last])


def test_worlds_are_stepped_together(checkpoint, picture):
    generator = StreamingGenerator.from_pretrained(checkpoint, cache="float8-past")
    with playing(generator, picture) as sessions:
        for _ in range(3):
            run_together(sessions)
        for number, session in enumerate(sessions):
            assert_replayed(session, number + 1, [1] * number + [3] * 3)


def test_a_server_of_another_cache_refuses_a_log(start, talk):
    _, running = start("float8-past", snapshot_seconds=0.2)
    _, other = start("model")
    _, again = start("float8-past")

    async def conversation():
        log, saved, last = await saved_world(running)
        async with await Client.connect(other.url) as client:
            await client.send("open", log=await client.upload(log))
            error = await client.text("error")
            await opened(client)  # the connection goes on
        async with await Client.connect(again.url) as client:
            frames = await go_on(client, log, saved.images[0])
            assert frames.images == last.images
            assert not any(text["type"] == "error" for text in client.texts)
        return error, json.loads(log.splitlines()[0])

    error, first = talk(conversation())
    assert first["cache"] == "float8-past"
    assert error["code"] == "log" and not error["fatal"]
    assert error["message"] == (
        "log: expected cache model, got float8-past; start the server with --cache float8-past"
    )


@pytest.mark.parametrize("cache", ["float8", "float8-past"])
def test_a_model_that_loses_too_much_is_said(start, talk, monkeypatch, caplog, cache):
    """`float8` sees it in the text, as the world opens, `float8-past` in its first steps."""
    monkeypatch.setattr("aapt.model.caches.VALUE_SIZE", 4e6)  # values are cut
    _, running = start(cache)

    async def conversation():
        async with await Client.connect(running.url) as client:
            await client.send("open", image="sample", seed=3)
            if cache == "float8-past":
                await client.text("opened")
                await client.send("play")
            error = await client.text("error")
            assert (await client.text("ended"))["reason"] == "failed"
            return error

    with caplog.at_level(logging.WARNING, logger="aapt.serve"):
        error = talk(conversation())
    assert error["code"] == "failed" and not error["fatal"]
    said = "cache: this model loses too much in float8; choose the cache model: "
    assert error["message"].startswith(said)
    (record,) = [x for x in caplog.records if x.name == "aapt.serve"]
    assert record.getMessage() == error["message"] and record.exc_info is None
