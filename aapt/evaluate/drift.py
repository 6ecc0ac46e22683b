"""How a video changes with time: every second of it measured on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import metrics
from .features import describe, feature_distance
from .footage import Footage
from .moments import drift_frames


@dataclass(frozen=True)
class Timeline:
    """A source at each of `seconds`, over all starts: the last latent frame, or the last two video
    frames, of each second.

    Attributes:
        latent_offset, latent_deviation: See `latent_statistics`.
        sharpness: Mean horizontal gradient over that of the truth at the same time.
        palette_error: Of sky and ground against the truth at the same time, in 0 to 1.
        feature_distance: From the truth of all seconds together, see `feature_distance`. That of
            the truth is how far the few videos of one second are from all by chance.
    """

    seconds: list[int]
    latent_offset: list[float]
    latent_deviation: list[float]
    sharpness: list[float | None]
    palette_error: list[float]
    feature_distance: list[float]


def timeline(film: Footage, truth: Footage, seconds: Sequence[int], latents: Tensor) -> Timeline:
    """Measures a source whose `latent_statistics` at the seconds are (starts, len(seconds), 2)."""
    real = torch.cat([describe(truth[drift_frames(second)]) for second in seconds])
    offset, deviation = latents.double().mean(dim=0).T.tolist()
    found = Timeline(list(seconds), offset, deviation, [], [], [])
    for second in seconds:
        clips, true_clips = film[drift_frames(second)], truth[drift_frames(second)]
        contrast = metrics.sharpness(true_clips)
        found.sharpness.append(metrics.sharpness(clips) / contrast if contrast else None)
        palettes = metrics.palette(clips), metrics.palette(true_clips)
        found.palette_error.append(metrics.palette_error(*palettes))
        found.feature_distance.append(feature_distance(describe(clips), real))
    return found
