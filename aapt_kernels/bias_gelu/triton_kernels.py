"""Bias and GELU for any GPU that Triton serves: one launch forward, and backward one with a sum
over its programs."""

import torch
import triton
import triton.language as tl

from ..precision import wide
from ..triton_rows import multiprocessors

ROWS, COLUMNS, WARPS = 4, 1024, 8  # of a tile: 16 bytes of BF16 twice per thread
COUNTS = ["rows", "splits"]


@triton.jit
def sigmoid_of_twice(z):
    """Return s = (1 + tanh(a)) / 2 = 1 / (1 + exp(-2 a)), with a = sqrt(2 / pi) (z + 0.044715 z^3),
    and s (1 - s).

    gelu(z) = z s. No difference cancels, and no exponential overflows.
    """
    twice = 1.5957691216057308 * z * (1 + 0.044715 * z * z)
    small = tl.exp(-tl.abs(twice))
    inverse = 1 / (1 + small)
    return tl.where(twice >= 0, 1, small) * inverse, small * inverse * inverse


@triton.jit(do_not_specialize=COUNTS)
def bias_gelu_kernel(
    x,
    bias,
    out,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    mask = (row < rows) & inside
    at = row * WIDTH + column
    z = tl.load(x + at, mask=mask, other=0).to(WIDE)
    z += tl.load(bias + column, mask=inside, other=0).to(WIDE)
    s, _ = sigmoid_of_twice(z)
    tl.store(out + at, z * s, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def bias_gelu_backward_kernel(
    dout,
    x,
    bias,
    dx,
    sums,
    rows,
    splits,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the gradient of x, and to sums (splits, D) each program's share of that of the bias."""
    split = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    b = tl.load(bias + column, mask=inside, other=0).to(WIDE)
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(split * ROWS, rows, splits * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & inside
        at = row * WIDTH + column
        z = tl.load(x + at, mask=mask, other=0).to(WIDE) + b
        d = tl.load(dout + at, mask=mask, other=0).to(WIDE)
        s, bell = sigmoid_of_twice(z)
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
        d = d * (s + z * bell * slope)
        tl.store(dx + at, d, mask=mask)
        total += tl.where(mask, d, 0)
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(sums + split.to(tl.int64) * WIDTH + column, total, mask=inside)


def tiling(width: int, dtype: torch.dtype) -> dict:
    """Return the compile-time arguments of a launch."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return {
        "WIDTH": width,
        "ROWS": ROWS * COLUMNS // columns,
        "COLUMNS": columns,
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
    }


def forward(x, bias):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        width = x.shape[-1]
        rows, constants = x.numel() // width, tiling(width, x.dtype)
        grid = (triton.cdiv(rows, constants["ROWS"]), triton.cdiv(width, constants["COLUMNS"]))
        with torch.cuda.device_of(x):
            bias_gelu_kernel[grid](x.contiguous(), bias.contiguous(), out, rows, **constants)
    return out


def backward(dout, x, bias):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return dx, torch.zeros_like(bias)
    width = x.shape[-1]
    rows, constants = x.numel() // width, tiling(width, x.dtype)
    tiles = triton.cdiv(width, constants["COLUMNS"])
    wanted = triton.cdiv(4 * multiprocessors(x), tiles)
    splits = min(triton.cdiv(rows, constants["ROWS"]), wanted)
    sums = x.new_empty((splits, width), dtype=wide(x.dtype))
    with torch.cuda.device_of(x):
        bias_gelu_backward_kernel[(splits, tiles)](
            dout.contiguous(),
            x.contiguous(),
            bias.contiguous(),
            dx,
            sums,
            rows,
            splits,
            **constants,
        )
    return dx, sums.sum(0).to(bias.dtype)
