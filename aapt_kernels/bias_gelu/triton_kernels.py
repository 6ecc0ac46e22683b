"""Bias and GELU for any GPU that Triton serves: one launch forward, with or without rounding to
e4m3, and backward one with a sum over its programs."""

import torch
import triton
import triton.language as tl

from ..precision import wide
from ..quantise_rows.ref import empty
from ..quantise_rows.triton_kernels import grouping, store_rounded
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
    scales,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr = None,
    LARGEST: tl.constexpr = None,
    SMALLEST: tl.constexpr = None,
):
    """With `scales`, out is stored as e4m3 of what it is in the dtype of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    mask = (row < rows)[:, None] & inside
    at = row[:, None] * WIDTH + column
    z = tl.load(x + at, mask=mask, other=0).to(WIDE)
    z += tl.load(bias + column, mask=inside, other=0).to(WIDE)
    s, _ = sigmoid_of_twice(z)
    if scales is None:
        tl.store(out + at, z * s, mask=mask)
    else:
        y = tl.where(mask, (z * s).to(x.dtype.element_ty).to(tl.float32), 0)
        store_rounded(
            y, out, scales, row, start, rows, WIDTH, ROWS, COLUMNS, GROUP, LARGEST, SMALLEST
        )


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
        launch(x, bias, out, None, tiling(x.shape[-1], x.dtype))
    return out


def forward_e4m3(x, bias):
    values, scales = empty(x)
    if x.numel():
        constants = tiling(x.shape[-1], x.dtype)
        constants |= grouping(constants["COLUMNS"])
        launch(x, bias, values.view(torch.uint8), scales, constants)
    return values, scales


def launch(x, bias, out, scales, constants):
    width = x.shape[-1]
    rows = x.numel() // width
    grid = (triton.cdiv(rows, constants["ROWS"]), triton.cdiv(width, constants["COLUMNS"]))
    with torch.cuda.device_of(x):
        bias_gelu_kernel[grid](x.contiguous(), bias.contiguous(), out, scales, rows, **constants)


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
