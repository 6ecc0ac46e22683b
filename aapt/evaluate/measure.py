"""Measure videos against the truth: in windows, and second by second."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..clock import FRAMES_PER_LATENT
from . import metrics
from .features import describe, feature_distance
from .scenes import Scenes
from .windows import Window


class UserNetwork(Protocol):
    """A measure that a network of the user's gives.

    Attributes:
        of_truth: The truth itself is measured too.
    """

    of_truth: bool

    def measure(
        self, video: Tensor, truth: Tensor, scenes: Scenes, window: Window
    ) -> Mapping[str, float | None]:
        """Return fields of a `Measurement`; arguments as of `measure`, with the truth's frames."""


@dataclass(frozen=True)
class Timeline:
    """Measurements of one source of videos at each of `seconds`, over all starts.

    At each second the last latent frame and the last two video frames are measured.

    Attributes:
        latent_offset, latent_deviation: See `latent_statistics`.
        sharpness: Mean horizontal gradient, divided by the truth's at the same time.
        edge_sharpness: `metrics.edge_energy`, divided by the truth's at the same time.
        seam: See `metrics.seam`; 1 without visible cells.
        palette_error: Error of the colours of sky and ground against the truth at the same time, 0
            to 1; None after the end of the truth.
        feature_distance: From the truth of all seconds together, see `feature_distance`. For the
            truth itself it is the distance by chance of one second's few videos from all.
        drift: Slope of each of the others over the seconds, per minute, see `metrics.slope`.
    """

    seconds: list[int]
    latent_offset: list[float]
    latent_deviation: list[float]
    sharpness: list[float | None]
    edge_sharpness: list[float | None]
    seam: list[float | None]
    palette_error: list[float | None]
    feature_distance: list[float]
    drift: dict[str, float | None]


def timeline(
    video: Sequence[MeasuredFrames],
    truth: Sequence[MeasuredFrames],
    seconds: Sequence[int],
    latents: Tensor,
) -> Timeline:
    """Measure a source of videos second by second.

    video: one per second. truth: one per second of the truth, at least one; later seconds are
    compared with the last. latents: `latent_statistics` (starts, len(seconds), 2) at the seconds.
    """
    real = torch.cat([frames.features for frames in truth])
    offset, deviation = latents.double().mean(dim=0).T.tolist()
    after = len(video) - len(truth)
    nearest = [*truth, *[truth[-1]] * after]
    errors = [metrics.palette_error(a.palette, b.palette) for a, b in zip(video, truth)]
    lines = {
        "latent_offset": offset,
        "latent_deviation": deviation,
        "sharpness": [
            _ratio(a.sharpness, b.sharpness) for a, b in zip(video, nearest, strict=True)
        ],
        "edge_sharpness": [_ratio(a.edges, b.edges) for a, b in zip(video, nearest, strict=True)],
        "seam": [one.seam for one in video],
        "palette_error": errors + [None] * after,
        "feature_distance": [feature_distance(one.features, real) for one in video],
    }
    drift = {name: metrics.slope(seconds, line) for name, line in lines.items()}
    return Timeline(list(seconds), **lines, drift=drift)


def measure(
    video: Tensor,
    truth: MeasuredFrames,
    latents: Tensor | None,
    scenes: Scenes,
    window: Window,
    networks: Sequence[UserNetwork] = (),
    cell: int | None = None,
) -> Measurement:
    """Measure one window of a source of videos, uint8 (starts, 1 + 4 T, H, W, 3).

    The first video frame only serves to read the motion of the second; the truth comes without it.
    latents: `latent_statistics` (starts, T, 2) of the window; None if the source has no latents.
    cell: Width in pixels of the source's latent pixels; None for that of the truth.
    """
    found = MeasuredFrames.of(video[:, 1:], cell or truth.cell)
    given: dict[str, float | None] = {}
    for network in networks:
        given |= network.measure(video, truth.video, scenes, window)
    paired = {}
    if window.last <= scenes.steps:
        psnr = metrics.psnr(found.video, truth.video)
        paired["psnr"] = psnr if math.isfinite(psnr) else None
        paired["palette_error"] = metrics.palette_error(found.palette, truth.palette)
    return Measurement(
        latent_offset=None if latents is None else latents[..., 0].mean().item(),
        latent_deviation=None if latents is None else latents[..., 1].mean().item(),
        sharpness=_ratio(found.sharpness, truth.sharpness),
        edge_sharpness=_ratio(found.edges, truth.edges),
        seam=found.seam,
        flicker=metrics.flicker(found.video, FRAMES_PER_LATENT),
        feature_distance=feature_distance(found.features, truth.features),
        **paired,
        **given,
        **scenes.control_metrics(video, found.palette, window),
    )


@dataclass(frozen=True)
class Measurement:
    """Measurements of one source of videos in one window, over all starts.

    A field that does not apply is None. If the truth ends before the window does, its last frames
    are compared with, and the metrics of paired frames are None.

    Attributes:
        latent_offset, latent_deviation: Means of `latent_statistics`; the deviation of real latents
            is about 1.
        sharpness: Mean horizontal gradient, divided by the truth's.
        edge_sharpness: `metrics.edge_energy`, divided by the truth's.
        seam: See `metrics.seam`; 1 without visible cells.
        flicker: See `metrics.flicker`, over steps of one latent frame; 1 if steps do not show.
        palette_error: Error of the colours of sky and ground against the truth, 0 to 1.
        theme_kept: Share of starts whose palette is nearest to their own theme.
        feature_distance: From the truth of the same window, see `features.feature_distance`.
        psnr: Against the truth, in dB. After the first second it shows chance and theme only.
        yaw_correlation, forward_correlation: Between commanded and realised motion.
        yaw_gain, forward_gain: Realised divided by commanded motion.
        yaw_response, forward_response: See `metrics.response_steps`, in video frames.
        akd_to_pose: Mean distance of detected from commanded keypoints, in pixels.
        look_kept: Share of starts whose figure has the colours of its own look.
        fid, fvd: From the truth of the same window, if a network was given.
        akd_to_truth, missing_keypoints: See `pose_errors.keypoint_errors`, if a network was given.
        rotation_error, translation_error, cameras_found: See `pose_errors.camera_errors`, if a
            network was given.
    """

    latent_offset: float | None = None
    latent_deviation: float | None = None
    sharpness: float | None = None
    edge_sharpness: float | None = None
    seam: float | None = None
    flicker: float | None = None
    palette_error: float | None = None
    theme_kept: float | None = None
    feature_distance: float | None = None
    psnr: float | None = None
    yaw_correlation: float | None = None
    forward_correlation: float | None = None
    yaw_gain: float | None = None
    forward_gain: float | None = None
    yaw_response: int | None = None
    forward_response: int | None = None
    akd_to_pose: float | None = None
    look_kept: float | None = None
    fid: float | None = None
    fvd: float | None = None
    akd_to_truth: float | None = None
    missing_keypoints: float | None = None
    rotation_error: float | None = None
    translation_error: float | None = None
    cameras_found: float | None = None


@dataclass(frozen=True)
class MeasuredFrames:
    """A run of consecutive video frames of several videos, measured.

    Attributes:
        video: uint8 (starts, F, H, W, 3).
        cell: Width in pixels of a latent pixel.
        sharpness, seam, palette: See `metrics`.
        edges: See `metrics.edge_energy`.
        features: (starts * latent frames, D), of the last two video frames of each latent frame.
    """

    video: Tensor
    cell: int
    sharpness: float
    edges: float
    seam: float | None
    palette: Tensor
    features: Tensor

    @classmethod
    def of(cls, video: Tensor, cell: int) -> MeasuredFrames:
        """Measure the video frames of whole latent frames, or the last two of one."""
        pairs = video.unflatten(1, (-1, min(FRAMES_PER_LATENT, video.shape[1])))[:, :, -2:]
        return cls(
            video,
            cell,
            sharpness=metrics.sharpness(video),
            edges=metrics.edge_energy(video),
            seam=metrics.seam(video, cell),
            palette=metrics.palette(video),
            features=torch.cat([describe(clips) for clips in pairs]),
        )


def _ratio(value: float, truth: float) -> float | None:
    """Divide a measure by the truth's; None if the truth has none."""
    return value / truth if truth else None
