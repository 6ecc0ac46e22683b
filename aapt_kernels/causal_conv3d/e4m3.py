"""Emulation of `causal_conv3d_e4m3`: in float32 the products of e4m3 numbers are exact.

a = e4m3(silu(rms_norm(x) norm_weight)), limited to 448        out = scale conv3d(a, weight) + ...
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .frames import to_bytes
from .ref import prologue

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (out_channels, in_channels, kt, kh, kw) to e4m3 with a scale for each output
    channel, its largest size / 448.

    Returns values in its shape and memory format, and scales (out_channels,) float32. ValueError
    for a weight with NaN or infinity.
    """
    if not weight.isfinite().all():
        raise ValueError("weight: expected finite numbers, got NaN or infinity")
    wide = weight.detach().float()
    smallest = torch.finfo(torch.float32).tiny
    scales = (wide.abs().amax((1, 2, 3, 4)) / LARGEST).clamp(min=smallest)
    return (wide / scales.view(-1, 1, 1, 1, 1)).to(FORMAT), scales


def round_active(x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool) -> Tensor:
    """Return x normed and activated in float32, then in e4m3."""
    norm_weight = None if norm_weight is None else norm_weight.float()
    return prologue(x.float(), norm_weight, eps, silu).clamp(-LARGEST, LARGEST).to(FORMAT)


def out_dtype(x: Tensor, bias: Tensor | None) -> torch.dtype:
    """Return the dtype of out: that of x, or of the bias if x is e4m3."""
    return bias.dtype if x.dtype == FORMAT else x.dtype


def emulated(convolve: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the operator on top of an implementation of `causal_conv3d`."""

    def run(
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
        active = (x if x.dtype == FORMAT else round_active(x, norm_weight, eps, silu)).float()
        state = None if state is None else state.float()
        options = None, [1, 1, 1], upsample, replicate, False, None, True, True
        out, state, _ = convolve(active, weight.float(), None, state, None, eps, False, *options)
        out = out * weight_scale.view(1, -1, 1, 1, 1)
        if bias is not None:
            out = out + bias.view(1, -1, 1, 1, 1)
        if residual is not None:
            out = out + residual
        nothing = x.new_empty(0)
        normed = nothing
        if next_norm_weight is not None:
            normed = round_active(out, next_norm_weight, eps, True)
        out = to_bytes(out) if pixels else out.to(out_dtype(x, bias))
        return out if keep_out else nothing, state.to(FORMAT), normed

    return run
