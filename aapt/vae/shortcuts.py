"""Scales of Wan 2.2's autoencoder: layers, and a shortcut without weights around them."""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig
from .layers import (
    Call,
    CausalConv3d,
    ResidualBlock,
    SeparateDownsample,
    SeparateUpsample,
    States,
    norm_of,
)


class Scale(nn.Module):
    """Layers of one scale. The last one may change the size, by `stride` = (time, space)."""

    def __init__(self, layers: list[nn.Module], stride: tuple[int, int]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.stride = stride

    @property
    def conv1(self) -> CausalConv3d | None:
        """The convolution that norms and activates the scale's input, see `norm_of`."""
        return norm_of(self.layers[0])

    def needs(self, frames: int) -> int:
        for layer in reversed(self.layers):
            frames = layer.needs(frames)
        return frames

    def calls(self, *size: int) -> list[Call]:
        return [call for layer in self.layers for call in layer.calls(*size)]


class DownScale(Scale):
    """Residual blocks and a downsampling. Around them each output pixel is the mean of its pixels,
    and `stride` frames are the channels of one, after zeros before the first frame."""

    def __init__(self, width: int, channels: int, blocks: int, stride: tuple[int, int], config):
        if channels != width * stride[0]:
            raise ValueError(
                f"encoder_channels: expected {width * stride[0]} after {width} with shortcuts and "
                f"stride {stride}, got {channels}"
            )
        layers = _blocks(width, channels, blocks, config)
        if max(stride) > 1:
            layers.append(SeparateDownsample(channels, stride, config.padding))
        super().__init__(layers, stride)

    def forward(self, x: Tensor, stream: States) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y, stream)
        return y + self._shortcut(x, stream.starts)

    def _shortcut(self, x: Tensor, starts: bool) -> Tensor:
        time, space = self.stride
        if starts:
            x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
        x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).mean(dim=(4, 6))
        return x.unflatten(2, (-1, time)).transpose(2, 3).flatten(1, 2)  # channel * time + frame


class UpScale(Scale):
    """Residual blocks and an upsampling. Around them each pixel's channels are repeated to fill its
    output pixels and frames."""

    def __init__(self, width: int, channels: int, blocks: int, stride: tuple[int, int], config):
        time, space = stride
        copies, rest = divmod(channels * time * space**2, width)
        if rest:
            raise ValueError(
                f"decoder_channels: expected {channels} * {time * space**2} to be a multiple of "
                f"{width} with shortcuts, got a rest of {rest}"
            )
        layers = _blocks(width, channels, blocks, config)
        super().__init__([*layers, SeparateUpsample(channels, channels, stride, config)], stride)
        self.channels, self.copies = channels, copies

    def forward(self, x: Tensor, stream: States, then: CausalConv3d | None = None) -> Tensor:
        *blocks, upsample = self.layers
        y = x
        for layer, follower in zip(blocks, self.layers[1:], strict=True):
            y = layer(y, stream, norm_of(follower))
        return upsample(y, stream, then, residual=self._shortcut(x, stream.starts))

    def calls(self, *size: int) -> list[Call]:
        *calls, last = super().calls(*size)
        return [*calls, last._replace(residual=True)]

    def _shortcut(self, x: Tensor, starts: bool) -> Tensor:
        time, space = self.stride
        x = x.repeat_interleave(self.copies, dim=1).unflatten(
            1, (self.channels, time, space, space)
        )
        # (B, C, time, space, space, T, H, W) to (B, C, T, time, H, space, W, space)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, time - 1 :] if starts else x


def encoder_scales(config: VAEConfig) -> list[nn.Module]:
    """Returns the layers of an encoder with shortcuts, without its middle."""
    widths = (config.encoder_channels[0], *config.encoder_channels)
    strides = (*config.strides, (1, 1))
    return [
        DownScale(width, channels, blocks, stride, config)
        for width, channels, blocks, stride in zip(
            widths, config.encoder_channels, config.encoder_blocks, strides
        )
    ]


def decoder_scales(config: VAEConfig) -> tuple[list[nn.Module], int]:
    """Returns the layers of a decoder with shortcuts, without its middle, and their channels. The
    finest scale has no upsampling, and so no shortcut."""
    layers, width = [], config.decoder_channels[-1]
    for scale in reversed(range(1, len(config.decoder_channels))):
        channels, blocks = config.decoder_channels[scale], config.decoder_blocks[scale]
        layers.append(UpScale(width, channels, blocks, config.upscales[scale - 1], config))
        width = channels
    channels = config.decoder_channels[0]
    return layers + _blocks(width, channels, config.decoder_blocks[0], config), channels


def _blocks(width: int, channels: int, count: int, config: VAEConfig) -> list[nn.Module]:
    widths = (width, *[channels] * count)
    return [ResidualBlock(w, channels, config) for w in widths[:count]]
