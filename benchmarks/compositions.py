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
