"""Clips of one bucket on their way into a file of latents."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoint import save_tensors
from ...model.conditioning import MEASURED_FIELD_OF_VIEW, camera_rays, through_lens
from ...model.config import CameraConfig
from ...vae import CausalVAE
from ...vae.pixels import to_video
from .clip_reader import RawClip

# Pixels of a chunk of video: one latent frame's at 1280x720. Memory does not grow with a clip.
CHUNK_PIXELS = 4 * 1280 * 720


class EncodeError(Exception):
    """The reason why encoding stopped. Written shards are whole, and a later run resumes."""


class Shard:
    """Clips of one bucket, encoded one after another and written together.

    embed: embeddings (n, width) of a caption, which are stored once per shard beside those of the
    empty prompt; None to store none.
    """

    def __init__(self, vae: CausalVAE, embed: Callable[[str], Tensor] | None = None):
        self.vae, self.embed = vae, embed
        self.texts: dict[str, Tensor] = {}
        self.clips: list[dict[str, Any]] = []
        self.tensors: dict[str, list[Tensor]] = {}
        self.squares = torch.zeros(2, dtype=torch.float64)  # of ray origins, of directions

    @torch.inference_mode()
    def add(self, clip: RawClip) -> None:
        """Encode a clip. EncodeError if its latents are not finite."""
        tensors = {"latents": self._encode(clip.video, clip.source)}
        if clip.poses is not None:
            tensors |= {"poses": clip.poses, "lens": clip.lens}
            self.squares += _ray_squares(clip, *tensors["latents"].shape[-2:])
        if clip.skeletons is not None:  # one drawing per latent frame that it moves
            tensors["skeletons"] = self._encode(clip.skeletons, clip.source)[:, 1:]
        for name, tensor in tensors.items():
            self.tensors.setdefault(name, []).append(tensor)
        if self.embed is not None:
            for caption in ("", *clip.captions):
                if caption not in self.texts:
                    self.texts[caption] = self.embed(caption)
        start = round(clip.start, 6)
        self.clips.append({"video": clip.source, "start": start, "captions": clip.captions})

    def _encode(self, frames: np.ndarray, source: str) -> Tensor:
        """uint8 (F, H, W, 3) -> (C, 1 + T, h, w) float16, chunk after chunk."""
        mean, state, latents = self.vae.latent_mean, None, []
        for chunk in chunks(len(frames), self.vae.config.time_factor, math.prod(frames.shape[1:3])):
            pixels = torch.from_numpy(frames[chunk])[None].to(mean.device)
            latent, state = self.vae.encode_frames(to_video(pixels).to(mean.dtype), state)
            latents.append(latent[0].half().cpu())
        latent = torch.cat(latents, dim=1)
        if not latent.isfinite().all():
            raise EncodeError(f"{source}: the VAE's latents are not finite in float16")
        return latent

    def write(self, path: Path) -> None:
        stacked = {name: torch.stack(tensors) for name, tensors in self.tensors.items()}
        metadata = {"clips": json.dumps(self.clips)}
        if self.texts:
            stacked["text"] = torch.cat(list(self.texts.values()))
            stacked["text_ends"] = torch.tensor([len(rows) for rows in self.texts.values()]).cumsum(
                0
            )
            metadata["texts"] = json.dumps(list(self.texts))
        save_tensors(path, stacked, metadata)


def chunks(frames: int, per_latent: int, pixels: int) -> Iterator[slice]:
    """Yields the chunks of a clip of 1 + n * `per_latent` video frames, about CHUNK_PIXELS each.

    pixels: of one video frame. The first chunk has one frame more than the others.
    """
    length = per_latent * max(1, CHUNK_PIXELS // (pixels * per_latent))
    start = 0
    while start < frames:
        end = (start or 1) + length
        yield slice(start, end)
        start = end


def _ray_squares(clip: RawClip, height: int, width: int) -> Tensor:
    """Mean squares (2,) of the clip's ray origins and directions, not scaled."""
    frames = clip.poses.shape[1]
    unit = CameraConfig(MEASURED_FIELD_OF_VIEW, 0.0, 0.0, 1.0, 1.0, frames)
    poses = through_lens(clip.poses, clip.lens, unit, height, width)
    rays = camera_rays(poses[None], unit, height, width)[0].unflatten(0, (frames, 2, 3))
    return rays.double().square().mean(dim=(0, 2, 3, 4, 5))
