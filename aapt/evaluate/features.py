"""How far generated pictures are from real ones, in a feature space that needs no weights.

A feature is something one can name: how much luma changes from a pixel to its neighbour across,
below, a moment later, or further away, how much colour changes, and the mean colours, each in the
top, middle and bottom of the picture and at three scales. Blur and frozen pictures lower the
changes, noise and seams raise them, repeated patches lower those between distant pixels, and a
washed-out or foreign palette moves the colours. The space is the same for every checkpoint,
autoencoder and picture size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vae.pixels import to_video

BANDS = 3
SCALES = 3  # each half as fine as the one before
LAGS = 8, 4, 2  # parts of the picture's width
FAINT = 0.01  # of the range of luma: changes below it are equal to a logarithm
LEAST_DEVIATION = 0.02  # of a real feature: one that never varies must not outweigh the others


@torch.no_grad()
def describe(clips: Tensor) -> Tensor:
    """Features (N, 54) of clips of two successive frames, uint8 (N, 2, H, W, 3)."""
    red, green, blue = to_video(clips).unbind(dim=1)
    # Luma and two opponents, which colour alone moves.
    x = torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], dim=1) / 2
    changes, colours = [], []
    for scale in range(SCALES):
        if scale:
            x = F.avg_pool3d(x, (1, 2, 2))
        luma, opponents = x[:, 0], x[:, 1:]
        changes.append(bands(luma.diff(dim=-1).abs()))
        changes.append(bands(luma.diff(dim=-2).abs()))
        changes.append(bands(luma.diff(dim=-3).abs()))
        changes.append(bands(opponents.diff(dim=-1).abs().sum(dim=1)))
    for part in LAGS:
        lag = max(1, luma.shape[-1] // part)
        changes.append(bands((luma[..., lag:] - luma[..., :-lag]).abs()))
    for channel in x.unbind(dim=1):
        colours.append(bands(channel))
    return torch.cat([(torch.cat(changes, dim=1) + FAINT).log(), *colours], dim=1)


def bands(x: Tensor) -> Tensor:
    """Means (N, 3) over the top, middle and bottom of x (N, frames, H, W)."""
    return torch.stack([part.mean(dim=(1, 2, 3)) for part in x.tensor_split(BANDS, dim=2)], dim=1)


def feature_distance(features: Tensor, real: Tensor) -> float:
    """Frechet distance of two sets of features (N, D) and (M, D), in deviations of real ones.

    The features count as independent Gaussians, the root mean square over them is returned:
    sqrt(mean_d((m_d - m'_d)^2 + (s_d - s'_d)^2) / s'_d^2). Covariances, which the full distance
    also compares, cannot be had from the few independent videos of one moment.
    """
    if features.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"features: expected (N, {real.shape[1]}), as the real ones, "
            f"got {tuple(features.shape)}"
        )
    (mean, deviation), (real_mean, real_deviation) = (
        (x.double().mean(dim=0), x.double().std(dim=0, correction=0)) for x in (features, real)
    )
    error = (mean - real_mean).square() + (deviation - real_deviation).square()
    return (error / real_deviation.clamp(min=LEAST_DEVIATION).square()).mean().sqrt().item()
