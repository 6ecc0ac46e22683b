"""Implicit matrix product for any GPU that Triton serves.

One kernel norms and activates, one convolves: a program takes a run of pixels of one output frame
and a block of output channels, and walks the taps and blocks of input channels. If the block has
all output channels, it can norm and activate them for the next convolution too. Past frames are
read from the state in place. Sums run in one order, whatever the chunk. Upsampling is not folded
into the weights.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import capability_of
from ..precision import as_bits
from ..triton_rows import dense_or_none
from ..triton_tiles import FLOAT8_CAPABILITY, INTERPRETED, e4m3
from .e4m3 import FORMAT, LARGEST, out_dtype
from .frames import frames_to_skip, memory_format_of, out_size, past_frames
from .packed import PackedWeights

ROWS = 32  # pixels that a program activates
MAX_CHANNELS = 2048
MAX_SPAN = 2**31 - 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def limit(
    x,
    weight=None,
    bias=None,
    state=None,
    norm_weight=None,
    eps=None,
    silu=False,
    residual=None,
    stride=(1, 1, 1),
    upsample=(1, 1),
    *_,
) -> str | None:
    """Return why the kernels do not take these arguments, None if they do."""
    if x.dtype not in (*FLOATS, FORMAT):
        return f"it takes float16, bfloat16, float32 or {FORMAT}, got {x.dtype}"
    if x.shape[1] > MAX_CHANNELS:
        return f"it takes at most {MAX_CHANNELS} input channels, got {x.shape[1]}"
    if weight is None:
        return None
    sizes = [x.shape[1:], (weight.shape[0], *out_size(x, stride, upsample, state is None))]
    if state is not None:
        sizes.append(state.shape[1:])
    pixels = max(x.shape[0] * math.prod(size[1:]) for size in sizes)
    if pixels > MAX_SPAN:
        return f"it takes fewer than 2^31 pixels in all frames, got {pixels}; take fewer frames"
    memory = memory_format_of(x)
    most = max(frame_span(*size, memory) for size in sizes)
    if most > MAX_SPAN:
        return (
            f"it takes frames whose first and last element are less than 2^31 elements apart in "
            f"memory, got {most}; convert x to torch.channels_last_3d or take fewer frames"
        )
    return None


def limit_e4m3(
    x,
    weight=None,
    weight_scale=None,
    bias=None,
    state=None,
    norm_weight=None,
    eps=None,
    silu=False,
    residual=None,
    upsample=(1, 1),
    *_,
) -> str | None:
    """Return why the kernels do not take these arguments, None if they do."""
    if x.is_cuda and capability_of(x.device) < FLOAT8_CAPABILITY:
        return f"it needs a device of sm_89 or later, got {capability_of(x.device)}"
    return limit(x, weight, bias, state, norm_weight, eps, silu, residual, upsample=upsample)


def frame_span(
    channels: int, frames: int, height: int, width: int, memory: torch.memory_format
) -> int:
    """Return the number of elements from the first to the last of one frame in memory; offsets in
    a frame are counted with 32 bits."""
    if memory == torch.channels_last_3d:
        return channels * height * width
    return ((channels - 1) * frames + 1) * height * width


@triton.jit
def activate_kernel(
    x,
    norm_weight,
    out,
    batch_stride,
    channel_stride,
    time_stride,
    row_stride,
    column_stride,
    pixels,
    frames,
    height,
    width,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    LARGEST: tl.constexpr = None,
):
    """Norm and activate a run of pixels; x and out share their strides. LARGEST: out is e4m3, whose
    largest number that is."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)[None, :]
    mask = (pixel < pixels)[:, None] & (channel < CHANNELS)
    column, row = pixel % width, pixel // width % height
    frame = pixel // (width * height)
    at = (
        (frame // frames).to(tl.int64) * batch_stride
        + (frame % frames).to(tl.int64) * time_stride
        + row.to(tl.int64) * row_stride
        + column * column_stride
    )[:, None] + channel.to(tl.int64) * channel_stride
    y = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    if norm_weight is not None:
        mean = tl.sum(y * y, axis=1, keep_dims=True) / CHANNELS
        weight = tl.load(norm_weight + channel, mask=channel < CHANNELS, other=0)
        y = y / tl.sqrt(mean + EPS) * weight.to(tl.float32)
    if SILU:
        y = y / (1 + tl.exp(-y))
    if LARGEST is not None:
        y = e4m3(tl.where(tl.abs(y) > LARGEST, tl.where(y < 0, -LARGEST, LARGEST), y))
    tl.store(out + at, y, mask=mask)


@triton.jit
def causal_conv3d_kernel(
    x,
    past,
    weight,
    weight_scale,
    bias,
    residual,
    next_norm_weight,
    out,
    active,
    x_batch_stride,
    x_channel_stride,
    x_time_stride,
    row_stride,
    column_stride,
    past_batch_stride,
    past_channel_stride,
    past_time_stride,
    out_batch_stride,
    out_channel_stride,
    out_time_stride,
    out_row_stride,
    out_column_stride,
    past_length,
    height,
    width,
    out_frames,
    out_height,
    out_width,
    skipped,
    in_channels,
    out_channels,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TIME_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    REPEATS: tl.constexpr,
    COPIES: tl.constexpr,
    REPLICATE: tl.constexpr,
    PIXELS: tl.constexpr,
    EPS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Convolve a run of pixels of one output frame.

    weight (KT, KH, KW, in_channels, out_channels) is dense; past has the strides of x but for the
    first three; residual, out and active share strides. `active` is out normed and activated, and
    needs all output channels in one block. One of out and active may be None. LARGEST: the
    largest number of e4m3 if active is e4m3, else None. `skipped`: frames of [past | x], repeated,
    before the first that output frame 0 reads.
    """
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    batch, frame = tl.program_id(2) // out_frames, tl.program_id(2) % out_frames
    row, column = pixel // out_width, pixel % out_width
    inside = pixel < out_height * out_width

    sums = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32)
    blocks = tl.cdiv(in_channels, BLOCK_IN)
    for step in range(KT * KH * KW * blocks):
        tap, block = step // blocks, step % blocks
        kx, ky, kt = tap % KW, tap // KW % KH, tap // (KW * KH)
        # Frame of [past | x]; past is None if zeros come first
        t = (skipped + frame * TIME_STRIDE + kt) // REPEATS - past_length
        y = row * ROW_STRIDE + ky - KH // 2
        z = column * COLUMN_STRIDE + kx - KW // 2
        seen = inside
        if REPLICATE:
            y = tl.minimum(tl.maximum(y, 0), height * COPIES - 1)
            z = tl.minimum(tl.maximum(z, 0), width * COPIES - 1)
        else:
            seen = seen & (y >= 0) & (y < height * COPIES) & (z >= 0) & (z < width * COPIES)
        y, z = y // COPIES, z // COPIES
        c = block * BLOCK_IN + tl.arange(0, BLOCK_IN)
        at = tl.maximum(t, 0).to(tl.int64) * x_time_stride
        source = x + (at + batch.to(tl.int64) * x_batch_stride)
        channel_stride = x_channel_stride + 0 * step
        if past is not None:
            if t < 0:
                at = (past_length + t).to(tl.int64) * past_time_stride
                source = past + (at + batch.to(tl.int64) * past_batch_stride)
                channel_stride = past_channel_stride + 0 * step
        elif not REPLICATE:
            seen = seen & (t + 0 * pixel >= 0)
        offset = (y * row_stride + z * column_stride)[:, None] + (c * channel_stride)[None, :]
        a = tl.load(source + offset, mask=seen[:, None] & (c < in_channels)[None, :], other=0.0)
        at = tap * in_channels * out_channels
        b = tl.load(
            weight + at + (c * out_channels)[:, None] + channel[None, :],
            mask=(c < in_channels)[:, None] & (channel < out_channels)[None, :],
            other=0.0,
        )
        if INTERPRETED:  # which takes the bits of BF16 for integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        # The adder of FP8 keeps few bits: float32 takes over after each block of channels
        sums = tl.dot(a, b, sums, input_precision="tf32x3", max_num_imprecise_acc=BLOCK_IN)

    stored = inside[:, None] & (channel < out_channels)[None, :]
    at = (
        batch.to(tl.int64) * out_batch_stride
        + frame.to(tl.int64) * out_time_stride
        + (row * out_row_stride + column * out_column_stride)[:, None]
        + (channel * out_channel_stride)[None, :]
    )
    if weight_scale is not None:
        sums *= tl.load(weight_scale + channel, mask=channel < out_channels, other=0)[None, :]
    if bias is not None:
        added = tl.load(bias + channel, mask=channel < out_channels, other=0)
        sums += added.to(tl.float32)[None, :]
    if residual is not None:
        sums += tl.load(residual + at, mask=stored, other=0).to(tl.float32)
    if PIXELS:
        level = tl.minimum(tl.maximum(sums * 127.5 + 127.5, 0.0), 255.0)
        tl.store(out + at, tl.floor(level + 0.5).to(tl.uint8), mask=stored)
    elif out is not None:
        tl.store(out + at, sums, mask=stored)
    if active is not None:  # channels past the last are zero
        mean = tl.sum(sums * sums, axis=1, keep_dims=True) / out_channels
        weights = tl.load(next_norm_weight + channel, mask=channel < out_channels, other=0)
        y = sums / tl.sqrt(mean + EPS) * weights.to(tl.float32)[None, :]
        y = y / (1 + tl.exp(-y))
        if LARGEST is not None:
            y = e4m3(tl.where(tl.abs(y) > LARGEST, tl.where(y < 0, -LARGEST, LARGEST), y))
        tl.store(active + at, y, mask=stored)


def blocks_of(out_channels: int, in_channels: int, dtype: torch.dtype) -> dict:
    """Return the compile-time sizes of a launch: reasoned, not tuned.

    float32 is multiplied as three TF32 products, which hold both factors three times in registers:
    larger blocks would spill, and leave no room in the 99 KB of a small device.
    """
    block_out = min(128, max(16, triton.next_power_of_2(out_channels)))
    pixels, least_in, most_in = 128, 16, 64
    if dtype == torch.float32:
        pixels, most_in = 64, 32 if block_out == 128 else 16
    elif dtype == FORMAT:
        least_in, most_in = 32, 128
    return {
        "BLOCK_PIXELS": pixels,
        "BLOCK_OUT": block_out,
        "BLOCK_IN": min(most_in, max(least_in, triton.next_power_of_2(in_channels))),
        "num_warps": 8 if block_out == 128 else 4,
        "num_stages": 3,
    }


packed_weights = PackedWeights(lambda weight: weight.permute(2, 3, 4, 1, 0).contiguous())


def activate(
    x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool, rounds: bool = False
) -> Tensor:
    """Return norm and SiLU of x, in the memory format of x; `rounds`: in e4m3."""
    batch, channels, frames, height, width = x.shape
    dtype = FORMAT if rounds else x.dtype
    out = torch.empty_like(x, dtype=dtype, memory_format=memory_format_of(x))
    x = x.contiguous(memory_format=memory_format_of(x))
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    pixels = batch * frames * height * width
    activate_kernel[(triton.cdiv(pixels, ROWS),)](
        x,
        norm_weight,
        as_bits(out),
        *x.stride(),
        pixels,
        frames,
        height,
        width,
        CHANNELS=channels,
        WIDTH=triton.next_power_of_2(channels),
        ROWS=ROWS,
        EPS=eps,
        SILU=silu,
        LARGEST=LARGEST if rounds else None,
    )
    return out


def next_state(x: Tensor, state: Tensor | None, past: int, replicate: bool) -> Tensor:
    """Return the last `past` frames of [state | x]."""
    missing = past - x.shape[2]
    if missing <= 0:
        return x[:, :, -missing:].clone(memory_format=memory_format_of(x))
    if state is not None:
        before = state[:, :, past - missing :]
    else:
        before = x[:, :, :1] if replicate else torch.zeros_like(x[:, :, :1])
        before = before.expand(-1, -1, missing, -1, -1)
    return torch.cat([before, x], dim=2).contiguous(memory_format=memory_format_of(x))


def forward(
    x,
    weight,
    bias,
    state,
    norm_weight,
    eps,
    silu,
    residual,
    stride,
    upsample,
    replicate,
    pixels,
    next_norm_weight,
    keep_out,
    keep_state,
    weight_scale=None,
):
    """weight_scale: (out_channels,) float32, or None. If given, weight, state and the normed output
    are e4m3; x is e4m3 or is rounded here, and with an e4m3 x the output has the dtype of the bias.
    """
    batch, channels, frames, height, width = x.shape
    out_channels, _, kt, kh, kw = weight.shape
    repeats, copies = upsample
    past, starts = past_frames(kt, repeats), state is None
    skipped = frames_to_skip(kt, repeats, starts)
    out_frames, *size = out_size(x, stride, upsample, starts)
    memory = memory_format_of(x)
    shape = (batch, out_channels, out_frames, *size)
    rounds = weight_scale is not None
    constants = blocks_of(out_channels, channels, FORMAT if rounds else x.dtype)
    norms = next_norm_weight is not None
    in_epilogue = norms and out_channels <= constants["BLOCK_OUT"]

    def output(dtype):
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory)

    nothing = x.new_empty(0)
    writes_out = keep_out or (norms and not in_epilogue)
    dtype = out_dtype(x, bias)
    out = output(torch.uint8 if pixels else dtype) if writes_out else None
    normed = output(FORMAT if rounds else dtype) if in_epilogue else None
    with torch.cuda.device_of(x):
        active = x.contiguous(memory_format=memory)
        if norm_weight is not None or silu or (rounds and x.dtype != FORMAT):
            active = activate(x, norm_weight, eps, silu, rounds)
        new_state = nothing
        if keep_state:
            before = None if state is None else as_bits(state)
            new_state = next_state(as_bits(active), before, past, replicate).view(active.dtype)
        past_layout = active.stride()[:3]
        if state is not None:
            state = state.contiguous(memory_format=memory)
            past_layout = state.stride()[:3]
        if residual is not None:
            residual = residual.contiguous(memory_format=memory)
        vectors = (weight_scale, bias, next_norm_weight)
        weight_scale, bias, next_norm_weight = dense_or_none(vectors)
        grid = (
            triton.cdiv(size[0] * size[1], constants["BLOCK_PIXELS"]),
            triton.cdiv(out_channels, constants["BLOCK_OUT"]),
            batch * out_frames,
        )
        causal_conv3d_kernel[grid](
            active,
            state,
            packed_weights(weight),
            weight_scale,
            bias,
            residual,
            next_norm_weight,
            out,
            None if normed is None else as_bits(normed),
            *active.stride(),
            *past_layout,
            *(out if writes_out else normed).stride(),
            past,
            height,
            width,
            out_frames,
            *size,
            skipped,
            channels,
            out_channels,
            KT=kt,
            KH=kh,
            KW=kw,
            TIME_STRIDE=stride[0],
            ROW_STRIDE=stride[1],
            COLUMN_STRIDE=stride[2],
            REPEATS=repeats,
            COPIES=copies,
            REPLICATE=replicate,
            PIXELS=pixels,
            EPS=eps,
            LARGEST=LARGEST if rounds else None,
            **constants,
        )
        if norms and not in_epilogue:
            normed = activate(out, next_norm_weight, eps, True, rounds)
    return out if keep_out else nothing, new_state, normed if norms else nothing


def forward_e4m3(
    x,
    weight,
    weight_scale,
    bias,
    state,
    norm_weight,
    eps,
    silu,
    residual,
    upsample,
    replicate,
    pixels,
    next_norm_weight,
    keep_out,
):
    return forward(
        x,
        weight,
        bias,
        state,
        norm_weight,
        eps,
        silu,
        residual,
        (1, 1, 1),
        upsample,
        replicate,
        pixels,
        next_norm_weight,
        keep_out,
        True,
        weight_scale,
    )
