"""Distance between generated and real images, in a feature space that needs no weights.

Each feature has a name: how much luma changes from a pixel to its neighbour to the right, below, a
frame later, or further away; how much colour changes; and the mean colours. All are taken in the
top, middle and bottom of the image. Changes to neighbours are taken at three scales, the others at
the coarsest.
Blur and frozen images lower the changes; noise and seams raise them. Repeated patches lower changes
between distant pixels, and a washed-out or foreign palette moves the colours. The space is the same
for every checkpoint, autoencoder and image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vae.pixels import to_video

BANDS = 3
SCALES = 3  # each half as fine as the one before
LAGS = 8, 4, 2  # distances between compared pixels: the image's width over these
FAINT = 0.01  # of the range of luma: the logarithm hardly sees smaller changes
LEAST_DEVIATION = 0.02  # of a real feature: one that never varies would outweigh the others


@torch.no_grad()
def describe(clips: Tensor) -> Tensor:
    """Compute features (N, 54) of pairs of successive video frames, uint8 (N, 2, H, W, 3)."""
    red, green, blue = to_video(clips).unbind(dim=1)
    # Luma and two opponent channels, which only colour moves.
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
    """Average x (N, frames, H, W) over its top, middle and bottom: (N, 3)."""
    return torch.stack([part.mean(dim=(1, 2, 3)) for part in x.tensor_split(BANDS, dim=2)], dim=1)


def feature_distance(features: Tensor, real: Tensor) -> float:
    """Compute the Frechet distance of features (N, D) from real ones (M, D), in real deviations.

    Features count as independent Gaussians; returned is the root mean square over features,
    sqrt(mean_d(((m_d - m'_d)^2 + (s_d - s'_d)^2) / s'_d^2)). The full distance also compares
    covariances, which the few independent videos of one moment cannot give.
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
