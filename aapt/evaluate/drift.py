"""How a video changes with time: every second of it measured on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import metrics
from .features import feature_distance
from .stretch import Stretch


@dataclass(frozen=True)
class Timeline:
    """A source at each of `seconds`, over all starts: the last latent frame, or the last two video
    frames, of each second.

    Attributes:
        latent_offset, latent_deviation: See `latent_statistics`.
        sharpness: Mean horizontal gradient over that of the truth at the same time.
        palette_error: Of sky and ground against the truth at the same time, in 0 to 1; None when
            that is over.
        feature_distance: From the truth of all seconds together, see `feature_distance`. That of
            the truth is how far the few videos of one second are from all by chance.
    """

    seconds: list[int]
    latent_offset: list[float]
    latent_deviation: list[float]
    sharpness: list[float | None]
    palette_error: list[float | None]
    feature_distance: list[float]


def timeline(
    film: Sequence[Stretch], truth: Sequence[Stretch], seconds: Sequence[int], latents: Tensor
) -> Timeline:
    """Measures a source, a stretch for each second, whose `latent_statistics` at the seconds are
    (starts, len(seconds), 2). truth: a stretch for each second that it lasts, one or more; the last
    stands for those after it."""
    real = torch.cat([clips.features for clips in truth])
    offset, deviation = latents.double().mean(dim=0).T.tolist()
    after = len(film) - len(truth)
    nearest = [*truth, *[truth[-1]] * after]
    errors = [metrics.palette_error(a.palette, b.palette) for a, b in zip(film, truth)]
    return Timeline(
        seconds=list(seconds),
        latent_offset=offset,
        latent_deviation=deviation,
        sharpness=[clips.sharpness_over(true) for clips, true in zip(film, nearest, strict=True)],
        palette_error=errors + [None] * after,
        feature_distance=[feature_distance(clips.features, real) for clips in film],
    )
