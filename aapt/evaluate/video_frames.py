"""Chosen video frames of several videos, and their decoding from streams of latent frames."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clock import FRAMES_PER_LATENT
from ..device import mixed_precision
from ..streaming.rollout import decode_frames
from ..vae import CausalVAE


@dataclass(frozen=True)
class VideoFrames:
    """Video frames of several videos, with the same numbers in each.

    Attributes:
        numbers: Of the frames, counted from 0 in the whole videos.
        pixels: uint8 (starts, len(numbers), H, W, 3).
    """

    numbers: Sequence[int]
    pixels: Tensor

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        """Return the frames with these numbers: uint8 (starts, len(numbers), H, W, 3)."""
        places = {number: place for place, number in enumerate(self.numbers)}
        missing = [number for number in numbers if number not in places]
        if missing:
            raise ValueError(f"frames: expected numbers that were kept, got {missing}")
        return self.pixels[:, [places[number] for number in numbers]]


def precision(device: torch.device) -> AbstractContextManager:
    """Return the context in which videos are made: mixed precision on a GPU, float32 on a CPU."""
    return mixed_precision(device) if device.type == "cuda" else nullcontext()


@torch.inference_mode()
def decode_chosen(vae: CausalVAE, latents: Iterable[Tensor], numbers: Iterable[int]) -> VideoFrames:
    """Decode some video frames of streams of latent frames (starts, C, 1, h, w)."""
    wanted = set(numbers)
    pixels, chosen = [], {math.ceil(number / FRAMES_PER_LATENT) for number in wanted}
    with precision(vae.latent_mean.device):
        for place, video in decode_frames(vae, latents, chosen):
            begin = FRAMES_PER_LATENT * place - video.shape[1] + 1
            pixels.append(video[:, [i for i in range(video.shape[1]) if begin + i in wanted]])
    return VideoFrames(sorted(wanted), torch.cat(pixels, dim=1))


@torch.inference_mode()
def decode_stream(vae: CausalVAE, latents: Tensor) -> Iterator[Tensor]:
    """Decode one stream of latents (1, C, T, h, w): yields uint8 (F, H, W, 3) per latent frame."""
    device = vae.latent_mean.device
    frames = latents.to(device).split(1, dim=2)
    with precision(device):
        for _, video in decode_frames(vae, frames, range(len(frames))):
            yield video[0]


def latent_statistics(latents: Tensor) -> Tensor:
    """Return the offset and the deviation (B, T, 2) of each latent frame of (B, C, T, h, w).

    The offset is the root mean square of the channels' means, the deviation the standard deviation
    of all numbers of the frame.
    """
    frames = latents.float().transpose(1, 2)  # (B, T, C, h, w)
    offset = frames.mean(dim=(3, 4)).square().mean(dim=2).sqrt()
    return torch.stack([offset, frames.flatten(2).std(dim=-1)], dim=-1)
