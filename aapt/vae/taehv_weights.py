"""TAEHV's published decoders (madebyollin/taehv) in our streaming form.

They are `taew2_1.pth`, `taew2_2.pth`, and LightX2V's `lighttaew2_1.pth` of the same layout.

Their encoders are not read: clips are encoded by the autoencoder that a model was trained with.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, read_weights
from .autoencoder import VIDEO_CHANNELS, CausalVAE
from .config import taehv
from .memory import Grow, MemoryBlock

FIRST, LAST = "decoder.1", "decoder.22"  # their first and their last convolution
BLOCK = {"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}


def is_taehv(tensors: Mapping[str, Tensor]) -> bool:
    """Returns True for the tensors of a file of TAEHV's kind."""
    return f"{FIRST}.weight" in tensors and f"{LAST}.weight" in tensors


def load_taehv(path: Path | str) -> CausalVAE:
    """Loads the decoder of a file of TAEHV's kind, float32; `encode` raises.

    Video is not clamped to [-1, 1]. CheckpointError names the file and what is missing or does not
    fit.
    """
    path = Path(path)
    theirs = read_weights(path)
    if not is_taehv(theirs):
        raise CheckpointError(f"{path}: expected TAEHV's tensor {FIRST}.weight, which is missing")
    patch = round((len(theirs[f"{LAST}.weight"]) / VIDEO_CHANNELS) ** 0.5)
    with torch.device("meta"):
        vae = CausalVAE(taehv(theirs[f"{FIRST}.weight"].shape[1], patch))
    used: set[str] = set()

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in theirs:
            raise CheckpointError(f"{path}: expected tensor {name}, which is missing")
        if tuple(theirs[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name}: expected {shape}, got {tuple(theirs[name].shape)}"
            )
        used.add(name)
        return theirs[name].float()

    weights = _decoder_weights(vae, take)
    unknown = [name for name in theirs if name not in used and not name.startswith("encoder.")]
    if unknown:
        raise CheckpointError(f"{path}: tensor {min(unknown)} belongs to no parameter of the model")
    channels = vae.config.latent_channels
    weights["latent_mean"] = torch.zeros(channels, 1, 1, 1)
    weights["latent_std"] = torch.ones(channels, 1, 1, 1)
    vae.load_state_dict(weights, assign=True)
    return vae


def _decoder_weights(vae: CausalVAE, take) -> dict[str, Tensor]:
    """Returns our parameters by name. take(name, shape): their tensor."""
    weights = {}

    def put(name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Adds a convolution, in 2D or with frames."""
        weight = weight if weight.dim() == 5 else weight[:, :, None]
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        layout = torch.channels_last_3d
        weights[f"{name}.weight"] = torch.nn.Parameter(weight.contiguous(memory_format=layout))
        weights[f"{name}.bias"] = torch.nn.Parameter(bias)

    decoder, config = vae.decoder, vae.config
    width = config.decoder_channels[-1]
    put(
        "decoder.conv_in",
        take(f"{FIRST}.weight", (width, config.latent_channels, 3, 3)),
        take(f"{FIRST}.bias", (width,)),
    )
    place = 3  # of the next layer in their sequence
    for index, layer in enumerate(decoder.layers):
        ours = f"decoder.layers.{index}"
        if isinstance(layer, MemoryBlock):
            for conv, theirs in BLOCK.items():
                name = f"decoder.{place}.{theirs}"
                frames = 2 if conv == "conv1" else 1
                weight = take(f"{name}.weight", (width, frames * width, 3, 3))
                # Theirs reads (this frame, the frame before) as channels
                weight = torch.stack(weight.split(width, dim=1)[::-1], dim=2)
                put(f"{ours}.{conv}", weight, take(f"{name}.bias", (width,)))
            place += 1
        elif isinstance(layer, Grow):  # theirs: upsample, a product for every frame, convolve
            time, (out, _) = layer.stride[0], layer.conv.weight.shape[:2]
            grow = take(f"decoder.{place + 1}.conv.weight", (time * width, width, 1, 1))
            conv = take(f"decoder.{place + 2}.weight", (out // time, width, 3, 3))
            frames = grow.flatten(1).unflatten(0, (time, width)).double()
            joined = torch.einsum("ochw,tci->toihw", conv.double(), frames).flatten(0, 1)
            put(f"{ours}.conv", joined.float())
            place, width = place + 3, out // time
    rows = len(decoder.conv_out.weight)
    weight, bias = take(f"{LAST}.weight", (rows, width, 3, 3)), take(f"{LAST}.bias", (rows,))
    # Their pixels are in [0, 1], and (colour, row, column) of a square; ours (row, column, colour)
    order = torch.arange(rows).unflatten(0, (VIDEO_CHANNELS, -1)).T.flatten()
    put("decoder.conv_out", 2 * weight[order], 2 * bias[order] - 1)
    return weights
