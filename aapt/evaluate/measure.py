"""How a video changes with time: every second of it measured on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clock import FRAMES_PER_LATENT
from . import metrics
from .features import describe, feature_distance
from .pretrained import PretrainedDistance
from .scenes import Scenes
from .windows import Window


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


def measure(
    video: Tensor,
    truth: Stretch,
    latents: Tensor | None,
    scenes: Scenes,
    window: Window,
    networks: Sequence[PretrainedDistance] = (),
) -> Measurement:
    """One window of a video source, uint8 (starts, 1 + 4 T, H, W, 3), against the truth without the
    first frame, which is only there for the motion of the second.

    latents: `latent_statistics` of its latent frames (starts, T, 2), None where it has none.
    """
    clips = Stretch.of(video[:, 1:])
    frames = clips.video.shape[1]
    distances = {n.kind: n(clips.video, truth.video) for n in networks if frames >= n.frames}
    paired = {}
    if window.last <= scenes.steps:
        psnr = metrics.psnr(clips.video, truth.video)
        paired["psnr"] = psnr if math.isfinite(psnr) else None
        paired["palette_error"] = metrics.palette_error(clips.palette, truth.palette)
    return Measurement(
        latent_offset=None if latents is None else latents[..., 0].mean().item(),
        latent_deviation=None if latents is None else latents[..., 1].mean().item(),
        sharpness=clips.sharpness_over(truth),
        feature_distance=feature_distance(clips.features, truth.features),
        **paired,
        **distances,
        **scenes.obedience(video, clips.palette, window),
    )


@dataclass(frozen=True)
class Measurement:
    """One video source in one time window, over all starts; None where it does not apply.

    Where the truth ends before the window does, its last frames stand for it, and what compares
    frame with frame is left out.

    Attributes:
        latent_offset, latent_deviation: Means of `latent_statistics`; the deviation of real latents
            is about 1.
        sharpness: Mean horizontal gradient over that of the truth.
        palette_error: Of sky and ground against the truth, over the window, in 0 to 1.
        theme_kept: Share of starts whose palette is nearest to their own theme.
        feature_distance: From the truth of the same window, see `features.feature_distance`.
        psnr: Against the truth, in dB. Past the first second only chance and theme are in it.
        yaw_correlation, forward_correlation: Of commanded and realised motion.
        yaw_gain, forward_gain: Realised over commanded motion.
        fid, fvd: From the truth of the same window, where a network was given.
    """

    latent_offset: float | None = None
    latent_deviation: float | None = None
    sharpness: float | None = None
    palette_error: float | None = None
    theme_kept: float | None = None
    feature_distance: float | None = None
    psnr: float | None = None
    yaw_correlation: float | None = None
    forward_correlation: float | None = None
    yaw_gain: float | None = None
    forward_gain: float | None = None
    fid: float | None = None
    fvd: float | None = None


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
