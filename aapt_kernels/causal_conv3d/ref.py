"""Specification of `causal_conv3d` in plain PyTorch: concatenate the past, repeat, convolve."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from .frames import frames_to_skip, memory_format_of, past_frames, to_bytes


def prologue(x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool) -> Tensor:
    """Apply RMS norm over the channels of every pixel, then SiLU; computed in at least float32."""
    y = x.to(wide(x.dtype))
    if norm_weight is not None:
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + eps)
        y = y * norm_weight.to(y.dtype).view(1, -1, 1, 1, 1)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def repeat(x: Tensor, kt: int, upsample: list[int], starts: bool) -> Tensor:
    """Return [state | x] at the rate of the output: nearest neighbours, in time and in space."""
    time, space = upsample
    if time > 1:
        x = x.repeat_interleave(time, dim=2)
    if space > 1:
        x = x.repeat_interleave(space, dim=3).repeat_interleave(space, dim=4)
    return x[:, :, frames_to_skip(kt, time, starts) :]


def causal_conv3d(
    x: Tensor,  # (batch, in_channels, time, height, width)
    weight: Tensor,  # (out_channels, in_channels, kt, kh, kw)
    bias: Tensor | None,
    state: Tensor | None,  # (batch, in_channels, past_frames, height, width)
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,  # like the output
    stride: list[int],
    upsample: list[int],
    replicate: bool,
    pixels: bool,
    next_norm_weight: Tensor | None,
    keep_out: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kt, kh, kw = weight.shape[2:]
    a = prologue(x, norm_weight, eps, silu)
    past, starts = state, state is None
    if starts:
        first = a[:, :, :1]
        past = first if replicate else torch.zeros_like(first)
        past = past.expand(-1, -1, past_frames(kt, upsample[0]), -1, -1)
    a = torch.cat([past, a], dim=2)
    new_state = a[:, :, a.shape[2] - past.shape[2] :].clone(memory_format=memory_format_of(x))

    a = repeat(a, kt, upsample, starts)
    mode = "replicate" if replicate else "constant"
    a = F.pad(a, (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0), mode=mode)
    out = F.conv3d(a, weight, bias, stride)
    if residual is not None:
        out = out + residual
    active = None if next_norm_weight is None else prologue(out, next_norm_weight, eps, True)
    out = to_bytes(out) if pixels else out
    returned = out if keep_out else None, new_state if keep_state else None, active
    return tuple(
        x.new_empty(0) if t is None else t.contiguous(memory_format=memory_format_of(x))
        for t in returned
    )


def causal_conv3d_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    stride: list[int],
    upsample: list[int],
    replicate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and norm_weight, the last empty without a norm, by
    differentiation. Those of x and weight have the strides that compiled code expects."""

    def forward(x, weight, bias, norm_weight):
        options = eps, silu, None, stride, upsample, replicate, False, None, True, True
        out, _, _ = causal_conv3d(x, weight, bias, state, norm_weight, *options)
        return out

    bias = weight.new_zeros(len(weight))
    if norm_weight is None:
        _, pullback = torch.func.vjp(lambda *args: forward(*args, None), x, weight, bias)
        dx, dweight, dbias = pullback(dout)
        dnorm_weight = x.new_empty(0)
    else:
        _, pullback = torch.func.vjp(forward, x, weight, bias, norm_weight)
        dx, dweight, dbias, dnorm_weight = pullback(dout)
    return stored_like(dx, x), stored_like(dweight, weight), dbias, dnorm_weight


def stored_like(gradient: Tensor, x: Tensor) -> Tensor:
    """Return a gradient with the strides of `torch.empty_like(x)`, copied if it has others."""
    wanted = torch.empty_like(x)
    return gradient if gradient.stride() == wanted.stride() else wanted.copy_(gradient)
