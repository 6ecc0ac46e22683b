"""Wan 2.1's published autoencoder in our streaming form.

Names and shapes are those of diffusers' `AutoencoderKLWan`: a folder with `config.json` and
`diffusion_pytorch_model.safetensors`.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, read_tensors
from .autoencoder import CausalVAE
from .config import wan
from .layers import FrameAttention, ResidualBlock

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The shape of `config.wan`; a configuration may leave these keys out.
EXPECTED = {
    "attn_scales": [],
    "dim_mult": [1, 2, 4, 4],
    "is_residual": False,
    "num_res_blocks": 2,
    "patch_size": None,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}

# Their names of our convolution and of the norm before it.
BLOCK = {
    "conv1": ("conv1", "norm1"),
    "conv2": ("conv2", "norm2"),
    "shortcut": ("conv_shortcut", ""),
}
ATTENTION = {"qkv": ("to_qkv", "norm"), "proj": ("proj", "")}
RESAMPLE = {"conv": ("resample.1", ""), "time_conv": ("time_conv", "")}


def load_wan(folder: Path | str) -> CausalVAE:
    """Loads the autoencoder of a folder in diffusers' format (`vae` of a Wan 2.1 pipeline),
    float32.

    Latents are normalised with the configuration's mean and deviation. Video is not clamped to
    [-1, 1], as diffusers does. CheckpointError names the file and what is missing or does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    path = folder / WEIGHTS
    theirs = read_tensors(path)

    def take(name: str) -> Tensor:
        if name not in theirs:
            raise CheckpointError(f"{path}: expected tensor {name}, which is missing")
        return theirs.pop(name).float()

    vae = CausalVAE(wan(config.get("base_dim", 96)))
    channels = vae.config.latent_channels
    # Their projection makes mean and deviation; the mean is its first half.
    projection, offset = take("quant_conv.weight").flatten(1)[:channels], take("quant_conv.bias")
    weights = {}
    for name, parameter in vae.named_parameters():
        source = _their_name(vae, name)
        tensor = take(source)
        if name == "encoder.conv_out.weight":
            tensor = torch.einsum("zc,c...->z...", projection, tensor)
        if name == "encoder.conv_out.bias":
            tensor = projection @ tensor + offset[:channels]
        if name.startswith("encoder") and tensor.dim() > 1:
            tensor = tensor.flip(-1, -2)  # see `Encoder`
        if [n for n in tensor.shape if n > 1] != [n for n in parameter.shape if n > 1]:
            raise CheckpointError(
                f"{path}: {source}: expected {tuple(parameter.shape)}, got {tuple(tensor.shape)}"
            )
        weights[name] = tensor.reshape(parameter.shape)
    if theirs:
        raise CheckpointError(f"{path}: tensor {min(theirs)} belongs to no parameter of the model")
    for ours, name, neutral in (
        ("latent_mean", "latents_mean", 0.0),
        ("latent_std", "latents_std", 1.0),
    ):
        values = config.get(name) or [neutral] * channels
        weights[ours] = torch.tensor(values).view(channels, 1, 1, 1)
    vae.load_state_dict(weights)
    return vae


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a Wan VAE's configuration, got {error}") from None
    for name, value in EXPECTED.items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name}: expected {value}, as in Wan 2.1, got {config[name]}"
            )
    return config


def _their_name(vae: CausalVAE, name: str) -> str:
    """Returns their name of one of our parameters."""
    if name.startswith("decoder.projection."):
        return name.replace("decoder.projection", "post_quant_conv")
    side, *layer, conv, kind = name.split(".")
    if not layer:  # conv_in and conv_out
        return f"{side}.norm_out.gamma" if kind == "norm_weight" else f"{side}.{conv}.{kind}"
    index = int(layer[1])
    module = vae.get_submodule(f"{side}.layers")[index]
    parts = BLOCK if isinstance(module, ResidualBlock) else RESAMPLE
    parts = ATTENTION if isinstance(module, FrameAttention) else parts
    their_conv, their_norm = parts[conv]
    inner = f"{their_norm}.gamma" if kind == "norm_weight" else f"{their_conv}.{kind}"
    return f"{side}.{_their_layer(vae, side, index)}.{inner}"


def _their_layer(vae: CausalVAE, side: str, index: int) -> str:
    """Returns their name of one of our layers; theirs are grouped into the middle and the
    scales."""
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    if side == "encoder":
        before = len(vae.encoder.layers) - len(middle)
        return f"down_blocks.{index}" if index < before else middle[index - before]
    if index < len(middle):
        return middle[index]
    blocks = vae.config.decoder_blocks[0]  # equal at every scale
    scale, place = divmod(index - len(middle), blocks + 1)
    inner = f"resnets.{place}" if place < blocks else "upsamplers.0"
    return f"up_blocks.{scale}.{inner}"
