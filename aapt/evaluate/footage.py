"""Held-out walks, and the video frames of them that an evaluation keeps: rendered or generated."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..conditioning import control_rays
from ..data.procedural import to_video
from ..data.world import FRAMES_PER_LATENT, THEMES, World, make_world, render, sample_trajectory
from ..generator import StreamingGenerator
from ..samples import decode_frames, roll_out, to_pixels

FIRST_SEED = 10_000_000  # of held-out worlds: far beyond those of training and of the motion probe
SEEDS_PER_EVALUATION = 1_000
THEME_SEED = 6_000_000  # of the worlds that stand for a theme
THEME_WORLDS = 4


@dataclass(frozen=True)
class Start:
    """A walk through a world that no training has seen.

    Attributes:
        controls: (T, 2), rows (yaw, forward).
        poses: (1 + 4 T, 3), one per video frame.
    """

    world: World
    prompt: str
    controls: Tensor
    poses: Tensor


def held_out_starts(count: int, steps: int, seed: int) -> list[Start]:
    """`count` walks of `steps` latent frames; they take turns in the themes and their phrasings.

    Walk i is the same whatever the count, and its beginning whatever the number of steps.
    """
    if not 1 <= count <= SEEDS_PER_EVALUATION:
        raise ValueError(f"starts: expected 1 to {SEEDS_PER_EVALUATION}, got {count}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    starts = []
    for index in range(count):
        world_seed = FIRST_SEED + SEEDS_PER_EVALUATION * seed + index
        turn, theme = divmod(index, len(THEMES))
        world = make_world(world_seed, theme)
        prompts = THEMES[theme].prompts
        walk = sample_trajectory(world, steps, np.random.default_rng(world_seed))
        starts.append(Start(world, prompts[turn % len(prompts)], *walk))
    return starts


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


def theme_footage(height: int, width: int) -> Tensor:
    """Frames from all over each theme: uint8 (themes, F, H, W, 3), what a theme looks like."""
    themes = []
    for theme in range(len(THEMES)):
        frames = []
        for index in range(THEME_WORLDS):
            seed = THEME_SEED + index
            world = make_world(seed, theme)
            _, poses = sample_trajectory(world, 48, np.random.default_rng(seed))
            frames.append(render(world, poses[::24], height, width))
        themes.append(torch.cat(frames))
    return torch.stack(themes)


def film_truth(starts: Sequence[Start], frames: Sequence[int], height: int, width: int) -> Footage:
    """What the renderer shows of the starts."""
    chosen = list(frames)
    videos = [render(start.world, start.poses[chosen], height, width) for start in starts]
    return Footage(chosen, torch.stack(videos))


@torch.inference_mode()
def film_reconstruction(
    generator: StreamingGenerator, truth: Footage, stretches: Iterable[Sequence[int]]
) -> tuple[Footage, list[Tensor]]:
    """The truth through the autoencoder and back, and `latent_statistics` of each stretch.

    Each stretch of 1 + 4 T frames is a clip of its own. Of its latent frames the first, which
    covers one video frame alone, is left out of the statistics (starts, T, 2).
    """
    kept, pixels, statistics = [], [], []
    for stretch in stretches:
        clips = [to_video(clip[None]) for clip in truth[stretch]]
        encoded = [generator.vae.encode(clip.to(generator.device)) for clip in clips]
        decoded = [to_pixels(generator.vae.decode(latent)) for latent in encoded]
        kept.extend(stretch)
        pixels.append(torch.cat(decoded))
        statistics.append(latent_statistics(torch.cat(encoded)[:, :, 1:]).cpu())
    return Footage(kept, torch.cat(pixels, dim=1)), statistics


@torch.inference_mode()
def film_rollout(
    generator: StreamingGenerator,
    starts: Sequence[Start],
    first: Tensor,
    frames: Sequence[int],
    seed: int,
) -> tuple[Footage, Tensor]:
    """All starts generated side by side on the streaming path, one step per control.

    first: uint8 (starts, H, W, 3), what the streams begin with. Noise is drawn per start. Returns
    the footage and the `latent_statistics` (starts, 1 + T, 2) of all latent frames.
    """
    model, device, wanted = generator.model, generator.device, set(frames)
    controls = torch.stack([start.controls for start in starts]).to(device)
    latent = generator.vae.encode(to_video(first[:, None]).to(device))

    def rays(step: int) -> Tensor:
        return control_rays(controls[:, step - 1 : step], model.camera, *latent.shape[-2:])

    text = model.text_encoder([start.prompt for start in starts])
    steps = controls.shape[1]
    latents = roll_out(model, latent, text, rays, steps, seed, generator.sampling)
    statistics = []

    def measured() -> Iterator[Tensor]:
        for latent in latents:
            statistics.append(latent_statistics(latent))
            yield latent

    pixels, chosen = [], {math.ceil(frame / FRAMES_PER_LATENT) for frame in wanted}
    for number, video in decode_frames(generator.vae, measured(), chosen):
        begin = FRAMES_PER_LATENT * number - video.shape[1] + 1
        pixels.append(video[:, [i for i in range(video.shape[1]) if begin + i in wanted]])
    return Footage(sorted(wanted), torch.cat(pixels, dim=1)), torch.cat(statistics, dim=1).cpu()


def latent_statistics(latents: Tensor) -> Tensor:
    """Offset and deviation (B, T, 2) of each latent frame of (B, C, T, h, w): the root mean square
    of its channels' means, and the standard deviation of all its numbers."""
    frames = latents.float().transpose(1, 2)  # (B, T, C, h, w)
    offset = frames.mean(dim=(3, 4)).square().mean(dim=2).sqrt()
    return torch.stack([offset, frames.flatten(2).std(dim=-1)], dim=-1)
