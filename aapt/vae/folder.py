"""Autoencoders on disk: alone or with the model they belong to, ours or Wan's.

A checkpoint with a light decoder keeps the original one beside it: `original_vae` in `config.json`
is the shape of what `original_vae.safetensors` holds.
"""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from ..checkpoint import (
    find_checkpoint,
    load_config,
    load_module,
    reading_config,
    save_config,
    save_module,
    tuples,
)
from . import CausalVAE, VAEConfig, load_wan
from .wan_weights import WEIGHTS

LIGHT, ORIGINAL = "vae", "original_vae"


def load_vae(name: str | Path, part: str = LIGHT) -> CausalVAE:
    """The autoencoder that a bundled model or a checkpoint folder decodes with; with `part`
    ORIGINAL the one with the decoder that a light decoder was made from. A folder of diffusers'
    Wan has one decoder for both.

    CheckpointError, naming what was expected and what is there.
    """
    folder = find_checkpoint(name)
    if (folder / WEIGHTS).is_file():
        return load_wan(folder)
    config = load_config(folder)
    part = part if part in config else LIGHT
    with reading_config(folder):
        vae = CausalVAE(VAEConfig(**tuples(config[part])))
    load_module(folder / f"{part}.safetensors", vae)
    return vae


def vae_digest(vae: CausalVAE) -> str:
    """SHA-256 of an autoencoder's weights: how encoded clips name the one that made them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def lossless_dtype(vae: CausalVAE) -> torch.dtype | None:
    """What weights are stored as bit for bit: bfloat16 if they lose nothing by it, else theirs."""
    weights = vae.state_dict().values()
    same = all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in weights)
    return torch.bfloat16 if same else None


def save_vaes(
    folder: Path, vaes: dict[str, CausalVAE], dtype: torch.dtype | None = None
) -> dict[str, dict]:
    """Write autoencoders by part, as `dtype`; returns what `config.json` says of them."""
    for part, vae in vaes.items():
        save_module(folder / f"{part}.safetensors", vae, dtype)
    return {part: asdict(vae.config) for part, vae in vaes.items()}


def with_light_decoder(
    source: str | Path, light: CausalVAE, original: CausalVAE, out: Path
) -> Path:
    """Write to `out` what the checkpoint `source` has, its name too, with a light decoder; returns
    `out`.

    Of a folder that is an autoencoder alone, so is the new one. The original stays bit for bit.
    """
    folder = find_checkpoint(source)
    config = {}
    if not (folder / WEIGHTS).is_file():
        config = load_config(folder)
        others = ["model.safetensors"] if "model" in config else []
        if sample := config.get("sample"):
            others.append(Path(sample["image"]).name)
        out.mkdir(parents=True, exist_ok=True)
        for file in others:
            if not (out / file).exists() or not (out / file).samefile(folder / file):
                shutil.copyfile(folder / file, out / file)
    vaes = {LIGHT: light, ORIGINAL: original}
    save_config(out, config | save_vaes(out, vaes, lossless_dtype(original)))
    return out
