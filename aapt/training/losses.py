"""The losses of all stages, as pure functions (SPEC 6-9, 12)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c over each latent frame, c = 0.00054 sqrt(dim) (SPEC 12).

    a, b: (B, C, T, H, W). Returns (B, T).
    """
    squared = (a - b).square().sum(dim=(1, 3, 4))
    dim = a.shape[1] * a.shape[3] * a.shape[4]
    c = 0.00054 * dim**0.5
    return (squared + c**2).sqrt() - c


def frame_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each latent frame. a, b: (B, C, T, H, W). Returns (B, T)."""
    return (a - b).square().mean(dim=(1, 3, 4))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Relativistic pairing: softplus(delta), delta = D(fake) - D(real), mean over frames."""
    return F.softplus(fake - real).mean()


def generator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-delta), delta = D(fake) - D(real), mean over judged frames and batch."""
    return F.softplus(real - fake).mean()


def approximate_penalty(logits: Tensor, perturbed: Tensor) -> Tensor:
    """aR1 on real frames, aR2 on fake: |D(x) - D(x + sigma n)|^2, to be weighted by lambda."""
    return (logits - perturbed).square().mean()


def channel_weighted_error(a: Tensor, b: Tensor, deviation: Tensor) -> Tensor:
    """Mean squared error of latents (B, C, T, H, W), each channel weighted by its `deviation`
    (C,) relative to the mean."""
    weight = (deviation / deviation.mean())[:, None, None, None]
    return ((a - b).square() * weight).mean()


def palette_error(a: Tensor, b: Tensor, deviation: Tensor) -> Tensor:
    """The same between the means of every channel over a frame, which say what colours it has and
    nothing about where: it does not blur."""
    over_frame = {"dim": (3, 4), "keepdim": True}
    return channel_weighted_error(a.mean(**over_frame), b.mean(**over_frame), deviation)


def row_error(a: Tensor, b: Tensor, deviation: Tensor) -> Tensor:
    """The same between the means over every row, which also say what lies above what: a sky that is
    too dark does not make up for the ground."""
    over_row = {"dim": 4, "keepdim": True}
    return channel_weighted_error(a.mean(**over_row), b.mean(**over_row), deviation)


def sharpness_loss(error: Tensor) -> Tensor:
    """Mean absolute spatial difference of an error image (..., H, W): edges must match."""
    across = torch.diff(error, dim=-1).abs().mean()
    down = torch.diff(error, dim=-2).abs().mean()
    return across + down


def reconstruction_loss(error: Tensor, squares: float, edges: float) -> Tensor:
    """Absolute error, squared error and edges of an error video (B, 3, F, H, W)."""
    return error.abs().mean() + squares * error.square().mean() + edges * sharpness_loss(error)


def flicker_loss(error: Tensor) -> Tensor:
    """Mean absolute change of an error video (B, 3, F, H, W) from each frame to the next: nothing
    where a video moves as it should, whatever it looks like."""
    return torch.diff(error, dim=2).abs().mean()


def psnr(video: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1]."""
    return -10 * torch.log10((video - truth).square().mean() / 4).item()
