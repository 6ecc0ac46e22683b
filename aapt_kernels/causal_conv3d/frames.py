"""Frames of a causal convolution: how many it remembers, how they are stored, their pixels."""

import torch
from torch import Tensor

from ..precision import wide


def past_frames(kt: int, repeats: int) -> int:
    """Return the number of frames in a state: `repeats` copies of each cover kt - 1 frames."""
    return -(-(kt - 1) // repeats)


def frames_to_skip(kt: int, repeats: int, starts: bool) -> int:
    """Return how many copies at the front of [state | x], repeated, no output frame reads.

    At a stream's start the output frames of all but the last copy of frame 0 are skipped as well.
    """
    return past_frames(kt, repeats) * repeats - (kt - 1) + (repeats - 1 if starts else 0)


def out_size(x: Tensor, stride, upsample, starts: bool) -> tuple[int, ...]:
    """Return time, height and width of the output; `starts`: without a state."""
    time, space = upsample
    frames, height, width = x.shape[2:]
    repeated = (frames * time - (time - 1 if starts else 0), height * space, width * space)
    return tuple((size - 1) // step + 1 for size, step in zip(repeated, stride, strict=True))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of outputs: channels last if x has them last, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    if channels_last and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format


def to_bytes(video: Tensor) -> Tensor:
    """Return video in [-1, 1] as uint8, as a convolution with `pixels` makes it; NaN becomes 0."""
    levels = (video.to(wide(video.dtype)) * 127.5 + 127.5).round().clamp(0, 255)
    return levels.nan_to_num(0).to(torch.uint8)
