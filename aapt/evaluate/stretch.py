"""A stretch of the videos of a source, with what metrics compare of it, measured once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.world import FRAMES_PER_LATENT
from . import metrics
from .features import describe


@dataclass(frozen=True)
class Stretch:
    """The same frames of several videos, uint8 (starts, F, H, W, 3).

    Attributes:
        sharpness, palette: See `metrics`.
        features: Of the last two frames of every latent frame, (starts latent frames, D).
    """

    video: Tensor
    sharpness: float
    palette: Tensor
    features: Tensor

    @classmethod
    def of(cls, video: Tensor) -> Stretch:
        """Of whole latent frames, or of the last two frames of one."""
        pairs = video.unflatten(1, (-1, min(FRAMES_PER_LATENT, video.shape[1])))[:, :, -2:]
        features = torch.cat([describe(clips) for clips in pairs])
        return cls(video, metrics.sharpness(video), metrics.palette(video), features)

    def sharpness_over(self, truth: Stretch) -> float | None:
        """Relative sharpness; None where the truth has none."""
        return self.sharpness / truth.sharpness if truth.sharpness else None
