"""Autoencoders on disk: alone or with the model they belong to, ours or Wan's.

A checkpoint with a light decoder also keeps the original decoder: `original_vae` in `config.json`
is the shape of the weights in `original_vae.safetensors`.
"""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from ..checkpoint import (
    find_checkpoint,
    load_config,
    load_meta_module,
    reading_config,
    save_config,
    save_module,
    tuples,
)
from . import CausalVAE, VAEConfig, load_wan
from .wan_weights import WEIGHTS

LIGHT, ORIGINAL = "vae", "original_vae"


def load_vae(
    name: str | Path,
    part: str = LIGHT,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> CausalVAE:
    """Loads the autoencoder of a bundled model or a checkpoint folder.

    part: LIGHT, the decoder that the checkpoint streams with, or ORIGINAL, the decoder that the
    light one was made from. A folder of diffusers' Wan has one decoder for both.
    device, dtype: Where the weights go, and their precision; None for float32. CheckpointError says
    what was expected and what was found, ValueError for another part.
    """
    if part not in (LIGHT, ORIGINAL):
        raise ValueError(f"part: expected {LIGHT} or {ORIGINAL}, got {part}")
    folder = find_checkpoint(name)
    if (folder / WEIGHTS).is_file():
        return load_wan(folder).to(device, dtype)
    config = load_config(folder)
    part = part if part in config else LIGHT
    with reading_config(folder), torch.device("meta"):
        vae = CausalVAE(VAEConfig(**tuples(config[part])))
    load_meta_module(folder / f"{part}.safetensors", vae, device, dtype)
    return vae


def vae_digest(vae: CausalVAE) -> str:
    """SHA-256 of an autoencoder's weights, by which encoded clips name the one that made them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def lossless_dtype(vae: CausalVAE) -> torch.dtype | None:
    """Returns bfloat16 if the weights lose nothing by it, else None: they keep their own dtype."""
    weights = vae.state_dict().values()
    same = all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in weights)
    return torch.bfloat16 if same else None


def save_vaes(
    folder: Path, vaes: dict[str, CausalVAE], dtype: torch.dtype | None = None
) -> dict[str, dict]:
    """Writes autoencoders by part, as `dtype`; returns their entries of `config.json`."""
    for part, vae in vaes.items():
        save_module(folder / f"{part}.safetensors", vae, dtype)
    return {part: asdict(vae.config) for part, vae in vaes.items()}


def with_light_decoder(
    source: str | Path, light: CausalVAE, original: CausalVAE, out: Path
) -> Path:
    """Writes the checkpoint `source` to `out`, under its own name, with a light decoder; returns
    `out`.

    If `source` is an autoencoder alone, so is `out`. The original decoder stays bit for bit.
    """
    folder = find_checkpoint(source)
    config = {}
    if not (folder / WEIGHTS).is_file():
        config = load_config(folder)
        others = ["model.safetensors"] if "model" in config else []
        images = [*filter(None, [config.get("sample")]), *config.get("gallery", [])]
        others += [Path(entry["image"]).name for entry in images]
        out.mkdir(parents=True, exist_ok=True)
        for file in others:
            if not (out / file).exists() or not (out / file).samefile(folder / file):
                shutil.copyfile(folder / file, out / file)
    vaes = {LIGHT: light, ORIGINAL: original}
    save_config(out, config | save_vaes(out, vaes, lossless_dtype(original)))
    return out
