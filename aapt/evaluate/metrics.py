"""Metrics of videos: pure functions of uint8 (starts, F, H, W, 3).

Colours and errors are shares of the full range, 0 to 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SKY_ROWS = 8  # the sky band is the top 1/8 of the image
GROUND_ROWS = 4  # the ground band is the bottom 1/4
CHUNK = 64  # video frames whose gradients are in memory at once
EDGE_SHARE = 20  # the edge band is the steepest 1/20 of a video frame's pixels


def sharpness(video: Tensor) -> float:
    """Compute the mean absolute difference of horizontal neighbours."""
    total = sum(clip.short().diff(dim=-2).abs().sum() for clip in video)
    return total.item() / 255 / video[..., 1:, :].numel()


def seam(video: Tensor, cell: int) -> float | None:
    """Compute the mean absolute difference of horizontal neighbours across borders of cells, over
    that of neighbours inside a cell.

    cell: width in pixels of a latent pixel. 1 without visible cells. None for a video narrower than
    two cells or flat inside its cells, and for cells of one pixel.
    """
    totals = sum(clip.short().diff(dim=-2).abs().sum(dim=(0, 1, 3)) for clip in video)
    across = torch.arange(1, len(totals) + 1) % cell == 0
    if not across.any() or across.all() or not totals[~across].any():
        return None
    return (totals[across].double().mean() / totals[~across].double().mean()).item()


def flicker(video: Tensor, step: int) -> float | None:
    """Compute the mean absolute change between consecutive video frames from one step to the next,
    over the changes inside a step.

    step: video frames of a step; the video begins with a step's first. 1 if steps do not show. None
    for a video of one step, of steps of one video frame, or without a change inside its steps.
    """
    sums = [clip.short().diff(dim=0).abs().sum(dim=(1, 2, 3)) for clip in video]
    changes = torch.stack(sums).double()
    across = torch.arange(1, changes.shape[1] + 1) % step == 0
    if not across.any() or across.all() or not changes[:, ~across].any():
        return None
    return (changes[:, across].mean() / changes[:, ~across].mean()).item()


def edge_energy(video: Tensor) -> float:
    """Compute the gradient energy in the edge band of a video, its mean over video frames.

    The energy of a pixel is the sum of its squared differences to the right neighbour and to the
    lower one over the colours, as shares of the full range. The edge band of a frame is the
    twentieth of its pixels with the most energy, at least one: outlines of objects, whatever their
    place. Half the energy is a step spread over twice the pixels.
    """
    frames = video.flatten(0, 1)
    count = max(1, (frames.shape[1] - 1) * (frames.shape[2] - 1) // EDGE_SHARE)
    total = 0.0
    for frame in frames.split(CHUNK):
        right = frame.int().diff(dim=2)[:, :-1].square().sum(dim=-1)
        below = frame.int().diff(dim=1)[:, :, :-1].square().sum(dim=-1)
        total += (right + below).flatten(1).topk(count, sorted=False).values.sum().item()
    return total / 255**2 / (count * len(frames))


def psnr(video: Tensor, truth: Tensor) -> float:
    """Compute the peak signal-to-noise ratio over all pixels, in dB; infinite for equal videos."""
    _same_shape(video, truth)
    error = sum(
        (a.int() - b.int()).square().sum().item() for a, b in zip(video, truth, strict=True)
    )
    return math.inf if error == 0 else 10 * math.log10(255**2 * video.numel() / error)


def palette(video: Tensor) -> Tensor:
    """Compute the mean colours (starts, 6) of the sky band and of the ground band."""
    height = video.shape[2]
    bands = video[:, :, : max(1, height // SKY_ROWS)], video[:, :, -max(1, height // GROUND_ROWS) :]
    return torch.cat([band.double().mean(dim=(1, 2, 3)) / 255 for band in bands], dim=1).float()


def palette_error(palettes: Tensor, truth: Tensor) -> float:
    """Compute the mean absolute difference of palettes (starts, 6)."""
    _same_shape(palettes, truth)
    return (palettes - truth).abs().mean().item()


def palette_distance(palettes: Tensor, themes: Tensor, *, same_theme: bool) -> float | None:
    """Compute the mean `palette_error` between different starts of one theme, or of two themes.

    This is the error to expect of another place of the theme, or of another theme. palettes:
    (starts, 6). themes: (starts,). None if there is no such pair.
    """
    errors = (palettes[:, None] - palettes[None]).abs().mean(dim=-1)
    chosen = (themes[:, None] == themes[None]) == same_theme
    chosen.fill_diagonal_(False)
    return errors[chosen].mean().item() if chosen.any() else None


def theme_kept(palettes: Tensor, references: Tensor, themes: Tensor) -> float:
    """Compute the share of starts whose palette is nearest to their own theme's reference.

    palettes: (starts, 6). references: (themes, 6). themes: (starts,).
    """
    errors = (palettes[:, None] - references[None]).abs().mean(dim=-1)
    return (errors.argmin(dim=1) == themes).double().mean().item()


def correlation(realised: Tensor, commanded: Tensor) -> float | None:
    """Compute Pearson's correlation over all elements; None if one of the two never varies."""
    _same_shape(realised, commanded)
    a, b = (x.double().flatten() - x.double().mean() for x in (realised, commanded))
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else None


def response_steps(realised: Tensor, commanded: Tensor, most: int = 6) -> int | None:
    """Compute the number of steps, 0 to `most`, after which realised motion follows the command
    best: the lag with the greatest correlation.

    Both are (starts, T). A motion in the step of its command has lag 0. None if one of the two
    never varies, or T is not more than `most` + 1.
    """
    _same_shape(realised, commanded)
    steps = realised.shape[1]
    if steps < most + 2:
        return None
    # All lags are compared over the same commands, or a short lag would see more of them.
    heard = commanded[:, : steps - most]
    found = [correlation(realised[:, lag : steps - most + lag], heard) for lag in range(most + 1)]
    known = [value for value in found if value is not None]
    return found.index(max(known)) if known else None


def slope(seconds: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Compute the least-squares slope of values over seconds, per minute; None for fewer than two
    known values."""
    known = [(s, v) for s, v in zip(seconds, values, strict=True) if v is not None]
    if len(known) < 2:
        return None
    at, found = torch.tensor(known, dtype=torch.float64).T
    return 60 * gain(found, at)


def gain(realised: Tensor, commanded: Tensor) -> float | None:
    """Compute the least-squares slope of realised over commanded motion; 1 is exact.

    None if the commanded motion never varies.
    """
    _same_shape(realised, commanded)
    a, b = (x.double().flatten() - x.double().mean() for x in (realised, commanded))
    power = b.square().sum()
    return (a @ b / power).item() if power > 0 else None


def _same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"expected two tensors of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
