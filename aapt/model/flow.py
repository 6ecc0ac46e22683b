"""Flow matching: the straight path between data (t = 0) and noise (t = 1), docs/method.md#2, #6 and
#7."""

import torch
from torch import Tensor


def shift(t: Tensor, factor: float) -> Tensor:
    """Moves times in [0, 1] towards the noise: s t / (1 + (s - 1) t) (docs/method.md#6)."""
    return factor * t / (1 + (factor - 1) * t)


def schedule(steps: int, factor: float) -> Tensor:
    """Returns the fixed times t_k = shift(k / steps), k = 0..steps (docs/method.md#7)."""
    return shift(torch.linspace(0, 1, steps + 1), factor)


def per_clip(t: Tensor) -> Tensor:
    """Times (B,), or (B, T) of frames, in a shape that multiplies latents (B, C, T, H, W)."""
    return t.view(len(t), 1, -1, 1, 1)


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t e for one t per clip."""
    t = per_clip(t)
    return (1 - t) * clean + t * noise


def to_clean(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """f(x, t) = x - t v(x, t); at t = 1 the one-step output z - v."""
    return x_t - per_clip(t) * velocity
