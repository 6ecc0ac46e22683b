"""Tiles of rows in Triton kernels: loads and products, for both attentions and the convolution."""

import triton
import triton.language as tl

from .backend import interpreted

LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def load_rows(x, row, stride, active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of one head: zero beyond head_dim, and where not active (None: all are)."""
    column = tl.arange(0, WIDTH)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride + column
    if HEAD_DIM < WIDTH:
        mask = column < HEAD_DIM
        if active is not None:
            mask = mask & active[:, None]
        tile = tl.load(at, mask=mask, other=0)
    elif active is not None:
        tile = tl.load(at, mask=active[:, None], other=0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def dot(a, b, start=None):
    """start + a b, float32 inputs as three TF32 products. The interpreter takes the bits of BF16
    for integers, so there it gets the same values in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, start, input_precision="tf32x3")
