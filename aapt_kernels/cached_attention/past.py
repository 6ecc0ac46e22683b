"""Merge of attention to the newest frame with attention to a past of another dtype
(docs/method.md#16)."""

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, past: Tensor, past_lse: Tensor, exists: Tensor):
    """Merge attention to the keys besides the past, out (B, L, H, D) and lse (B, H, L), with
    attention to the past, if it exists (a scalar on the device). Return out and lse of all keys."""
    merged = torch.where(exists, torch.logaddexp(lse, past_lse), lse)
    weight = torch.where(exists, (past_lse - merged).exp(), 0).transpose(1, 2)[..., None]
    # Rounded weights change less than the rounding of the result, which needs no wider copies
    mixed = torch.lerp(out, past, weight.to(out.dtype))
    # A weight of zero would not hide NaN in a slot that nobody has written
    return torch.where(exists, mixed, out), merged
