"""The video frames that an evaluation keeps of many videos, and those that a checkpoint makes."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clock import FRAMES_PER_LATENT
from ..device import mixed_precision
from ..streaming.rollout import decode_frames
from ..vae import CausalVAE


@dataclass(frozen=True)
class Footage:
    """Some video frames of several videos: pixels uint8 (starts, len(frames), H, W, 3), where
    `frames` are their numbers in the whole videos."""

    frames: Sequence[int]
    pixels: Tensor

    def __getitem__(self, frames: Sequence[int]) -> Tensor:
        """The frames of these numbers: uint8 (starts, len(frames), H, W, 3)."""
        places = {frame: place for place, frame in enumerate(self.frames)}
        missing = [frame for frame in frames if frame not in places]
        if missing:
            raise ValueError(f"frames: expected numbers that were kept, got {missing}")
        return self.pixels[:, [places[frame] for frame in frames]]


def precision(device: torch.device) -> AbstractContextManager:
    """What checkpoints make videos in: as training's samples on a GPU, float32 on a CPU."""
    return mixed_precision(device) if device.type == "cuda" else nullcontext()


@torch.inference_mode()
def film(vae: CausalVAE, latents: Iterable[Tensor], frames: Iterable[int]) -> Footage:
    """Some video frames of streams of latent frames (starts, C, 1, h, w)."""
    wanted = set(frames)
    pixels, chosen = [], {math.ceil(frame / FRAMES_PER_LATENT) for frame in wanted}
    with precision(vae.latent_mean.device):
        for number, video in decode_frames(vae, latents, chosen):
            begin = FRAMES_PER_LATENT * number - video.shape[1] + 1
            pixels.append(video[:, [i for i in range(video.shape[1]) if begin + i in wanted]])
    return Footage(sorted(wanted), torch.cat(pixels, dim=1))


def latent_statistics(latents: Tensor) -> Tensor:
    """Offset and deviation (B, T, 2) of each latent frame of (B, C, T, h, w): the root mean square
    of its channels' means, and the standard deviation of all its numbers."""
    frames = latents.float().transpose(1, 2)  # (B, T, C, h, w)
    offset = frames.mean(dim=(3, 4)).square().mean(dim=2).sqrt()
    return torch.stack([offset, frames.flatten(2).std(dim=-1)], dim=-1)
