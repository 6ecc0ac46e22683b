"""Specification of `causal_conv3d` in plain PyTorch: concatenate the past, then convolve."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def prologue(x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool) -> Tensor:
    """RMS norm over the channels of every pixel, then SiLU; computed in at least float32."""
    y = x.to(wide(x.dtype))
    if norm_weight is not None:
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + eps)
        y = y * norm_weight.to(y.dtype).view(1, -1, 1, 1, 1)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def causal_conv3d(
    x: Tensor,  # (batch, in_channels, time, height, width)
    weight: Tensor,  # (out_channels, in_channels, kt, kh, kw)
    bias: Tensor | None,
    state: Tensor | None,  # (batch, in_channels, kt - 1, height, width)
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,  # like the output
    stride: list[int],
    padding: str,
) -> tuple[Tensor, Tensor]:
    kt, kh, kw = weight.shape[2:]
    a = prologue(x, norm_weight, eps, silu)
    if state is None:
        first = a[:, :, :1]
        past = first if padding == "replicate" else torch.zeros_like(first)
        state = past.expand(-1, -1, kt - 1, -1, -1)
    a = torch.cat([state, a], dim=2)
    new_state = a[:, :, a.shape[2] - (kt - 1) :].clone()

    mode = "replicate" if padding == "replicate" else "constant"
    a = F.pad(a, (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0), mode=mode)
    out = F.conv3d(a, weight, bias, stride)
    if residual is not None:
        out = out + residual
    return out, new_state


def causal_conv3d_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    stride: list[int],
    padding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and norm_weight (empty without one), by differentiation."""

    def forward(x, weight, bias, norm_weight):
        out, _ = causal_conv3d(
            x, weight, bias, state, norm_weight, eps, silu, None, stride, padding
        )
        return out

    bias = weight.new_zeros(len(weight))
    if norm_weight is None:
        _, pullback = torch.func.vjp(lambda *args: forward(*args, None), x, weight, bias)
        return *pullback(dout), x.new_empty(0)
    _, pullback = torch.func.vjp(forward, x, weight, bias, norm_weight)
    return pullback(dout)
