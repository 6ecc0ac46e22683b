"""Corruption of recycled frames: a stabiliser for small models (SPEC 12)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.randomness import ClipRandom


@dataclass(frozen=True)
class Corruption:
    """White noise up to `white` plus a constant per channel up to `offset`, with a chance of
    `clip_chance` per clip, on recycled frames; the user's own frame is corrupted only with a chance
    of `first_chance` on top. Offsets of a deviation turn a theme into another one, and only the
    prompt and the first frame tell the way back."""

    white: float = 0.35
    offset: float = 0.35
    clip_chance: float = 0.6
    first_chance: float = 0.3

    def __call__(self, frames: Tensor, first: bool, random: ClipRandom) -> Tensor:
        """frames (B, C, T, H, W), `first`: whether the user's own is among them."""
        channels, time = frames.shape[1:3]
        chance = self.clip_chance * (self.first_chance if first else 1.0)
        white = self.white * random.uniform(1, 1, 1, 1) * random.normal(*frames.shape[1:])
        offset = self.offset * random.uniform(1, 1, 1, 1) * random.normal(channels, time, 1, 1)
        chosen = random.uniform(1, 1, 1, 1) < chance
        return torch.where(chosen, frames + white + offset, frames)
