"""Layouts and inputs that tests and benchmarks share."""

import torch
from torch import Tensor

from ..layout import FrameLayout

LAYOUTS = {
    "tiny-world": FrameLayout(24, 40, 4, 2),
    "no-text": FrameLayout(0, 40, 3, 1),
    "text-only": FrameLayout(9, 1, 0, None),
    "one-token": FrameLayout(5, 1, 70, 3),
    "odd": FrameLayout(3, 7, 12, 3),
    "no-window": FrameLayout(3, 7, 11, 0),
    "unlimited": FrameLayout(3, 7, 11, None),
    "no-sink": FrameLayout(3, 7, 11, 2, sink_frames=0),
    "two-sinks": FrameLayout(3, 7, 11, 1, sink_frames=2),
    "all-sink": FrameLayout(2, 7, 3, 1, sink_frames=5),
    "second-step": FrameLayout(3, 7, 1, 3, past_frames=0),
    "short-past": FrameLayout(3, 7, 11, 5, past_frames=2),
    "long-past": FrameLayout(3, 7, 4, 2, past_frames=5),
    "past-unlimited": FrameLayout(3, 7, 3, None, past_frames=4),
    "past-two-sinks": FrameLayout(0, 40, 2, 1, sink_frames=2, past_frames=1),
    "large-frames": FrameLayout(4, 520, 1, 0),
    "whole-clip": FrameLayout(0, 70, 1, 0),
    "frame-and-past": FrameLayout(0, 9, 1, 3, past_frames=2),
}


def make_inputs(
    layout: FrameLayout,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return normal q, k, v, q_sink and outgoing gradients dout, dlse, by name. q and k are
    strided, as slices of one projection are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(length: int) -> Tensor:
        shape = (batch, length, heads, head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    frame_tokens = layout.query_length - layout.text_tokens
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    lse_shape = (batch, heads, layout.query_length)
    return {
        "q": torch.cat([normal(layout.query_length)] * 2, dim=-1)[..., :head_dim],
        "k": torch.cat([normal(layout.key_length)] * 2, dim=2)[:, :, heads:],
        "v": normal(layout.key_length),
        "q_sink": normal(frame_tokens),
        "dout": normal(layout.query_length),
        "dlse": torch.randn(lse_shape, generator=generator, dtype=torch.float64).to(precise),
    }
