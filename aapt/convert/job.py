"""Conversion of a Wan transformer of another project into a checkpoint of ours."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, save_config
from ..model.config import ModelConfig
from ..model.umt5 import UMT5Weights
from ..model.wan import WanTransformer
from ..vae import CausalVAE
from ..vae.folder import LIGHT, load_vae, lossless_dtype, save_vaes
from .kinds import KINDS, Kind
from .lora import LowRank, find_lora
from .names import wan_name
from .tensor_files import StoredTensor, find_tensors
from .wan_layout import HEAD_DIM, Made, layout, model_config, recycling
from .writer import Pending, write_pending

PREFIX = "transformer."  # of our transformer's names in a checkpoint


def convert(
    source: Path,
    out: Path,
    kind: str,
    *,
    lora: Path | None = None,
    vae: Path | None = None,
    text: Path | None = None,
    recycle: str | None = None,
    entry: str | None = None,
) -> dict[str, Any]:
    """Write the checkpoint folder `out`, and return its configuration.

    source: see `find_tensors`. kind: a name in KINDS. lora: a file of low-rank adaptations to add.
    vae: an autoencoder, see `load_vae`; a checkpoint without one only starts training. text: a
    folder of UMT5, see `UMT5Weights`, whose path the checkpoint keeps. recycle: "zero" or
    "random", see `recycling`. entry: the network in a file of `torch.save`; the kind's unless
    given.

    Tensors are read, changed and written one at a time, in the precision that they are stored in.
    `config.json` comes last, so that a folder with one is whole. CheckpointError names what is
    missing, what belongs to nothing and what does not fit, before anything is written.
    """
    preset = _kind(kind)
    if (out / "config.json").exists():
        raise ValueError(
            f"out: expected a folder without a checkpoint, got {out} with config.json; "
            "pass another folder"
        )
    weights = _by_wan_name(source, find_tensors(source, (entry,) if entry else preset.entries))
    file = out / "model.safetensors"
    if any(file.exists() and file.samefile(tensor.path) for tensor in weights.values()):
        raise ValueError(f"out: expected another file than the source, got {file} for both")
    _check_heads(source)
    adapted = find_lora(lora, weights, preset.lora_alpha) if lora else {}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    config = model_config(shapes, preset, str(source))
    made = layout(config)
    if recycle:
        config, made = recycling(config, made, recycle)
    pending = _pending(source, config, made, weights, adapted)
    autoencoder = None if vae is None else _autoencoder(vae, config)
    if text is not None:
        UMT5Weights(text)  # says what is missing
    write_pending(file, pending)
    written = {
        "model": asdict(config),
        "camera": None,
        "height": preset.height,
        "width": preset.width,
        "fps": preset.fps,
        "prompts": [],
        "converted": {
            "kind": kind,
            "weights": preset.weights,
            "settings": preset.source,
            "file": source.name,
            "licence": preset.licence,
        },
    }
    if not recycle:  # recycled channels need training before any sampling
        written["sampling"] = asdict(preset.sampling)
    if autoencoder is not None:
        written |= save_vaes(out, {LIGHT: autoencoder}, lossless_dtype(autoencoder))
    if text is not None:
        written["text"] = str(text.resolve())
    save_config(out, written)
    return written


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def _check_heads(source: Path) -> None:
    """Raise CheckpointError if a diffusers folder says that heads are not as wide as Wan's, which
    no tensor says."""
    for path in (source / "config.json", source / "transformer" / "config.json"):
        try:
            width = json.loads(path.read_text()).get("attention_head_dim", HEAD_DIM)
        except (OSError, ValueError, AttributeError):  # not a folder with a configuration
            continue
        if width != HEAD_DIM:
            raise CheckpointError(f"{path}: attention_head_dim: expected {HEAD_DIM}, got {width}")


def _by_wan_name(source: Path, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    named: dict[str, StoredTensor] = {}
    for name, tensor in found.items():
        wans = wan_name(name)
        if wans in named:
            raise CheckpointError(f"{source}: expected {wans} once, got it again as {name}")
        named[wans] = tensor
    return named


def _pending(
    source: Path,
    config: ModelConfig,
    made: Mapping[str, Made],
    weights: Mapping[str, StoredTensor],
    adapted: Mapping[str, LowRank],
) -> dict[str, Pending]:
    """Return our tensors, to be made when they are written. CheckpointError unless every tensor of
    the source is used, in the shape that our model has."""
    used = {name for one in made.values() for name in one.names}
    for name in sorted(used - set(weights)):
        raise CheckpointError(f"{source}: expected tensor {name}, which is missing")
    for name in sorted(set(weights) - used):
        raise CheckpointError(f"{source}: tensor {name} belongs to no parameter of the model")
    with torch.device("meta"):
        ours = WanTransformer(config).state_dict()

    def pending(name: str) -> Pending:
        given = [weights[part] for part in made[name].names]
        metas = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in given]
        parts = ", ".join(made[name].names)
        expected = tuple(ours[name].shape)
        try:
            result = made[name].make(*metas)
        except (RuntimeError, ValueError, IndexError):  # of shapes that no layout has
            result = None
        one_dtype = len({x.dtype for x in given}) == 1
        if result is None or result.shape != expected or not one_dtype:
            got = " and ".join(f"{x.shape} of {x.dtype}" for x in given)
            raise CheckpointError(
                f"{source}: {parts}: expected tensors that make {expected} of one dtype, got {got}"
            )

        def make() -> Tensor:
            return made[name].make(*(_read(part, weights, adapted) for part in made[name].names))

        return Pending(expected, result.dtype, make)

    return {PREFIX + name: pending(name) for name in ours}


def _read(name: str, weights: Mapping[str, StoredTensor], adapted: Mapping[str, LowRank]) -> Tensor:
    tensor = weights[name].read()
    return adapted[name].added_to(tensor) if name in adapted else tensor


def _autoencoder(path: Path, config: ModelConfig) -> CausalVAE:
    """Load an autoencoder. ValueError unless its latents are those of the model."""
    vae = load_vae(path)
    if vae.config.latent_channels != config.latent_channels:
        raise ValueError(
            f"vae: expected {config.latent_channels} latent channels, as the model has, "
            f"got {vae.config.latent_channels} in {path}"
        )
    return vae
