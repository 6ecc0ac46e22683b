"""Norm, rotation and ring write as plain PyTorch: what one would write without these ops."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, L, H, D) in its own dtype throughout, as models do it; cos and sin (L, 1, D / 2)."""
    low, high = F.rms_norm(x, x.shape[-1:], weight, 1e-6).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)


def append(q, k, v, k_cache, v_cache, step, weight, cos, sin, text, frames) -> Tensor:
    """kv_append with a sink of one frame; the slot follows the counter on the device."""
    slot = torch.where(step < 1, step, 1 + (step - 1) % (frames - 1))
    rows = text + slot * q.shape[1] + torch.arange(q.shape[1], device=q.device)
    k_cache.index_copy_(1, rows, norm_rope(k, weight, cos, sin))
    v_cache.index_copy_(1, rows, v)
    return norm_rope(q, weight, cos, sin)


def make_tables(shape, device) -> tuple[Tensor, Tensor, Tensor]:
    """A norm's weight (D,) and tables of angles (L, D / 2), all float32."""
    weight = torch.rand(shape.head_dim, device=device) + 0.5
    angles = 6.3 * torch.rand(shape.tokens, shape.head_dim // 2, device=device)
    return weight, angles.cos(), angles.sin()


def in_dtype(dtype: torch.dtype, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The tables as the compositions take them."""
    return weight.to(dtype), cos[:, None].to(dtype), sin[:, None].to(dtype)


def concatenating_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
    stride: tuple[int, int, int],
    upsample: tuple[int, int],
    padding: str,
    pixels: bool,
    next_norm_weight: Tensor | None = None,
    keep_out: bool = True,
    share_state: bool = False,
) -> tuple[Tensor, ...]:
    """`causal_conv3d` as public video autoencoders write it: norm and SiLU by themselves, past
    frames concatenated in front, padding made around that, a copy of the last frames kept."""
    if stride != (1, 1, 1) or padding != "zeros" or pixels:
        raise ValueError("concatenating_conv3d: expected no stride, zeros and no pixels")
    if norm_weight is not None:
        x = rms_norm(x, norm_weight)
    if silu:
        x = F.silu(x)
    kt, kh, kw = weight.shape[2:]
    time, space = upsample
    if time > 1:
        x = x.repeat_interleave(time, dim=2)
    past = kt - 1
    last = x[:, :, -past:].clone() if past else x[:, :, :0]
    if state is not None and past:
        if last.shape[2] < past:
            last = torch.cat([state[:, :, last.shape[2] - past :], last], dim=2)
        x = torch.cat([state, x], dim=2)
        past -= state.shape[2]  # fewer than kt - 1 behind a stream's first frame
    if space > 1:
        size = (x.shape[2], space * x.shape[3], space * x.shape[4])
        x = F.interpolate(x, size=size, mode="nearest-exact")
    x = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, past, 0))
    out = F.conv3d(x, weight, bias)
    out = out if residual is None else out + residual
    if next_norm_weight is None:
        return out, last
    return (out if keep_out else None), last, F.silu(rms_norm(out, next_norm_weight))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Over the channels of x (B, C, T, H, W), as those autoencoders compute it."""
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * weight.view(-1, 1, 1, 1)
