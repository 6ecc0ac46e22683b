"""Fast CPU implementation: few passes over memory.

A rotation is a x + b roll(x, D / 2) with two small tables a and b, which queries and keys share.
The norm is one factor per head (or per token, if it runs across heads).
"""

import torch
from torch import Tensor

from ..precision import dense, widen

Tables = tuple[Tensor, Tensor] | None


def tables(cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype, inverse=False) -> Tables:
    """Return a and b (L, 1, D) such that rotate(x) = a x + b roll(x); None without angles.
    `inverse`: rotate by the negative angle."""
    if cos is None:
        return None
    cos, sin = cos.to(dtype), sin.to(dtype)
    ends = [sin, -sin] if inverse else [-sin, sin]
    return torch.cat([cos, cos], dim=-1)[:, None], torch.cat(ends, dim=-1)[:, None]


def rotate(x: Tensor, rotation: Tables) -> Tensor:
    """Return x rotated, contiguous and in memory of its own."""
    if rotation is None:
        return x.clone(memory_format=torch.contiguous_format)
    a, b = rotation
    return torch.roll(x, x.shape[-1] // 2, dims=-1).mul_(b).addcmul_(x, a)


def inverse_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=tuple(range(-weight.dim(), 0)), keepdim=True)
    return norm.square_().div_(weight.numel()).add_(eps).rsqrt_()


def norm_rope(x, weight, rotations, eps, dtype) -> list[Tensor]:
    """Return x normed once and rotated by each of `rotations`, contiguous."""
    if weight is not None:
        x = (x * inverse_rms(x, weight, eps)).mul_(weight)
    return [dense(rotate(x, rotation), dtype) for rotation in rotations]


def norm_rope_backward(gradients, x, weight, rotations, eps) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight, from one incoming gradient per rotation."""
    dn = None
    for dy, rotation in zip(gradients, rotations, strict=True):
        turned = rotate(dy, rotation)
        dn = turned if dn is None else dn.add_(turned)
    if weight is None:
        return dn, x.new_empty(0)
    weight = weight.to(x.dtype)
    factor = inverse_rms(x, weight, eps)
    hat = x * factor
    product = dn * hat
    projection = torch.tensordot(product, weight, weight.dim()).div_(-weight.numel())
    dx = dn.mul_(weight).addcmul_(hat, projection.view_as(factor)).mul_(factor)
    return dx, product.sum(tuple(range(x.dim() - weight.dim())))


def forward(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps):
    dtype = q.dtype
    q, k = widen(q, k)
    rotations = [tables(cos, sin, q.dtype)]
    (k,) = norm_rope(k, k_weight, rotations, eps, dtype)
    if cos_sink is not None:
        rotations.append(tables(cos_sink, sin_sink, q.dtype))
    q, *q_sink = norm_rope(q, q_weight, rotations, eps, dtype)
    return q, k, q_sink[0] if q_sink else q.new_empty(0)


def backward(dq, dk, dq_sink, q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps):
    dtype = q.dtype
    dq, dk, dq_sink, q, k = widen(dq, dk, dq_sink, q, k)
    gradients, rotations = [dq], [tables(cos, sin, q.dtype, inverse=True)]
    if dq_sink is not None:
        gradients.append(dq_sink)
        rotations.append(tables(cos_sink, sin_sink, q.dtype, inverse=True))
    dq, dq_weight = norm_rope_backward(gradients, q, q_weight, rotations, eps)
    dk, dk_weight = norm_rope_backward([dk], k, k_weight, rotations[:1], eps)
    return (
        dense(dq, dtype),
        dense(dk, dtype),
        dq_weight.to(dtype if q_weight is None else q_weight.dtype),
        dk_weight.to(dtype if k_weight is None else k_weight.dtype),
    )
