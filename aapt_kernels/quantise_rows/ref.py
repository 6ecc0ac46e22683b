"""Specification: for each row and each group of 128 channels, of which the last may be shorter,

scale = max |x| / 448, at least the smallest normal float32        values = e4m3(x (1 / scale))

in float32, rounded to the nearest, ties to even. 448 is the largest number of e4m3.
"""

import torch
import torch.nn.functional as F

GROUP = 128
FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def empty(x):
    """Return memory for the rounded rows of x (..., width): values, and scales (groups, rows)."""
    width = x.shape[-1]
    rows = x.shape[:-1].numel()
    values = torch.empty_like(x, dtype=FORMAT, memory_format=torch.contiguous_format)
    groups = (width + GROUP - 1) // GROUP
    return values, x.new_empty((groups, rows), dtype=torch.float32)


def forward(x):
    rows, width = x.shape
    groups = F.pad(x.float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / LARGEST).clamp(min=SMALLEST_SCALE)
    values = (groups * scales.reciprocal()[..., None]).flatten(1)[:, :width].to(FORMAT)
    return values.contiguous(), scales.t().contiguous()


def rounded(operator):
    """Return an operator whose last result, rows (..., width), is rounded: values in that shape,
    and scales."""

    def run(*arguments):
        results = operator(*arguments)
        *others, x = results if isinstance(results, tuple) else (results,)
        values, scales = forward(x.flatten(0, -2))
        return *others, values.view(x.shape), scales

    return run
