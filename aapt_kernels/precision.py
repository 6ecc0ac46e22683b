"""Precision of an op: float32, float64 for float64 inputs; and the dtype that autocast asks for."""

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)  # dtypes of arguments that an op computes in float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that an op computes in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(*arguments) -> list:
    """Return the arguments of an op, every floating-point tensor in the dtype it computes in.

    Most are so already, and are not converted, because `to` takes a microsecond to do nothing.
    """
    return [
        x.to(torch.float32) if isinstance(x, Tensor) and x.dtype in NARROW else x for x in arguments
    ]


def quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x (B, L, H, D) as a cache of `dtype` stores it: x times the reciprocal of scale (H,),
    rounded and limited to the largest finite value, because a conversion to float8 turns what is
    larger into NaN."""
    if scale is None:
        return x
    limit = torch.finfo(dtype).max
    inverse = scale[:, None].to(wide(x.dtype)).reciprocal()
    return (x.to(inverse.dtype) * inverse).clamp(-limit, limit).to(dtype)


def dequantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the values in `dtype`, contiguous, that `quantise` has stored as x (B, L, H, D)."""
    if scale is None:
        return x
    return dense(x.to(wide(dtype)) * scale[:, None], dtype)


def hadamard(x: Tensor) -> Tensor:
    """Return x (..., D) times the Hadamard matrix of order D, a power of two, over sqrt(D). The
    matrix is symmetric and orthogonal: its own inverse, and no product of two rows changes."""
    size = x.shape[-1]
    y = x.to(wide(x.dtype))
    step = 1
    while step < size:
        a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    return (y * size**-0.5).to(x.dtype)


def as_bits(x: Tensor) -> Tensor:
    """Return x, float8 as a view of its bytes: PyTorch has no indexing for float8."""
    return x.view(torch.uint8) if x.itemsize == 1 else x


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x contiguous in this dtype: x itself if it is so already."""
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for this kind of device; the meta device has none."""
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


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
