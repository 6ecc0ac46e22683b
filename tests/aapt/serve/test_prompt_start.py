"""Worlds of few-step models on the page: from the prompt alone, in chunks."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from aapt import StreamingGenerator
from aapt.checkpoint import save_config, save_module

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve.client import Client  # noqa: E402
from aapt.serve.protocol import FIRST, SEEK  # noqa: E402
from aapt.serve.server import PlayServer  # noqa: E402
from aapt.serve.settings import Settings  # noqa: E402

from ..streaming.few_step_generator import FORMS, SAMPLING, build  # noqa: E402
from ..streaming.test_generator import HEIGHT, VAE, WIDTH  # noqa: E402
from .test_play import encoded, get_log, opened, step_to, video  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("world") / "few-step")


def save(path):
    """Saves a model whose first chunk has 9 video frames and whose later ones have 12."""
    path.mkdir()
    generator = build(*FORMS[1])
    save_module(path / "model.safetensors", generator.model)
    save_module(path / "vae.safetensors", generator.vae)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(path / "sample.png")
    parts = {"model": generator.model.config, "vae": VAE, "sampling": SAMPLING}
    parts = {name: dataclasses.asdict(part) for name, part in parts.items()}
    facts = {"height": HEIGHT, "width": WIDTH, "fps": 480, "prompts": ["ab"], "camera": None}
    sample = {"image": "sample.png", "prompt": "ab"}
    save_config(path, {**facts, "sample": sample, **parts})
    return path


@pytest.fixture(scope="module")
def generator(checkpoint):
    return StreamingGenerator.from_pretrained(checkpoint)


def test_chunks_are_not_made_in_a_batch(generator, checkpoint):
    with pytest.raises(ValueError, match="batch: expected a model of one pass per frame, got a"):
        PlayServer(generator, str(checkpoint), Settings(batch=True))


def test_a_world_begins_blank_and_plays_its_prompt(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve(snapshot_seconds=0.1).url) as client:
            assert [start["name"] for start in client.welcome["gallery"]] == ["prompt"]
            assert client.welcome["frames_per_step"] == 12
            first = await opened(client, image="prompt", prompt="ab")
            made = await step_to(client, 6)
            await client.send("seek", branch=0, step=1)
            sought = await client.frames()
            while not sought.header.flags & SEEK:
                sought = await client.frames()
            return first, made, sought, await get_log(client)

    first, made, sought, walk = talk(conversation())
    assert first.header.flags == FIRST
    assert first.images == encoded(np.full((1, HEIGHT, WIDTH, 3), 128, np.uint8))
    assert walk.size == (HEIGHT, WIDTH)
    assert walk.first_frame is None and walk.steps == max(made) >= 6
    alone = {step: encoded(frames) for step, frames in video(generator, walk).items()}
    assert len(alone[1]) == 9 and len(alone[2]) == 12
    assert all(message.images == alone[step] for step, message in made.items())
    assert sought.header.step == 1 and sought.images == alone[1]


def test_a_picture_is_refused_before_the_world_opens(serve):
    """The gallery has no pictures, and neither an upload nor a walk may bring one."""
    play = serve().play
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    with pytest.raises(
        ValueError, match="first_frame: expected None for a model whose first chunk"
    ):
        play.walk("", picture, "ab", 0)
    with pytest.raises(ValueError, match="image: expected sample, a name of the gallery"):
        play.walk("sample", None, "ab", 0)


def test_a_walk_of_another_size_is_refused(serve):
    play = serve().play
    walk = play.walk("prompt", None, "ab", 0)
    assert play.check_walk(walk) is walk
    assert play.check_walk(dataclasses.replace(walk, size=None))  # of an older log
    with pytest.raises(ValueError, match=f"log: expected video of {WIDTH}x{HEIGHT}, got 96x64"):
        play.check_walk(dataclasses.replace(walk, size=(64, 96)))
