"""Commands on a few-step checkpoint, which starts from its prompt in chunks of three frames."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from aapt import StreamingGenerator
from aapt.checkpoint import save_config, save_module
from aapt.commands.app import main
from aapt.streaming.actions import Step, Walk, frames_crc, make, model_digest

from ..streaming.few_step_generator import FORMS, SAMPLING, build
from ..streaming.test_generator import HEIGHT, VAE, WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that starts from its prompt, in chunks of 3."""
    generator = build(*FORMS[1])
    path = tmp_path_factory.mktemp("few-step")
    save_module(path / "model.safetensors", generator.model)
    save_module(path / "vae.safetensors", generator.vae)
    parts = {"model": generator.model.config, "vae": VAE, "sampling": SAMPLING}
    parts = {name: dataclasses.asdict(part) for name, part in parts.items()}
    facts = {"height": HEIGHT, "width": WIDTH, "fps": 16, "prompts": ["ab"], "camera": None}
    save_config(path, {**facts, **parts, "original_vae": parts["vae"]})
    return path


def test_a_checkpoint_says_how_it_is_sampled(folder):
    generator = StreamingGenerator.from_pretrained(folder)
    assert generator.sampling == SAMPLING and generator.few_step
    assert generator.model.config.chunk == 3 and generator.fps == 16
    with generator.open(None, "ab") as stream, build(*FORMS[1]).open(None, "ab") as other:
        assert all(np.array_equal(stream.step(), other.step()) for _ in range(3))


def test_generate_and_replay(folder, tmp_path, capsys):
    """The first chunk of 9 video frames, then chunks of 12: 3 seconds at 16 fps are 4 steps."""
    out = tmp_path / "frames"
    arguments = ["--model", str(folder), "--scale", "1"]
    assert main(["generate", *arguments, "--seconds", "3", "--out", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 9 + 3 * 12
    size = HEIGHT + 16, WIDTH + 16  # of the server, not the checkpoint's
    walk = Walk("few-step", model_digest(folder), None, "ab", seed=3, size=size)
    larger = StreamingGenerator.from_pretrained(folder, size=size)
    with larger.open(None, "ab", 3) as stream:
        for number in range(4):
            step = Step(None, None, "ab" if number < 2 else "cde")
            walk.append(0, number, step._replace(crc=frames_crc(make(stream, step))))
    log = tmp_path / "walk.jsonl"
    log.write_text("\n".join(walk.lines("0")))
    again = tmp_path / "again"
    assert main(["generate", *arguments, "--replay", str(log), "--out", str(again)]) == 0
    assert "4 steps, each bit for bit as it was played" in capsys.readouterr().err
    pictures = list(again.glob("*.png"))
    assert len(pictures) == 9 + 3 * 12
    with Image.open(pictures[0]) as picture:
        assert picture.size == (size[1], size[0])


def test_commands_that_time_and_describe(folder, capsys):
    assert main(["bench", "stream", "--model", str(folder), "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames_per_step"] == 12
    assert main(["info", "--model", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["model"]
    assert (facts["tokens_per_step"], facts["sink_frames"]) == (18, 3)


def test_generate_refuses_a_picture(folder, tmp_path, capsys):
    file = tmp_path / "picture.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(file)
    options = ["--model", str(folder), "--image", str(file), "--out", str(tmp_path / "out")]
    assert main(["generate", *options]) == 2
    said = "first_frame: expected None for a model whose first chunk has 3 frames, got a picture"
    assert f"{said}; pass None to start from the prompt" in capsys.readouterr().err
