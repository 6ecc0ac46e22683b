"""Converted models of other projects on the page: from words, and from a picture."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from aapt import StreamingGenerator
from aapt.checkpoint import BUNDLED
from aapt.convert.job import convert

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve.client import Client  # noqa: E402
from aapt.serve.protocol import FIRST  # noqa: E402

from ..convert.plain_native import random_weights  # noqa: E402
from ..convert.test_play import COLUMNS, HEIGHT, LATENTS  # noqa: E402
from ..model.test_umt5 import WIDTH, native, native_folder  # noqa: E402, F401  fixtures
from .test_play import encoded, get_log, opened, step_to, video  # noqa: E402


@pytest.fixture(scope="module")
def converted(tmp_path_factory, native_folder):  # noqa: F811
    """Converts a random Wan, with the bundled autoencoder and UMT5, as a kind; a chunk takes no
    longer to show than it takes to make."""
    folder = tmp_path_factory.mktemp("converted")
    weights = random_weights(text=WIDTH, channels=LATENTS)
    torch.save({"generator": {n: x.float() for n, x in weights.items()}}, folder / "w.pt")

    def convert_as(kind):
        out = folder / kind
        convert(folder / "w.pt", out, kind, vae=BUNDLED / "tiny-world", text=native_folder)
        config = json.loads((out / "config.json").read_text())
        config |= {"height": HEIGHT, "width": COLUMNS, "fps": 480}
        (out / "config.json").write_text(json.dumps(config))
        return str(out)

    return convert_as


def test_text_to_video(serve, talk, converted):
    """A chunk of three latent frames per step; the prompt changes on the way."""
    model = converted("self-forcing")
    running = serve(model, snapshot_seconds=0.1)

    async def conversation():
        async with await Client.connect(running.url) as client:
            assert [start["name"] for start in client.welcome["gallery"]] == ["prompt"]
            first = await opened(client, image="prompt", prompt="a fox in snow")
            made = await step_to(client, 2)
            await client.send("prompt", sequence=1, text="the sea")
            return first, made | await step_to(client, max(made) + 2), await get_log(client)

    first, made, walk = talk(conversation())
    assert first.header.flags == FIRST and walk.first_frame is None
    alone = video(StreamingGenerator.from_pretrained(model), walk)
    assert {9, 12} >= {len(frames) for frames in alone.values()} and len(alone[1]) == 9
    assert all(message.images == encoded(alone[step]) for step, message in made.items())
    prompts = [step.prompt for step in walk.path(0, walk.branches[0].end)]
    assert (prompts[0], prompts[-1]) == ("a fox in snow", "the sea")


@pytest.mark.parametrize(
    ("kind", "counts"), [("causal-forcing-framewise-1step", [4, 4]), ("longlive-2-5b", [28, 32])]
)
def test_a_picture_first(serve, talk, converted, kind, counts):
    """An upload begins the world, before the first chunk or in it; the prompt alone is on offer as
    well. Each step's video frames are those of its chunk."""
    model = converted(kind)
    running = serve(model, snapshot_seconds=0.1)
    generator = StreamingGenerator.from_pretrained(model)
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, COLUMNS, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")

    async def conversation():
        async with await Client.connect(running.url) as client:
            assert [start["name"] for start in client.welcome["gallery"]] == ["prompt"]
            first = await opened(client, image=await client.upload(file.getvalue()), prompt="a fox")
            return first, await step_to(client, 2), await get_log(client)

    first, made, walk = talk(conversation())
    assert np.array_equal(walk.first_frame, picture)
    with generator.open(picture, "a fox", 3) as stream:
        assert first.images == encoded(stream.first_frame) and first.header.count == 1
    alone = video(generator, walk)
    assert [len(alone[step]) for step in sorted(alone)][:2] == counts
    assert all(message.images == encoded(alone[step]) for step, message in made.items())
