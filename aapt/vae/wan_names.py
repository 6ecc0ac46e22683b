"""Names of the tensors of Wan's autoencoders: ours, diffusers', and those of Wan's own files."""

import re
from collections.abc import Iterator

from torch import nn

from .autoencoder import CausalVAE
from .layers import FrameAttention, ResidualBlock
from .shortcuts import Scale

# diffusers' names of our convolution and of the norm before it.
BLOCK = {
    "conv1": ("conv1", "norm1"),
    "conv2": ("conv2", "norm2"),
    "shortcut": ("conv_shortcut", ""),
}
ATTENTION = {"qkv": ("to_qkv", "norm"), "proj": ("proj", "")}
RESAMPLE = {"conv": ("resample.1", ""), "time_conv": ("time_conv", "")}
MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")

# Wan's own names of parts of a block, by diffusers'.
NATIVE_BLOCK = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
NATIVE = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    # Wan 2.2 groups the layers of a scale, Wan 2.1 numbers all of them.
    (
        r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.",
        r"\1 downsampler.\2.",
    ),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"\1 resnets.\2."),
    (r"^(\d+) (downsampler|resnets)", r"encoder.down_blocks.\1.\2"),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.", r"\1 upsampler.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"\1 resnets.\2."),
    (r"^(\d+) (upsampler|resnets)", r"decoder.up_blocks.\1.\2"),
)
DECODER_LAYERS = 4  # of a scale of Wan 2.1: three blocks, one upsampling


def diffusers_name(name: str) -> str:
    """Returns diffusers' name of a tensor of Wan's own files; other names stay."""
    for native, theirs in NATIVE:
        name = re.sub(native, theirs, name)
    if match := re.match(r"^decoder\.upsamples\.(\d+)\.", name):
        scale, place = divmod(int(match[1]), DECODER_LAYERS)
        last = place == DECODER_LAYERS - 1
        inner = "upsamplers.0" if last else f"resnets.{place}"
        name = f"decoder.up_blocks.{scale}.{inner}.{name[match.end() :]}"
    if re.match(r"^(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.", name):
        for native, theirs in NATIVE_BLOCK.items():
            name = name.replace(f".{native}", f".{theirs}")
    return name


def our_names(vae: CausalVAE) -> Iterator[tuple[str, str]]:
    """Yields (our name, diffusers' name) of every parameter of a Wan autoencoder."""
    if vae.decoder.projection is not None:
        for kind in ("weight", "bias"):
            yield f"decoder.projection.{kind}", f"post_quant_conv.{kind}"
    for side, network in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        if network is None:
            continue
        for conv in ("conv_in", "conv_out"):
            for kind, _ in getattr(network, conv).named_parameters():
                inner = "norm_out.gamma" if kind == "norm_weight" else f"{conv}.{kind}"
                yield f"{side}.{conv}.{kind}", f"{side}.{inner}"
        layers = _encoder_layers if side == "encoder" else _decoder_layers
        for ours, theirs, layer in layers(network.layers):
            for name, _ in layer.named_parameters():
                conv, kind = name.split(".")
                yield f"{side}.layers.{ours}.{name}", f"{side}.{theirs}.{_inner(layer, conv, kind)}"


def _inner(layer: nn.Module, conv: str, kind: str) -> str:
    parts = BLOCK if isinstance(layer, ResidualBlock) else RESAMPLE
    parts = ATTENTION if isinstance(layer, FrameAttention) else parts
    their_conv, their_norm = parts[conv]
    return f"{their_norm}.gamma" if kind == "norm_weight" else f"{their_conv}.{kind}"


def _encoder_layers(layers: nn.ModuleList) -> Iterator[tuple[str, str, nn.Module]]:
    """Yields (our place, their name, layer); a scale with shortcuts yields its layers."""
    before = len(layers) - len(MIDDLE)
    for index, layer in enumerate(layers):
        if index >= before:
            yield f"{index}", MIDDLE[index - before], layer
        elif isinstance(layer, Scale):
            for place, inner in enumerate(layer.layers):
                block = f"resnets.{place}" if isinstance(inner, ResidualBlock) else "downsampler"
                yield f"{index}.layers.{place}", f"down_blocks.{index}.{block}", inner
        else:
            yield f"{index}", f"down_blocks.{index}", layer


def _decoder_layers(layers: nn.ModuleList) -> Iterator[tuple[str, str, nn.Module]]:
    """Yields (our place, their name, layer); a scale with shortcuts yields its layers."""
    scale = place = 0
    for index, layer in enumerate(layers):
        if index < len(MIDDLE):
            yield f"{index}", MIDDLE[index], layer
        elif isinstance(layer, Scale):
            for inner_place, inner in enumerate(layer.layers):
                block = (
                    f"resnets.{inner_place}" if isinstance(inner, ResidualBlock) else "upsampler"
                )
                yield f"{index}.layers.{inner_place}", f"up_blocks.{scale}.{block}", inner
            scale += 1
        elif isinstance(layer, ResidualBlock):
            yield f"{index}", f"up_blocks.{scale}.resnets.{place}", layer
            place += 1
        else:
            yield f"{index}", f"up_blocks.{scale}.upsamplers.0", layer
            scale, place = scale + 1, 0
