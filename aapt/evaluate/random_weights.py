"""Generators with random weights, by the names of `aapt.model.presets`: speed depends on sizes
alone."""

import torch

from ..device import memory_of, usable_device, usable_dtype
from ..model.presets import PRESETS
from ..model.world_model import WorldModel
from ..streaming.generator import StreamingGenerator
from ..vae import CausalVAE, VAEConfig, tiny, tiny_light
from ..vae.config import light, original

SIZES = {"aapt-8b": (416, 736), "aapt-2b": (720, 1280), "aapt-small": (160, 256)}
DEVIATION = 0.02  # of all weights


def random_generator(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
) -> StreamingGenerator:
    """Build a preset and its light decoder; on the meta device nothing is drawn.

    device, dtype, size: as `StreamingGenerator.from_pretrained` takes them, with the preset's own
    size; ValueError as there, and if the weights alone are larger than the device's memory.
    """
    device = usable_device(device or "cpu")
    dtype = usable_dtype(dtype, device)
    with torch.device("meta"):
        model = WorldModel(PRESETS[name](), None).to(dtype)
    _check_memory(name, model, device)
    model.to_empty(device=device)  # whole in the wanted precision, as 8 B weights have to be
    if device.type != "meta":
        numbers = torch.Generator(device).manual_seed(0)  # equal on ranks that share a stream
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=DEVIATION, generator=numbers)
    height, width = size or SIZES[name]
    return StreamingGenerator(
        model, random_vae(_light(name), device, dtype), height=height, width=width
    )


def _check_memory(name: str, model: WorldModel, device: torch.device) -> None:
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    memory = memory_of(device)
    if memory is not None and needed > memory:
        raise ValueError(
            f"model: {name} has {needed / 1e9:.1f} GB of weights, {device} has "
            f"{memory / 1e9:.1f} GB of memory; aapt bench stream --predict h100 needs no weights"
        )


def original_decoder(name: str, like: CausalVAE) -> CausalVAE:
    """Build the decoder that a preset's light one replaces, on the device of `like`."""
    config = tiny() if name == "aapt-small" else original()
    return random_vae(config, like.latent_mean.device, like.latent_mean.dtype)


def _light(name: str) -> VAEConfig:
    return tiny_light() if name == "aapt-small" else light()


def random_vae(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> CausalVAE:
    """Build an autoencoder with its first weights."""
    with torch.device(device):
        return CausalVAE(config).to(dtype).eval().requires_grad_(False)
