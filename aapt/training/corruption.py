"""Corruption of recycled frames: a stabiliser for small models (docs/method.md#12)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.randomness import ClipRandom


@dataclass(frozen=True)
class Corruption:
    """Adds white noise and an offset per channel and frame to the recycled frames of some clips.

    Offsets of about one deviation turn a theme of the tiny world into another one. The model can
    then find the way back from the prompt and the first frame only.

    Attributes:
        white: Greatest deviation of the noise; it is drawn for each clip from 0 to this.
        offset: Greatest deviation of the offsets, drawn in the same way.
        clip_chance: Probability that a clip is corrupted.
        first_chance: Factor on `clip_chance` for the user's own frame.
    """

    white: float = 0.35
    offset: float = 0.35
    clip_chance: float = 0.6
    first_chance: float = 0.3

    def __call__(self, frames: Tensor, first: bool, random: ClipRandom) -> Tensor:
        """Corrupt `frames` (B, C, T, H, W). `first`: True if the user's own frame is among them."""
        channels, time = frames.shape[1:3]
        chance = self.clip_chance * (self.first_chance if first else 1.0)
        white = self.white * random.uniform(1, 1, 1, 1) * random.normal(*frames.shape[1:])
        offset = self.offset * random.uniform(1, 1, 1, 1) * random.normal(channels, time, 1, 1)
        chosen = random.uniform(1, 1, 1, 1) < chance
        return torch.where(chosen, frames + white + offset, frames)
