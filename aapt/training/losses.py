"""The losses of all stages, as pure functions (docs/method.md#6, #7, #8, #9 and #12)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GanLoss = Literal["relativistic", "non-saturating"]


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each frame, with c = 0.00054 sqrt(C H W) (docs/method.md#12).

    a, b: (B, C, T, H, W). Returns (B, T).
    """
    squared = (a - b).square().sum(dim=(1, 3, 4))
    dim = a.shape[1] * a.shape[3] * a.shape[4]
    c = 0.00054 * dim**0.5
    return (squared + c**2).sqrt() - c


def frame_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each frame. a, b: (B, C, T, H, W). Returns (B, T)."""
    return (a - b).square().mean(dim=(1, 3, 4))


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss = "relativistic") -> Tensor:
    """Relativistic loss softplus(D(fake) - D(real)), or non-saturating loss softplus(D(fake)) +
    softplus(-D(real)), mean over all logits."""
    if kind == "non-saturating":
        return F.softplus(fake).mean() + F.softplus(-real).mean()
    return F.softplus(fake - real).mean()


def generator_loss(real: Tensor, fake: Tensor, kind: GanLoss = "relativistic") -> Tensor:
    """Relativistic loss softplus(D(real) - D(fake)), or non-saturating loss softplus(-D(fake)),
    mean over all logits."""
    return F.softplus(-fake if kind == "non-saturating" else real - fake).mean()


def approximate_penalty(logits: Tensor, perturbed: Tensor) -> Tensor:
    """Mean of (D(x) - D(x + sigma n))^2: aR1 on real frames, aR2 on fake, without their weight."""
    return (logits - perturbed).square().mean()


def distribution_matching_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Return the gradient of distribution matching with respect to samples x (B, C, T, H, W).

    fake, real: what the critic of samples and the teacher make of x when they denoise it, of its
    shape. Their difference is divided by the mean |x - real| of a clip, so that times weigh alike
    (arXiv 2311.18828, equations 7 and 8).
    """
    scale = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return (fake - real) / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def channel_weighted_error(a: Tensor, b: Tensor, deviation: Tensor) -> Tensor:
    """Mean squared error of latents (B, C, T, H, W), weighted by channel.

    The weight of a channel is its `deviation` (C,) relative to the mean deviation.
    """
    weight = (deviation / deviation.mean())[:, None, None, None]
    return ((a - b).square() * weight).mean()


def frame_mean_error(a: Tensor, b: Tensor, deviation: Tensor) -> Tensor:
    """`channel_weighted_error` between the channel means of frames.

    The means hold the colours of a frame without their places, so the error does not blur.
    """
    over_frame = {"dim": (3, 4), "keepdim": True}
    return channel_weighted_error(a.mean(**over_frame), b.mean(**over_frame), deviation)


def row_mean_error(a: Tensor, b: Tensor, deviation: Tensor) -> Tensor:
    """`channel_weighted_error` between the channel means of rows.

    The means also hold the heights of colours: a dark sky does not compensate a bright ground.
    """
    over_row = {"dim": 4, "keepdim": True}
    return channel_weighted_error(a.mean(**over_row), b.mean(**over_row), deviation)


def sharpness_loss(error: Tensor) -> Tensor:
    """Mean absolute spatial difference of an error image (..., H, W); 0 if all edges match."""
    across = torch.diff(error, dim=-1).abs().mean()
    down = torch.diff(error, dim=-2).abs().mean()
    return across + down


def reconstruction_loss(error: Tensor, squares: float, edges: float) -> Tensor:
    """Absolute error, squared error and edge error of an error video (B, 3, F, H, W)."""
    return error.abs().mean() + squares * error.square().mean() + edges * sharpness_loss(error)


def sharpened(video: Tensor, amount: float) -> Tensor:
    """Adds `amount` of the difference to its blurred images to a video (B, 3, F, H, W).

    The blur is binomial, of 3 x 3 pixels. A decoder that learns by squared errors shows the mean of
    all videos that fit its latents, which is softer than each; with sharpened targets it shows the
    sharpened mean.
    """
    images = video.transpose(1, 2).flatten(0, 1)
    row = video.new_tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), "replicate"), kernel, groups=3)
    return video + amount * (video - blurred.unflatten(0, (len(video), -1)).transpose(1, 2))


def seam_loss(error: Tensor, cell: int) -> Tensor:
    """Mean absolute difference of an error video (B, 3, F, H, W) across borders of cells.

    cell: height and width of a cell in pixels; the video has several cells each way. The loss is 0
    if the video steps at borders as its target does.
    """
    across = torch.diff(error, dim=-1)[..., cell - 1 :: cell].abs().mean()
    down = torch.diff(error, dim=-2)[..., cell - 1 :: cell, :].abs().mean()
    return across + down


def flicker_loss(error: Tensor) -> Tensor:
    """Mean absolute change of an error video (B, 3, F, H, W) from each video frame to the next.

    It is 0 if a video moves as its target does, whatever its images look like.
    """
    return torch.diff(error, dim=2).abs().mean()


def reconstruction_psnr(video: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of float videos in [-1, 1]."""
    return -10 * torch.log10((video - truth).square().mean() / 4).item()
