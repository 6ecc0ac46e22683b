"""Autoencoders on disk: alone or with the model they belong to, ours or Wan's.

A checkpoint with a light decoder also keeps the original decoder: `original_vae` in `config.json`
is the shape of the weights in `original_vae.safetensors`.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_config,
    load_meta_module,
    read_weights,
    reading_config,
    save_config,
    save_module,
    tuples,
)
from . import CausalVAE, VAEConfig, load_wan
from .taehv_weights import is_taehv, load_taehv
from .wan_weights import WEIGHTS

LIGHT, ORIGINAL = "vae", "original_vae"


def load_vae(
    name: str | Path,
    part: str = LIGHT,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> CausalVAE:
    """Loads the autoencoder of a bundled model, of a checkpoint folder, or of a file of Wan's.

    part: LIGHT, the decoder that the checkpoint streams with, or ORIGINAL, the decoder that the
    light one was made from. A folder of diffusers' Wan, or a file (`load_wan`), has one decoder for
    both.
    device, dtype: Where the weights go, and their precision; None for float32. CheckpointError says
    what was expected and what was found, ValueError for another part.
    """
    if part not in (LIGHT, ORIGINAL):
        raise ValueError(f"part: expected {LIGHT} or {ORIGINAL}, got {part}")
    if is_foreign(name):
        return load_foreign(name).to(device, dtype)
    folder = find_checkpoint(name)
    config = load_config(folder)
    part = part if part in config else LIGHT
    check_autoencoder(folder, config)
    with reading_config(folder), torch.device("meta"):
        vae = CausalVAE(VAEConfig(**tuples(config[part])))
    load_meta_module(folder / f"{part}.safetensors", vae, device, dtype)
    return vae


def check_autoencoder(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the `config.json` of a checkpoint folder names no autoencoder."""
    if LIGHT not in config:
        raise CheckpointError(
            f"{folder}: expected a checkpoint with an autoencoder, got one without; convert the "
            "weights again with --vae"
        )


def load_foreign(name: str | Path) -> CausalVAE:
    """Loads an autoencoder in another project's format: Wan's (`load_wan`) or TAEHV's
    (`load_taehv`). Its tensors say which."""
    path = Path(name)
    return load_taehv(path) if path.is_file() and is_taehv(read_weights(path)) else load_wan(path)


def with_decoder(vae: CausalVAE, decoder: CausalVAE) -> CausalVAE:
    """Returns an autoencoder with the encoder and the statistics of `vae` and another decoder.

    decoder: made for the same latents, such as LightVAE's or TAEHV's. ValueError if the sizes of
    its latents or of its video differ.
    """
    ours, other = vae.config, decoder.config
    same = ["latent_channels", "time_factor", "space_factor", "patch_size", "linear_skip"]
    if other.decoder == "residual":  # both are built from these
        same += ["upsample", "mid_attention", "padding", "norm_eps", "time_kernels", "shortcuts"]
    for name in same:
        if getattr(ours, name) != getattr(other, name):
            raise ValueError(
                f"decoder: expected {name} {getattr(ours, name)}, as the autoencoder has it, "
                f"got {getattr(other, name)}; pass a decoder for its latents"
            )
    taken = ("decoder", "decoder_channels", "decoder_blocks", "latent_projection", "lapped")
    config = replace(
        ours, **{name: getattr(other, name) for name in taken}, decoder_strides=other.upscales
    )
    with torch.device("meta"):
        made = CausalVAE(config)
    states = {"encoder.": vae.state_dict(), "decoder.": decoder.state_dict()}
    weights = {
        name: tensor
        for side, state in states.items()
        for name, tensor in state.items()
        if name.startswith(side)
    }
    weights |= {"latent_mean": vae.latent_mean, "latent_std": vae.latent_std}
    made.load_state_dict(weights, assign=True)
    return made


def is_foreign(name: str | Path) -> bool:
    """Returns True for an autoencoder in another project's format: a file, or diffusers' folder."""
    path = Path(name)
    return path.is_file() or (path / WEIGHTS).is_file()


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
    config = {}
    if not is_foreign(source):
        folder = find_checkpoint(source)
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
