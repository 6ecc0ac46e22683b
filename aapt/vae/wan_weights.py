"""Wan's published autoencoders in our streaming form: 2.1, 2.2, and versions with fewer channels.

A folder of diffusers' `AutoencoderKLWan` has `config.json` and the file WEIGHTS. Wan's own
layout is one file: `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, LightX2V's `lightvaew2_1.pth`
(a quarter of Wan 2.1's channels), Matrix-Game 3's `MG-LightVAE.pth` (half or a quarter of 2.2's).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, read_tensors, read_weights
from .autoencoder import VIDEO_CHANNELS, CausalVAE
from .config import VAEConfig, wan, wan22
from .wan_names import diffusers_name, our_names
from .wan_statistics import DEVIATION, MEAN

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The shapes of `config.wan` and `config.wan22`; a configuration may leave these keys out.
EXPECTED = {
    "attn_scales": [],
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "patch_size": None,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
EXPECTED_22 = {**EXPECTED, "patch_size": 2, "z_dim": 48}
# Tensors that only a distillation used.
TRAINING_ALONE = "dynamic_feature_projection_heads."


def load_wan(source: Path | str) -> CausalVAE:
    """Loads one of Wan's autoencoders, float32.

    source: A folder in diffusers' format (`vae` of a Wan pipeline), or a file in Wan's own layout,
    `.pth` or `.safetensors`. The tensors give the numbers of channels. Of a file without an
    encoder only the decoder is loaded, and `encode` raises.

    Latents are normalised with the mean and deviation of the folder's configuration; for a file,
    of Wan 2.1 or 2.2. Video is not clamped to [-1, 1], as diffusers does. CheckpointError names the
    file and what is missing or does not fit.
    """
    source = Path(source)
    if source.is_file():
        path, theirs = source, {}
        for name, tensor in read_weights(source).items():
            if not name.startswith(TRAINING_ALONE):
                theirs[diffusers_name(name)] = tensor
        statistics = {"latents_mean": MEAN, "latents_std": DEVIATION}
    else:
        statistics = _read_config(source / "config.json")
        path = source / WEIGHTS
        theirs = read_tensors(path)
    config = _shape(path, theirs)
    with torch.device("meta"):
        vae = CausalVAE(config)
    weights = _weights(path, vae, theirs)
    channels = config.latent_channels
    for ours, name, neutral in (
        ("latent_mean", "latents_mean", 0.0),
        ("latent_std", "latents_std", 1.0),
    ):
        values = statistics.get(name) or [neutral] * channels
        values = values[channels] if isinstance(values, dict) else values
        weights[ours] = torch.tensor(values).view(channels, 1, 1, 1)
    vae.load_state_dict(weights, assign=True)
    return vae


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a Wan VAE's configuration, got {error}") from None
    version, expected = ("2.2", EXPECTED_22) if config.get("is_residual") else ("2.1", EXPECTED)
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name}: expected {value}, as in Wan {version}, got {config[name]}"
            )
    return config


def _shape(path: Path, theirs: Mapping[str, Tensor]) -> VAEConfig:
    """Returns the shape of an autoencoder with these tensors."""
    channels = {}
    for side, name in (("decoder", "conv_out"), ("encoder", "conv_in")):
        tensor = theirs.get(f"{side}.{name}.weight")
        if tensor is None and side == "decoder":
            raise CheckpointError(
                f"{path}: expected tensor {side}.{name}.weight, which is missing; pass Wan's "
                "autoencoder or one with fewer channels"
            )
        if tensor is not None:
            channels[side] = tensor.shape[1 if side == "decoder" else 0]
    residual = any(".upsampler." in name for name in theirs)
    make = wan22 if residual else wan
    config = make(channels.get("encoder", channels["decoder"]), channels["decoder"])
    return config if "encoder" in channels else config.without_encoder()


def _weights(path: Path, vae: CausalVAE, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns our parameters by name, and takes theirs out of `theirs` until none is left."""

    def take(name: str) -> Tensor:
        if name not in theirs:
            raise CheckpointError(f"{path}: expected tensor {name}, which is missing")
        return theirs.pop(name).float()

    channels, patch = vae.config.latent_channels, vae.config.patch_size
    names = dict(our_names(vae))
    weights = {}
    if vae.encoder is not None:
        # Their projection makes mean and deviation; the mean is its first half.
        projection = take("quant_conv.weight").flatten(1)[:channels]
        offset = take("quant_conv.bias")[:channels]
    else:
        for name in [name for name in theirs if name.startswith("quant_conv.")]:
            del theirs[name]
    for name, parameter in vae.named_parameters():
        tensor = take(names[name])
        if name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
            if projection.shape[1] != len(tensor):
                raise CheckpointError(
                    f"{path}: {names[name]}: expected {projection.shape[1]} rows, as "
                    f"quant_conv.weight has columns, got {len(tensor)}"
                )
            tensor = torch.einsum("zc,c...->z...", projection, tensor)
        if name == "encoder.conv_out.bias":
            tensor = tensor + offset
        if name == "encoder.conv_in.weight":
            tensor = _our_pixels(tensor.transpose(0, 1), patch, mirrored=True).transpose(0, 1)
        if name.startswith("decoder.conv_out.") and not name.endswith("norm_weight"):
            tensor = _our_pixels(tensor, patch, mirrored=False)
        if name.startswith("encoder") and tensor.dim() > 1:
            tensor = tensor.flip(-1, -2)  # see `Encoder`
        if [n for n in tensor.shape if n > 1] != [n for n in parameter.shape if n > 1]:
            raise CheckpointError(
                f"{path}: {names[name]}: expected {tuple(parameter.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        tensor = tensor.reshape(parameter.shape)
        layout = torch.channels_last_3d if tensor.dim() == 5 else torch.contiguous_format
        weights[name] = torch.nn.Parameter(tensor.contiguous(memory_format=layout))
    if theirs:
        raise CheckpointError(f"{path}: tensor {min(theirs)} belongs to no parameter of the model")
    return weights


def _our_pixels(tensor: Tensor, patch: int, mirrored: bool) -> Tensor:
    """Reorders rows for squares of pixels: theirs are (colour, column, row), ours (row, column,
    colour), mirrored like the picture."""
    if patch == 1 or len(tensor) != VIDEO_CHANNELS * patch**2:
        return tensor
    tensor = tensor.unflatten(0, (VIDEO_CHANNELS, patch, patch))
    tensor = tensor.flip(1, 2) if mirrored else tensor
    return tensor.transpose(0, 2).flatten(0, 2)
