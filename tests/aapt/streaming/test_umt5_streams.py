"""Streams of a model that reads UMT5: the network is dropped after a prompt, or stays elsewhere."""

import dataclasses

import numpy as np
import pytest
import torch

from aapt import StreamingGenerator
from aapt.checkpoint import CheckpointError, save_config, save_module
from aapt.model.config import ModelConfig
from aapt.model.world_model import WorldModel
from aapt.vae import CausalVAE, tiny
from aapt.vae.folder import save_vaes

from ..model.test_umt5 import CONFIG, native, native_folder, pipeline_folder  # noqa: F401


def checkpoint(folder, text):
    """A model without a camera that names the folder of its text encoder."""
    torch.manual_seed(0)
    config = ModelConfig(**{**CONFIG, "latent_channels": 16, "text_encoder": "umt5"})
    model, vae = WorldModel(config, None), CausalVAE(tiny())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_module(folder / "model.safetensors", model)
    size = 2 * 2 * vae.config.space_factor
    rest = {"camera": None, "height": size, "width": size, "fps": 24, "prompts": []}
    words = {} if text is None else {"text": str(text)}
    config = {"model": dataclasses.asdict(config), **rest, **words}
    save_config(folder, config | save_vaes(folder, {"vae": vae}))
    return folder


def frames(generator, prompt, later=None):
    image = np.full((generator.height, generator.width, 3), 100, np.uint8)
    stream = generator.open(image, prompt)
    made = [stream.step()]
    if later is not None:
        stream.prompt = later
    return np.concatenate([*made, stream.step()])


def test_prompts_are_read_and_the_network_is_dropped(pipeline_folder, tmp_path):  # noqa: F811
    folder = checkpoint(tmp_path, pipeline_folder)
    generator = StreamingGenerator.from_pretrained(folder)
    source = generator.model.text_encoder.source
    fox = frames(generator, "a fox in snow")
    assert "network" not in vars(source.__self__)
    assert not np.array_equal(fox, frames(generator, "the sea at noon"))
    assert np.array_equal(fox[:4], frames(generator, "a fox in snow", "the sea")[:4])
    # UMT5 stays where it is told to, and says the same
    kept = StreamingGenerator.from_pretrained(folder, text_device="cpu")
    assert np.array_equal(frames(kept, "a fox in snow"), fox)
    assert "network" in vars(kept.model.text_encoder.source.__self__)


def test_models_and_folders_that_do_not_fit(pipeline_folder, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="text: expected a model that reads UMT5, got one with By"):
        StreamingGenerator.from_pretrained("tiny-world").read_text(pipeline_folder)
    (tmp_path / "none").mkdir()
    silent = StreamingGenerator.from_pretrained(checkpoint(tmp_path / "none", None))
    with pytest.raises(ValueError, match="text: expected UMT5's weights or stored embeddings, got"):
        frames(silent, "a")
    silent.read_text(pipeline_folder)
    assert frames(silent, "a").dtype == np.uint8
    with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got dsp"):
        silent.read_text(pipeline_folder, "dsp")
    (tmp_path / "lost").mkdir()
    folder = checkpoint(tmp_path / "lost", "gone")
    with pytest.raises(CheckpointError, match="gone: expected UMT5, as text_encoder/ and tokenize"):
        StreamingGenerator.from_pretrained(folder)


def test_a_long_prompt_is_cut_with_a_warning(pipeline_folder, tmp_path):  # noqa: F811
    generator = StreamingGenerator.from_pretrained(checkpoint(tmp_path, pipeline_folder))
    with pytest.warns(UserWarning, match="prompt: expected fewer than 6 tokens, got as many or mo"):
        frames(generator, "a fox in snow at noon")
