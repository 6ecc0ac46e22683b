"""Rounding to e4m3 for any GPU that Triton serves: one launch, one read of x; and the end of the
kernels that round what they have computed."""

import torch
import triton
import triton.language as tl

from ..triton_tiles import e4m3
from .ref import GROUP, LARGEST, SMALLEST_SCALE, empty

ROWS, WARPS = 32, 4  # of a tile, one group wide: 16 bytes of BF16 four times per thread


@triton.jit
def store_rounded(
    x,
    values,
    scales,
    row,
    start,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Store x (ROWS, COLUMNS) float32, zero outside of the rows and the width, as e4m3: at rows
    `row` (ROWS,) int64 of values (rows, WIDTH), from column `start`, a multiple of GROUP; and the
    scale of each GROUP of its columns to scales (groups, rows)."""
    GROUPS: tl.constexpr = COLUMNS // GROUP
    numbers = tl.reshape(x, (ROWS, GROUPS, GROUP))
    # A maximum drops NaN, which has to reach the scale
    broken = tl.sum(tl.where(numbers != numbers, numbers, 0), axis=2, keep_dims=True)
    largest = tl.max(tl.abs(numbers), axis=2, keep_dims=True)
    scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST) + broken
    code = tl.reshape(e4m3(numbers * tl.div_rn(1.0, scale)), (ROWS, COLUMNS))
    column = (start + tl.arange(0, COLUMNS))[None, :]
    active = (row < rows)[:, None]
    tl.store(values + row[:, None] * WIDTH + column, code, mask=active & (column < WIDTH))
    group = (start // GROUP + tl.arange(0, GROUPS))[None, :]
    at = group.to(tl.int64) * rows + row[:, None]
    scale = tl.reshape(scale, (ROWS, GROUPS))
    tl.store(scales + at, scale, mask=active & (group * GROUP < WIDTH))


@triton.jit(do_not_specialize=["rows"])
def quantise_rows_kernel(
    x,
    values,
    scales,
    rows,
    x_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * GROUP
    column = start + tl.arange(0, GROUP)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * x_stride + column[None, :]
    numbers = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    store_rounded(
        numbers, values, scales, row, start, rows, WIDTH, ROWS, GROUP, GROUP, LARGEST, SMALLEST
    )


def grouping(columns: int) -> dict:
    """Return the compile-time arguments of `store_rounded` in a tile of this many columns."""
    return {"GROUP": min(GROUP, columns), "LARGEST": LARGEST, "SMALLEST": SMALLEST_SCALE}


def tiling(width: int) -> dict:
    """Return the compile-time arguments of a launch."""
    return {"WIDTH": width, "ROWS": ROWS, "num_warps": WARPS, **grouping(GROUP)}


def forward(x):
    rows, width = x.shape
    values, scales = empty(x)
    if x.numel():
        with torch.cuda.device_of(x):
            quantise_rows_kernel[(triton.cdiv(rows, ROWS), len(scales))](
                x, values.view(torch.uint8), scales, rows, x.stride(0), **tiling(width)
            )
    return values, scales
