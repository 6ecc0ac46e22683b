"""A converted model makes video from words: UMT5, few steps, autoencoder."""

import json

import numpy as np
import pytest
import torch

from aapt.checkpoint import BUNDLED
from aapt.commands.app import main
from aapt.convert.job import convert
from aapt.streaming.generator import StreamingGenerator

from ..model.test_umt5 import WIDTH, native, native_folder  # noqa: F401  fixtures
from .plain_native import random_weights

HEIGHT, COLUMNS = 32, 48
LATENTS = json.loads((BUNDLED / "tiny-world/config.json").read_text())["vae"]["latent_channels"]


@pytest.fixture
def source(tmp_path):
    weights = random_weights(text=WIDTH, channels=LATENTS)
    torch.save({"generator": {n: x.float() for n, x in weights.items()}}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def converted(source, kind, text=None):
    """A folder with the bundled autoencoder, of a size that a test has time for."""
    out = source.parent / kind
    convert(source, out, kind, vae=BUNDLED / "tiny-world", text=text)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"height": HEIGHT, "width": COLUMNS}))
    return out


def test_chunks_from_a_prompt(source, native_folder):  # noqa: F811
    out = converted(source, "self-forcing", native_folder)
    assert json.loads((out / "config.json").read_text())["text"] == str(native_folder)
    generator = StreamingGenerator.from_pretrained(out)
    assert (generator.fps, generator.few_step, generator.takes_picture) == (16, True, False)
    with generator.open(None, "a fox in snow", seed=1) as stream:
        made = [stream.step() for _ in range(3)]
        assert [len(frames) for frames in made] == [9, 12, 12]
        snapshot = stream.snapshot()
        stream.prompt = "the sea"
        other = stream.step()
        stream.restore(snapshot)
        assert not np.array_equal(stream.step(), other)
    with generator.open(None, "a fox in snow", seed=1) as stream:
        assert np.array_equal(stream.step(), made[0])


def test_frames_from_a_picture(source, native_folder):  # noqa: F811
    out = converted(source, "causal-forcing-framewise-1step", native_folder)
    generator = StreamingGenerator.from_pretrained(out, text_device="cpu")
    picture = np.full((HEIGHT, COLUMNS, 3), 200, np.uint8)
    with generator.open(picture, "a fox") as stream:
        assert len(stream.first_frame) == 1 and len(stream.step()) == 4


def test_without_a_text_encoder(source):
    generator = StreamingGenerator.from_pretrained(converted(source, "one-forcing"))
    with pytest.raises(ValueError, match="^text: expected UMT5's weights or stored embeddings"):
        generator.open(None, "a fox")


def test_weights_to_start_training_from_open_no_stream(source):
    generator = StreamingGenerator.from_pretrained(converted(source, "wan2.1-t2v"))
    with pytest.raises(ValueError, match="got a diffusion model of 100; `aapt eval` rolls it out"):
        generator.open(None, "a fox")


def test_aapt_generate(source, native_folder, monkeypatch, capsys):  # noqa: F811
    out = converted(source, "one-forcing", native_folder)
    monkeypatch.chdir(source.parent)
    words = ["--model", str(out), "--prompt", "a fox in snow", "--seconds", "0.5", "--scale", "1"]
    assert main(["generate", *words, "--out", "fox.gif"]) == 0
    assert capsys.readouterr().err.startswith("fox.gif: ")


def test_a_folder_without_umt5_is_refused(source, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="expected UMT5, as text_encoder/ and tokenizer/"):
        convert(source, tmp_path / "out", "one-forcing", text=tmp_path)
    assert not (tmp_path / "out").exists()
