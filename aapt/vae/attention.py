"""Attention of one head as wide as the channels of a frame."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The widest head of PyTorch's fast fused kernels: flash attention 256, cuDNN 128
MAX_FUSED_WIDTH = 256
# Of the float32 scores that exist at a time
SCORE_BYTES = 2**28


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v for q, k, v of (batch, frames, pixels, D).

    On a CUDA device a head wider than `MAX_FUSED_WIDTH` is left with slow fused kernels, so matrix
    products compute it; with a gradient to compute, or on a CPU, PyTorch's fused attention does.
    """
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.is_cuda and q.shape[-1] > MAX_FUSED_WIDTH and not trains:
        return attend_by_products(q, k, v, max(1, SCORE_BYTES // (4 * q.shape[:-1].numel())))
    return F.scaled_dot_product_attention(q, k, v)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Returns what `attend` returns, from two matrix products per block of at most `rows` pixels
    and a softmax in float32 between them."""
    size = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (batch * frames, pixels, D)
    blocks = -(-size[2] // rows)
    outs = []
    for part in q.tensor_split(blocks, dim=1):
        scores = wide_product(part, k.mT).mul_(size[-1] ** -0.5)
        outs.append(torch.bmm(scores.softmax(-1).to(v.dtype), v))
    return torch.cat(outs, dim=1).view(size) if blocks > 1 else outs[0].view(size)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the batched product in float32, or float64 for float64: sums are not rounded."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))
