"""The precision an op computes in, whatever it is given: float32, or float64 for float64."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(*arguments) -> list:
    """The arguments of an op with every floating-point tensor in the precision it computes in."""
    return [
        x.to(wide(x.dtype)) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x contiguous in this dtype; itself if it is that already."""
    return x.to(dtype).contiguous()
