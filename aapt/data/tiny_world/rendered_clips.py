"""Training data from the tiny world: rendered clips, and the latents of many of them.

`python -m aapt.data.tiny_world.rendered_clips --out sheet.png` draws every theme.
"""

import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...vae import CausalVAE
from ...vae.pixels import to_video
from ..clips import LatentClips
from .render import render
from .themes import THEMES
from .world import make_world, sample_trajectory


@dataclass(frozen=True)
class Clip:
    """A clip of n latent frames and what made it.

    Attributes:
        video: uint8 (4 n - 3, height, width, 3).
        controls: float32 (n - 1, 2), rows (yaw, forward); row i drives video frames 4 i + 1 to
            4 i + 4.
        poses: float64 (4 n - 3, 3), rows (x, y, heading).
        prompt: One of the sentences of the theme.
        theme: Index into THEMES.
    """

    video: Tensor
    controls: Tensor
    poses: Tensor
    prompt: str
    theme: int


def sample_clip(
    seed: int,
    latent_frames: int,
    *,
    theme: int | None = None,
    height: int = 80,
    width: int = 128,
) -> Clip:
    """A random walk through a random world, the same for the same arguments.

    Args:
        seed: Any int >= 0: world, walk, prompt, and the theme unless it is given.
        latent_frames: Length, the first frame included; 1 gives a single picture.
        theme: Index into THEMES, None for a random one.
        height, width: Size of the video in pixels.
    """
    if latent_frames < 1:
        raise ValueError(f"latent_frames: expected 1 or more, got {latent_frames}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(len(THEMES)))
    theme = drawn if theme is None else theme
    world = make_world(seed, theme)
    prompt = THEMES[theme].prompts[int(rng.integers(len(THEMES[theme].prompts)))]
    controls, poses = sample_trajectory(world, latent_frames - 1, rng)
    return Clip(render(world, poses, height, width), controls, poses, prompt, theme)


@dataclass(frozen=True)
class ProceduralData:
    """How much of the world is rendered. Clip i of a set has seed `first_seed + i`."""

    height: int
    width: int
    clips: int
    latent_frames: int
    video_clips: int = 0  # the first of them, kept as pixels for the decoder
    first_seed: int = 1_000


def render_clips(data: ProceduralData, workers: int, count: int | None = None) -> Iterator[Clip]:
    """The first `count` clips in order, all unless given, rendered by `workers` processes."""
    count = data.clips if count is None else count
    seeds = range(data.first_seed, data.first_seed + count)
    render_clip = partial(
        sample_clip,
        latent_frames=data.latent_frames,
        height=data.height,
        width=data.width,
    )
    # Fork would copy torch's threads in an unknown state.
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_single_thread) as pool:
        yield from pool.imap(render_clip, seeds, chunksize=4)


def _single_thread() -> None:
    torch.set_num_threads(1)


@torch.inference_mode()
def encode_clips(vae: CausalVAE, clips: Iterable[Clip], batch: int = 4) -> dict[str, Tensor]:
    """Latents (clips, C, T, h, w) float16, controls (clips, T - 1, 2) and themes (clips,)."""
    latents, controls, themes, pending = [], [], [], []

    def flush():
        if pending:
            latents.append(vae.encode(to_video(torch.stack(pending))).half())
            pending.clear()

    for clip in clips:
        pending.append(clip.video)
        controls.append(clip.controls)
        themes.append(clip.theme)
        if len(pending) == batch:
            flush()
    flush()
    return {
        "latents": torch.cat(latents),
        "controls": torch.stack(controls).float(),
        "themes": torch.tensor(themes),
    }


def latent_clips(tensors: dict[str, Tensor]) -> LatentClips:
    """What `encode_clips` returned, or its saved form, with each theme's phrasings."""
    phrasings = [THEMES[theme].prompts for theme in tensors["themes"].tolist()]
    return LatentClips(tensors["latents"], tensors["controls"], phrasings)


def draw_themes(path: str | Path, moments: int = 6) -> None:
    """Writes a picture with a row per theme: moments of one walk, 6 latent frames apart."""
    from PIL import Image

    rows = []
    for theme in range(len(THEMES)):
        clip = sample_clip(theme, 6 * moments, theme=theme)
        rows.append(np.concatenate(list(clip.video[::24].numpy()), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draws a contact sheet of the tiny world.")
    parser.add_argument("--out", default="sheet.png")
    draw_themes(parser.parse_args().out)
