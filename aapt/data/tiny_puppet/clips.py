"""Training data from the puppet: rendered clips with their poses.

Run `python -m aapt.data.tiny_puppet.clips --out sheet.png` to draw every look and every place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...clock import FPS
from .looks import LOOKS
from .motions import keypoints, sample_body, sample_joints
from .render import PLACES, backdrop, render_puppet


@dataclass(frozen=True)
class PuppetClip:
    """A rendered clip of n latent frames, with its poses and prompt.

    Attributes:
        video: uint8 (4 n - 3, height, width, 3).
        points: float64 (4 n - 3, 14, 3), keypoints (x, y, visible) of each video frame, see `Pose`.
        prompt: The look and the place in words.
        look, place: Indices into LOOKS and PLACES.
    """

    video: Tensor
    points: np.ndarray
    prompt: str
    look: int
    place: int


def prompt_of(look: int, place: int) -> str:
    """Return the prompt of a look in a place, at most 24 bytes."""
    return f"{LOOKS[look].name} {PLACES[place]}"


def sample_puppet(
    seed: int,
    latent_frames: int,
    *,
    look: int | None = None,
    place: int | None = None,
    motion: str | None = None,
    height: int = 96,
    width: int = 96,
) -> PuppetClip:
    """Render a random figure that moves in a random place. Equal arguments give equal clips.

    Args:
        seed: Any int >= 0; decides body, colours, place and motion, and what is not given.
        latent_frames: Length, with the first frame; 1 gives a single image.
        look, place: Indices into LOOKS and PLACES, None for random ones.
        motion: One of MOTIONS for the whole clip, None for random ones in turn.
        height, width: Size of the video in pixels.
    """
    if latent_frames < 1:
        raise ValueError(f"latent_frames: expected 1 or more, got {latent_frames}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(len(LOOKS))), int(rng.integers(len(PLACES)))
    look, place = (d if given is None else given for d, given in zip(drawn, (look, place)))
    body, tint = sample_body(rng), rng.uniform(0.92, 1.06, 3)
    seconds = np.arange(4 * latent_frames - 3) / FPS
    points = keypoints(sample_joints(seconds, rng, motion), body, width / height)
    behind = backdrop(seed, place, height, width)
    video = render_puppet(points, body, look, tint, behind, place)
    seen = np.concatenate([points, np.ones((*points.shape[:2], 1))], axis=-1)
    return PuppetClip(torch.from_numpy(video), seen, prompt_of(look, place), look, place)


def draw_looks(path: str | Path, moments: int = 6) -> None:
    """Write an image with a row per look, each in another place: moments half a second apart."""
    from PIL import Image

    rows = []
    for look in range(len(LOOKS)):
        clip = sample_puppet(look, 3 * moments, look=look, place=look % len(PLACES))
        rows.append(np.concatenate(list(clip.video[::12].numpy()), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draws a contact sheet of the puppet.")
    parser.add_argument("--out", default="sheet.png")
    draw_looks(parser.parse_args().out)
