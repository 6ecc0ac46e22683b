"""A small random model that follows poses, in a checkpoint folder."""

import dataclasses

import numpy as np
from PIL import Image

from aapt.checkpoint import save_config, save_module

from ..streaming.test_generator import HEIGHT, VAE, WIDTH
from ..streaming.test_poses import build


def pose_checkpoint(path, fps=240):
    """Writes the checkpoint and returns its folder."""
    path.mkdir()
    generator = build()
    save_module(path / "model.safetensors", generator.model)
    save_module(path / "vae.safetensors", generator.vae)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "sample.png")
    parts = {"model": generator.model.config, "vae": VAE}
    parts = {name: dataclasses.asdict(part) for name, part in parts.items()}
    facts = {"height": HEIGHT, "width": WIDTH, "fps": fps, "prompts": ["ab", "cd"]}
    facts |= {"camera": None, "poses": True, "sample": {"image": "sample.png", "prompt": "ab"}}
    save_config(path, {**facts, **parts})
    return path
