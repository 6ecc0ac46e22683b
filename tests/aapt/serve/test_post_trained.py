"""The first road of docs/post-training.md to its end: a client plays the trained model."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve.client import Client  # noqa: E402
from aapt.serve.protocol import FIRST  # noqa: E402

from ...docs.test_post_training_page import commands, in_place, run  # noqa: E402
from .test_play import opened, step_to  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of the page's first training, with the text encoder that serves it."""
    place, lines = tmp_path_factory.mktemp("page"), commands()
    trainings = [
        n for n, words in enumerate(lines) if words[1] == "train" and "--plan" not in words
    ]
    with in_place(place):
        run(lines[: trainings[0] + 1])
        yield str(place / "runs" / "wan-1.3b" / "wan-1.3b")


def test_a_client_gets_frames_of_the_post_trained_model(serve, talk, trained):
    """The picture that training kept, then frames under a new prompt, four per step."""
    running = serve(trained, snapshot_seconds=0.1)

    async def conversation():
        async with await Client.connect(running.url) as client:
            first = await opened(client, prompt="a fox in snow")
            made = await step_to(client, 2)
            await client.send("prompt", sequence=1, text="the sea at noon")
            return client.welcome, first, made | await step_to(client, max(made) + 2)

    welcome, first, made = talk(conversation())
    assert (welcome["width"], welcome["height"], welcome["fps"]) == (48, 32, 16)
    assert first.header.flags == FIRST and len(first.images) == 1
    assert max(made) > 2 and {len(message.images) for message in made.values()} == {4}
