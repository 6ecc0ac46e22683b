"""Tiles of rows in Triton kernels: loads and products, for both attentions and the convolution; and
rounding to float8."""

import triton
import triton.language as tl

from .backend import interpreted

MOST_HEADS = 65535  # batch entries times heads: programs along the second and third axis of a grid
FLOAT8_CAPABILITY = (8, 9)  # the first that converts to float8_e4m3fn, and multiplies it
LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def load_rows(x, row, stride, active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load (rows, WIDTH) of one head: zero beyond head_dim, and in rows that are not active (None:
    all are)."""
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
    """Return start + a b, float32 inputs as three TF32 products.

    The interpreter takes the bits of BF16 for integers, so there it gets the values in float32.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, start, input_precision="tf32x3")


@triton.jit
def zero_or_nan(x, row, stride, active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return (rows,) 0, or NaN for a row of one head that holds NaN or infinity.

    A tile is loaded without such rows, because a weight of zero does not hide them. Columns come in
    parts, which take few registers.
    """
    PART: tl.constexpr = 16
    at = x + row.to(tl.int64)[:, None] * stride
    result = tl.zeros(row.shape, tl.float32)
    for part in range(WIDTH // PART):
        column = part * PART + tl.arange(0, PART)[None, :]
        tile = tl.load(at + column, mask=active[:, None] & (column < HEAD_DIM), other=0)
        result += tl.sum(tile.to(tl.float32) * 0, 1)
    return result


@triton.jit
def e4m3(x):
    """Return the bits of float32 x, at most 448 in size, as e4m3: to the nearest, ties to even.

    Done with integers, because sm_80 has no instruction for it, and Triton's interpreter loses a
    carry into the exponent, and NaN.
    """
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # biases 127 and 7
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF  # in steps of 2^-9
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def narrow_e4m3(x):
    """Return float32 values of at most 448 in float8; NaN stays NaN."""
    if INTERPRETED:
        return e4m3(x).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def to_e4m3(x, scale):
    """Return x / scale in float8, limited to the largest finite value; NaN stays NaN."""
    x = x.to(tl.float32) * tl.div_rn(1.0, scale)
    return narrow_e4m3(tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL))
