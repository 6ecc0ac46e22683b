"""Precision of an op: float32, float64 for float64 inputs; and the dtype that autocast asks for."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that an op computes in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(*arguments) -> list:
    """Return the arguments of an op, every floating-point tensor in the dtype it computes in."""
    return [
        x.to(wide(x.dtype)) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x contiguous in this dtype: x itself if it is so already."""
    return x.to(dtype).contiguous()


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for this kind of device; the meta device has none."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def follow_autocast(
    *tensors: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor | None, ...]:
    """Return the tensors as scaled_dot_product_attention takes them: under autocast in its dtype
    (or `dtype`), otherwise as they are. float64 and integers are never cast."""
    device = tensors[0].device
    if not autocasts(device):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device.type)
    return tuple(
        x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
        for x in tensors
    )
