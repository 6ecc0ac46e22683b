"""Decoder of TAEHV's kind (madebyollin/taehv): blocks that see one frame back, without norms.

It reads normalised latents. Every latent frame makes `time_factor` video frames. Of those that a
stream's first latent frame makes, only the last is returned; the layers keep the others, because
later frames see them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig
from .layers import (
    Call,
    CausalConv3d,
    DecoderState,
    States,
    frames_needed,
    last_frames,
    unfold_channels,
)

CLAMP = 3.0  # bound of a latent, by a hyperbolic tangent


class MemoryBlock(nn.Module):
    """Three convolutions, added to the input; the first sees the frame before."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, (2, 3, 3))
        self.conv2 = CausalConv3d(channels, channels, (1, 3, 3))
        self.conv3 = CausalConv3d(channels, channels, (1, 3, 3))

    def forward(self, x: Tensor, stream: States) -> Tensor:
        y = F.relu(self.conv1(x, stream))
        y = F.relu(self.conv2(y, stream))
        return F.relu(self.conv3(y, stream, residual=x))

    def needs(self, frames: int) -> int:
        return self.conv1.needs(frames)

    def calls(self, *size: int) -> list[Call]:
        last = Call(self.conv3, *size, residual=True)
        return [Call(self.conv1, *size), Call(self.conv2, *size), last]


class Grow(nn.Module):
    """Upsampling: nearest pixels in space, and a convolution that makes the channels of every new
    frame."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int]):
        super().__init__()
        time, space = self.stride = stride
        self.conv = CausalConv3d(in_channels, time * out_channels, (1, 3, 3), upsample=(1, space))

    def forward(self, x: Tensor, stream: States) -> Tensor:
        return unfold_channels(self.conv(x, stream), self.stride[0], 1)

    def needs(self, frames: int) -> int:
        return math.ceil(frames / self.stride[0])

    def calls(self, *size: int) -> list[Call]:
        return [Call(self.conv, *size)]


class MemoryDecoder(nn.Module):
    """Latent to video, a whole clip or any chunk of it; see `autoencoder.Decoder`."""

    projection = lapped = None  # parts of `autoencoder.Decoder` that this decoder has not

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, blocks, strides = config.decoder_channels, config.decoder_blocks, config.upscales
        self.patch_size, self.time_factor = config.patch_size, config.time_factor
        self.conv_in = CausalConv3d(config.latent_channels, channels[-1], (1, 3, 3))
        layers: list[nn.Module] = []
        for scale in reversed(range(len(channels))):
            layers += [MemoryBlock(channels[scale]) for _ in range(blocks[scale])]
            if scale > 0:
                layers.append(Grow(channels[scale], channels[scale - 1], strides[scale - 1]))
        self.layers = nn.ModuleList(layers)
        self.conv_out = CausalConv3d(channels[0], 3 * config.patch_size**2, (1, 3, 3))

    def forward(
        self,
        latent: Tensor,
        state: DecoderState | None,
        pixels: bool = False,
        state_out: DecoderState | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """Decodes a chunk, see `autoencoder.Decoder.forward`."""
        needs = frames_needed([self.conv_in, *self.layers, self.conv_out], last)
        stream = States(state, state_out)
        x = torch.tanh(last_frames(latent, needs.pop()) / CLAMP) * CLAMP
        x = F.relu(self.conv_in(x, stream))
        for layer in self.layers:
            x = layer(last_frames(x, needs.pop()), stream)
        x = self.conv_out(F.relu(last_frames(x, needs.pop())), stream, pixels=pixels)
        if stream.starts:
            last = x.shape[2] - (self.time_factor - 1)
        return unfold_channels(last_frames(x, last), 1, self.patch_size), tuple(stream.new_states)
