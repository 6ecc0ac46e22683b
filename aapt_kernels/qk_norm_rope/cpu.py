"""Fast CPU implementation: few passes over memory.

The weight is folded into the rotation, which becomes a x + b roll(x, D / 2) with two small tables
a and b; the norm is one factor per head (or per token, if it runs across heads), applied last.
"""

import torch
from torch import Tensor

from ..precision import dense, wide


def tables(weight, cos, sin, like: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return a (L, 1 or H, D) and b such that rotate(weight x) = a x + b roll(x); b is None without
    angles. `inverse`: rotate by the negative angle."""
    weight = like.new_ones(like.shape[-1]) if weight is None else weight.to(like.dtype)
    if cos is None:
        return weight, None
    cos, sin = cos.to(like.dtype), sin.to(like.dtype)
    half = cos.shape[-1]
    if inverse:
        sin = -sin
    a = torch.cat([cos, cos], dim=-1)[:, None] * weight
    b = torch.cat([-sin, sin], dim=-1)[:, None] * weight.roll(half, -1)
    return a, b


def rotate(x: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    if b is None:
        return x * a
    return torch.roll(x, x.shape[-1] // 2, dims=-1).mul_(b).addcmul_(x, a)


def inverse_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=tuple(range(-weight.dim(), 0)), keepdim=True)
    return norm.square_().div_(weight.numel()).add_(eps).rsqrt_()


def norm_rope(x, weight, rotations, eps, dtype) -> list[Tensor]:
    """Return x normed once and rotated by each (cos, sin) of `rotations`, contiguous."""
    factor = None if weight is None else inverse_rms(x, weight, eps)
    turned = []
    for cos, sin in rotations:
        y = rotate(x, *tables(weight, cos, sin, x))
        y = y if factor is None else y.mul_(factor)
        turned.append(dense(y, dtype))
    return turned


def norm_rope_backward(gradients, x, weight, rotations, eps) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight, from one incoming gradient per rotation."""
    dn = None
    for dy, (cos, sin) in zip(gradients, rotations, strict=True):
        turned = rotate(dy, *tables(None, cos, sin, dy, inverse=True))
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
    dtype, q, k = q.dtype, q.to(wide(q.dtype)), k.to(wide(k.dtype))
    rotations = [(cos, sin)] if cos_sink is None else [(cos, sin), (cos_sink, sin_sink)]
    q, *q_sink = norm_rope(q, q_weight, rotations, eps, dtype)
    (k,) = norm_rope(k, k_weight, [(cos, sin)], eps, dtype)
    return q, k, q_sink[0] if q_sink else q.new_empty(0)


def backward(dq, dk, dq_sink, q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps):
    dtype, precise = q.dtype, wide(q.dtype)
    gradients, rotations = [dq.to(precise)], [(cos, sin)]
    if dq_sink is not None:
        gradients.append(dq_sink.to(precise))
        rotations.append((cos_sink, sin_sink))
    dq, dq_weight = norm_rope_backward(gradients, q.to(precise), q_weight, rotations, eps)
    dk, dk_weight = norm_rope_backward([dk.to(precise)], k.to(precise), k_weight, [(cos, sin)], eps)
    return (
        dense(dq, dtype),
        dense(dk, dtype),
        dq_weight.to(dtype if q_weight is None else q_weight.dtype),
        dk_weight.to(dtype if k_weight is None else k_weight.dtype),
    )
