"""Rows of head_dim in Triton kernels: norm and rotation, for qk_norm_rope and kv_append.

A program takes ROWS rows of head_dim in the order (batch, token, head): any rows if each head has
its norm, the heads of one token if the norm runs ACROSS them. A row is held as its two halves, so
that rotation exchanges nothing, and every access is contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import dot

TILE = 1024  # elements of one half per program of four warps: 16 bytes of BF16 per thread
COUNTS = ["rows", "length"]  # differ between calls, and get no kernel of their own for some values


@triton.jit
def locate(
    program,
    rows,
    length,
    heads,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Return batch, token and head of a program's rows, whether a row is active, and its offset in
    a dense tensor."""
    row = program * ROWS + tl.arange(0, ROWS)
    span = heads
    if ACROSS:
        span = ROWS
    token = row // span
    head = row % span
    active = ((row < rows) & (head < heads))[:, None]
    dense = ((token.to(tl.int64) * heads + head) * HEAD_DIM)[:, None]
    return token // length, token % length, head, active, dense


@triton.jit
def offsets(batch, token, head, batch_stride, token_stride, head_stride):
    """Return the offsets of rows, in 64 bits: a cache or a long clip may exceed 2^31 elements."""
    return (
        batch.to(tl.int64) * batch_stride
        + token.to(tl.int64) * token_stride
        + head.to(tl.int64) * head_stride
    )[:, None]


@triton.jit
def half_masks(active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns of a half, and masks of the first and the second half.

    An odd head_dim, which nobody rotates, has a shorter second half.
    """
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    column = tl.arange(0, WIDTH)[None, :]
    return column, active & (column < HALF), active & (column < HEAD_DIM - HALF)


@triton.jit
def load_halves(x, at, active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    column, first, second = half_masks(active, HEAD_DIM, WIDTH)
    low = tl.load(x + at + column, mask=first, other=0)
    return low, tl.load(x + at + HALF + column, mask=second, other=0)


@triton.jit
def store_halves(x, at, low, high, active, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    column, first, second = half_masks(active, HEAD_DIM, WIDTH)
    tl.store(x + at + column, low, mask=first)
    tl.store(x + at + HALF + column, high, mask=second)


@triton.jit
def load_weight(
    weight, head, heads, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr
):
    """Load halves of a weight: (ROWS, WIDTH) if each head has its own, (1, WIDTH) if heads share
    it."""
    if ACROSS:
        halves = load_halves(
            weight, (head * HEAD_DIM)[:, None], (head < heads)[:, None], HEAD_DIM, WIDTH
        )
    else:
        halves = load_halves(weight, 0, True, HEAD_DIM, WIDTH)
    return halves


@triton.jit
def mean(low, high, heads, HEAD_DIM: tl.constexpr, ACROSS: tl.constexpr):
    """Return the mean over the elements of one norm: (ROWS, 1), or a scalar across heads."""
    sums = tl.sum(low + high, axis=1, keep_dims=True)
    if ACROSS:
        result = tl.sum(tl.sum(sums, axis=1), axis=0) / (HEAD_DIM * heads)
    else:
        result = sums / HEAD_DIM
    return result


@triton.jit
def inverse_rms(low, high, heads, EPS: tl.constexpr, HEAD_DIM: tl.constexpr, ACROSS: tl.constexpr):
    return 1 / tl.sqrt(mean(low * low, high * high, heads, HEAD_DIM, ACROSS) + EPS)


@triton.jit
def normalise(
    low,
    high,
    weight,
    head,
    heads,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
):
    low, high = low.to(WIDE), high.to(WIDE)
    if weight is not None:
        inverse = inverse_rms(low, high, heads, EPS, HEAD_DIM, ACROSS)
        weight_low, weight_high = load_weight(weight, head, heads, HEAD_DIM, WIDTH, ACROSS)
        low = low * inverse * weight_low.to(WIDE)
        high = high * inverse * weight_high.to(WIDE)
    return low, high


@triton.jit
def load_angles(
    cos,
    sin,
    token,
    active,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Load cos and sin of each row's token."""
    column, mask, _ = half_masks(active, HEAD_DIM, WIDTH)
    at = token[:, None] * (HEAD_DIM // 2) + column
    return (
        tl.load(cos + at, mask=mask, other=0).to(WIDE),
        tl.load(sin + at, mask=mask, other=0).to(WIDE),
    )


@triton.jit
def rotate(low, high, cos, sin):
    if cos is not None:
        low, high = low * cos - high * sin, low * sin + high * cos
    return low, high


@triton.jit
def multiply_hadamard(low, high, dtype: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the halves of rows, rounded to `dtype`, times the Hadamard matrix over
    sqrt(HEAD_DIM), a power of two from 32 to 512."""
    index = tl.arange(0, HEAD_DIM // 2)
    parity = index[:, None] & index[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs = (1.0 - 2.0 * (parity & 1)).to(dtype)
    low, high = dot(low.to(dtype), signs), dot(high.to(dtype), signs)
    ROOT: tl.constexpr = HEAD_DIM**-0.5
    return (low + high) * ROOT, (low - high) * ROOT


@triton.jit
def store_queries(
    low,
    high,
    weight,
    cos,
    sin,
    cos_sink,
    sin_sink,
    q_out,
    q_sink_out,
    out,
    token,
    head,
    active,
    heads,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
    HADAMARD: tl.constexpr = False,
):
    """Store queries, normalised and rotated, and once more rotated for the pinned frame; HADAMARD:
    both multiplied by the Hadamard matrix."""
    dtype: tl.constexpr = low.dtype
    low, high = normalise(low, high, weight, head, heads, EPS, HEAD_DIM, WIDTH, ACROSS, WIDE)
    rotated_low, rotated_high = rotate(low, high, cos, sin)
    if HADAMARD:
        rotated_low, rotated_high = multiply_hadamard(rotated_low, rotated_high, dtype, HEAD_DIM)
    store_halves(q_out, out, rotated_low, rotated_high, active, HEAD_DIM, WIDTH)
    if cos_sink is not None:
        cos, sin = load_angles(cos_sink, sin_sink, token, active, HEAD_DIM, WIDTH, WIDE)
        low, high = rotate(low, high, cos, sin)
        if HADAMARD:
            low, high = multiply_hadamard(low, high, dtype, HEAD_DIM)
        store_halves(q_sink_out, out, low, high, active, HEAD_DIM, WIDTH)


def tiling(q: Tensor, weight: Tensor | None, eps: float) -> tuple[int, dict]:
    """Return the number of rows, padded heads included, and the compile-time arguments of a
    launch."""
    batch, length, heads, head_dim = q.shape
    width = triton.next_power_of_2((head_dim + 1) // 2)
    across = weight is not None and weight.dim() == 2
    rows = triton.next_power_of_2(heads) if across else max(1, TILE // width)
    constants = {
        "EPS": eps,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "ROWS": rows,
        "ACROSS": across,
        "WIDE": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "num_warps": min(16, max(1, rows * width // 256)),
    }
    return batch * length * (rows if across else heads), constants


def dense_or_none(tensors) -> list[Tensor | None]:
    """Return every tensor contiguous, None for None."""
    return [None if x is None else x.contiguous() for x in tensors]


def multiprocessors(x: Tensor) -> int:
    """Return the number of multiprocessors of x's device."""
    if not x.is_cuda:
        return 2  # the interpreter has no device; enough for more than one program
    return torch.cuda.get_device_properties(x.device).multi_processor_count
