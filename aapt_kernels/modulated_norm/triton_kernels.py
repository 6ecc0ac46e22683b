"""Gated residual, LayerNorm and modulation for any GPU that Triton serves: one launch forward, with
or without rounding to e4m3, and backward one with a sum over its programs."""

import torch
import triton
import triton.language as tl

from ..precision import wide
from ..quantise_rows.ref import empty
from ..quantise_rows.triton_kernels import grouping, store_rounded
from ..triton_rows import dense_or_none, multiprocessors
from .ref import group_count, like_inputs

TILE = 4096  # elements of all rows of a program: 16 bytes of BF16 twice per thread of eight warps
COUNTS = ["rows", "length", "group_length", "splits"]
TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def load_rows(x, batch, at, batch_stride, row_stride, column, mask, WIDE: tl.constexpr):
    """Load rows (batch, at) of x (B, L or G, D) in the precision of the computation."""
    offset = batch.to(tl.int64) * batch_stride + at.to(tl.int64) * row_stride
    return tl.load(x + offset[:, None] + column, mask=mask, other=0).to(WIDE)


@triton.jit
def load_vector(x, column, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    return tl.load(x + column, mask=column < WIDTH, other=0).to(WIDE)


@triton.jit
def mean(x, WIDTH: tl.constexpr):
    return tl.sum(x, axis=1, keep_dims=True) / WIDTH


@triton.jit
def normalise(x, mask, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows with mean 0 and variance 1, zero outside of the mask, and 1 / deviation."""
    centred = tl.where(mask, x - mean(x, WIDTH), 0)
    inverse = 1 / tl.sqrt(mean(centred * centred, WIDTH) + EPS)
    # NOTE: a row outside of the mask has an infinite inverse if eps is 0
    return tl.where(mask, centred * inverse, 0), inverse


@triton.jit
def affine(x, weight, bias):
    if weight is not None:
        x = x * weight
    if bias is not None:
        x = x + bias
    return x


@triton.jit(do_not_specialize=COUNTS)
def modulated_norm_kernel(
    x,
    update,
    gate,
    shift,
    scale,
    weight,
    bias,
    residual,
    normed,
    scales,
    x_batch_stride,
    x_row_stride,
    update_batch_stride,
    update_row_stride,
    gate_batch_stride,
    gate_row_stride,
    shift_batch_stride,
    shift_row_stride,
    scale_batch_stride,
    scale_row_stride,
    rows,
    length,
    group_length,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    NORMED: tl.constexpr = None,
    GROUP: tl.constexpr = None,
    LARGEST: tl.constexpr = None,
    SMALLEST: tl.constexpr = None,
):
    """With `scales`, normed is stored as e4m3 of what it is in the dtype NORMED."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, token = row // length, row % length
    group = token // group_length
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)
    out = row.to(tl.int64)[:, None] * WIDTH + column

    # Load everything before the first use. Triton 3.6 lets no function return None, so what may be
    # missing is told apart here.
    r = load_rows(x, batch, token, x_batch_stride, x_row_stride, column, mask, WIDE)
    w, c = None, None
    if update is not None:
        u = load_rows(
            update, batch, token, update_batch_stride, update_row_stride, column, mask, WIDE
        )
    if gate is not None:
        g = load_rows(gate, batch, group, gate_batch_stride, gate_row_stride, column, mask, WIDE)
    if scale is not None:
        s = load_rows(scale, batch, group, scale_batch_stride, scale_row_stride, column, mask, WIDE)
        b = load_rows(shift, batch, group, shift_batch_stride, shift_row_stride, column, mask, WIDE)
    if weight is not None:
        w = load_vector(weight, column, WIDTH, WIDE)
    if bias is not None:
        c = load_vector(bias, column, WIDTH, WIDE)

    if update is not None:
        if gate is not None:
            u = g * u
        rounded = (r + u).to(residual.dtype.element_ty)
        tl.store(residual + out, rounded, mask=mask)
        r = rounded.to(WIDE)
    hat, _ = normalise(r, mask, EPS, WIDTH)
    y = affine(hat, w, c)
    if scale is not None:
        y = y * (1 + s) + b
    if scales is None:
        tl.store(normed + out, y, mask=mask)
    else:
        y = tl.where(mask, y.to(NORMED).to(tl.float32), 0)
        store_rounded(
            y,
            normed,
            scales,
            row.to(tl.int64),
            0,
            rows,
            WIDTH,
            ROWS,
            COLUMNS,
            GROUP,
            LARGEST,
            SMALLEST,
        )


@triton.jit
def store_sum(sums, program, total, column, WIDTH: tl.constexpr):
    """Store the sum of a program's rows to its own row; nothing if the sum is not wanted."""
    if sums is not None:
        total = tl.sum(total, axis=0, keep_dims=True)
        tl.store(sums + program.to(tl.int64) * WIDTH + column, total, mask=column < WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def modulated_norm_backward_kernel(
    dnormed,
    dresidual,
    residual,
    update,
    gate,
    scale,
    weight,
    bias,
    dx,
    dupdate,
    gate_sums,
    shift_sums,
    scale_sums,
    weight_sums,
    bias_sums,
    residual_batch_stride,
    residual_row_stride,
    update_batch_stride,
    update_row_stride,
    gate_batch_stride,
    gate_row_stride,
    scale_batch_stride,
    scale_row_stride,
    length,
    group_length,
    splits,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the gradients of x and update; incoming gradients are dense.

    `splits` programs share the tokens of a group. A program sums its share of the other gradients
    in a fixed order and stores the sums to its own row: (B, G, splits, D).
    """
    program = tl.program_id(0)
    part, split = program // splits, program % splits
    groups = length // group_length
    batch, group = part // groups, part % groups
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    at = tl.full((1,), 0, tl.int32) + group
    w, c = None, None
    if weight is not None:
        w = load_vector(weight, column, WIDTH, WIDE)
    if bias is not None:
        c = load_vector(bias, column, WIDTH, WIDE)
    gate_sum = tl.zeros((ROWS, COLUMNS), WIDE)
    shift_sum = tl.zeros((ROWS, COLUMNS), WIDE)
    scale_sum = tl.zeros((ROWS, COLUMNS), WIDE)
    weight_sum = tl.zeros((ROWS, COLUMNS), WIDE)
    bias_sum = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(split * ROWS, group_length, splits * ROWS):
        place = start + tl.arange(0, ROWS)
        mask = (place < group_length)[:, None] & inside
        token = group * group_length + place
        row = batch.to(tl.int64) * length + token
        out = row[:, None] * WIDTH + column
        d = tl.load(dnormed + out, mask=mask, other=0).to(WIDE)
        r = load_rows(
            residual, batch, token, residual_batch_stride, residual_row_stride, column, mask, WIDE
        )
        hat, inverse = normalise(r, mask, EPS, WIDTH)
        if scale is not None:
            shift_sum += d
            # NOTE: a bias makes the rows outside of the mask non-zero, but there d is zero
            scale_sum += d * affine(hat, w, c)
            # Loaded for every row, from L1: kept in registers it would spill for a wide model
            s = load_rows(
                scale, batch, at, scale_batch_stride, scale_row_stride, column, inside, WIDE
            )
            d = d * (1 + s)
        if bias is not None:
            bias_sum += d
        if weight is not None:
            weight_sum += d * hat
            d = d * w
        projection = mean(d * hat, WIDTH)
        d = (d - mean(d, WIDTH) - hat * projection) * inverse
        if dresidual is not None:
            d += tl.load(dresidual + out, mask=mask, other=0).to(WIDE)
        tl.store(dx + out, d, mask=mask)
        if gate is not None:
            g = load_rows(gate, batch, at, gate_batch_stride, gate_row_stride, column, inside, WIDE)
            u = load_rows(
                update, batch, token, update_batch_stride, update_row_stride, column, mask, WIDE
            )
            tl.store(dupdate + out, g * d, mask=mask)
            gate_sum += tl.where(mask, d * u, 0)
    store_sum(gate_sums, program, gate_sum, column, WIDTH)
    store_sum(shift_sums, program, shift_sum, column, WIDTH)
    store_sum(scale_sums, program, scale_sum, column, WIDTH)
    store_sum(weight_sums, program, weight_sum, column, WIDTH)
    store_sum(bias_sums, program, bias_sum, column, WIDTH)


def tiling(width: int, dtype: torch.dtype, eps: float) -> dict:
    """Return the compile-time arguments of a launch."""
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE // columns)
    return {
        "EPS": eps,
        "WIDTH": width,
        "COLUMNS": columns,
        "ROWS": rows,
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": min(16, max(1, rows * columns // 512)),
    }


def strides(*tensors) -> list[int]:
    """Return the strides of batch and row of every tensor (B, L or G, D), 0 for None."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def rounding(columns: int, dtype: torch.dtype) -> dict:
    """Return the compile-time arguments with which a launch rounds what it would return in
    `dtype`."""
    return {"NORMED": TYPES[dtype], **grouping(columns)}


def forward(x, update, gate, shift, scale, weight, bias, eps, dtype):
    normed = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    residual = launch(x, update, gate, shift, scale, weight, bias, eps, normed, None, {})
    return residual, normed


def forward_e4m3(x, update, gate, shift, scale, weight, bias, eps, dtype):
    values, scales = empty(x)
    rounded = rounding(triton.next_power_of_2(x.shape[-1]), dtype)
    codes = values.view(torch.uint8)
    residual = launch(x, update, gate, shift, scale, weight, bias, eps, codes, scales, rounded)
    return residual, values, scales


def launch(x, update, gate, shift, scale, weight, bias, eps, normed, scales, rounded):
    """Write normed, and scales if any; return the sum with the update, none without one."""
    residual = x.new_empty(0 if update is None else x.shape)
    batch, length, width = x.shape
    constants = tiling(width, x.dtype, eps) | rounded
    if x.numel():
        with torch.cuda.device_of(x):
            modulated_norm_kernel[(triton.cdiv(batch * length, constants["ROWS"]),)](
                x,
                update,
                gate,
                shift,
                scale,
                *dense_or_none((weight, bias)),
                residual,
                normed,
                scales,
                *strides(x, update, gate, shift, scale),
                batch * length,
                length,
                length // group_count(gate, scale),
                **constants,
            )
    return residual


def backward(dnormed, dresidual, residual, update, gate, shift, scale, weight, bias, eps):
    batch, length, width = residual.shape
    groups = group_count(gate, scale)
    constants = tiling(width, residual.dtype, eps)
    group_length = length // groups
    steps = triton.cdiv(group_length, constants["ROWS"])
    wanted = triton.cdiv(2 * multiprocessors(residual), max(1, batch * groups))
    splits = min(steps, wanted)
    dx = torch.empty_like(residual, memory_format=torch.contiguous_format)
    dupdate = None
    if gate is not None:
        dupdate = torch.empty_like(update, memory_format=torch.contiguous_format)
    summed = [x is not None for x in (gate, shift, scale, weight, bias)]
    shape = (sum(summed), batch, groups, splits, width)
    sums = residual.new_empty(shape, dtype=wide(residual.dtype))
    if residual.numel():
        parts = iter(sums.unbind())
        with torch.cuda.device_of(residual):
            modulated_norm_backward_kernel[(batch * groups * splits,)](
                *dense_or_none((dnormed, dresidual)),
                residual,
                update,
                gate,
                scale,
                *dense_or_none((weight, bias)),
                dx,
                dupdate,
                *(next(parts) if given else None for given in summed),
                *strides(residual, update, gate, scale),
                length,
                group_length,
                splits,
                **constants,
            )
    totals = iter(sums.sum(3).unbind())
    gradients = [next(totals) if given else None for given in summed]
    gradients[3:] = [None if x is None else x.sum((0, 1)) for x in gradients[3:]]
    tensors = (residual, update, gate, shift, scale, weight, bias)
    return like_inputs((dx, dupdate, *gradients), *tensors)
