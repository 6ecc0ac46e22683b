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


def forward(x):
    rows, width = x.shape
    groups = F.pad(x.float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / LARGEST).clamp(min=SMALLEST_SCALE)
    values = (groups * scales.reciprocal()[..., None]).flatten(1)[:, :width].to(FORMAT)
    return values.contiguous(), scales.t().contiguous()
