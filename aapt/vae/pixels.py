"""Conversions between uint8 pixels and video in [-1, 1]."""

import numpy as np
from torch import Tensor

from aapt_kernels.causal_conv3d.frames import to_bytes


def to_video(pixels: Tensor) -> Tensor:
    """Turns uint8 (B, F, H, W, 3) into video (B, 3, F, H, W) in [-1, 1]."""
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_array(pixels: Tensor) -> np.ndarray:
    """Turns uint8 (1, 3, F, H, W) into an array (F, H, W, 3)."""
    return pixels[0].permute(1, 2, 3, 0).cpu().numpy()


def to_pixels(video: Tensor) -> Tensor:
    """Turns video (B, 3, F, H, W) in [-1, 1] into uint8 (B, F, H, W, 3); NaN becomes black."""
    return to_bytes(video).permute(0, 2, 3, 4, 1).cpu()
