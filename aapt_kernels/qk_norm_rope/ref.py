"""Specification: RMSNorm, then rotary position, forward and backward.

    x^ = x / sqrt(mean(x^2) + eps)      n = weight x^
    y1 = n1 cos - n2 sin                y2 = n1 sin + n2 cos        with n = [n1 | n2], halves of D

and backwards, with dn the rotation of dy by the negative angle and g = weight dn,

    dweight = sum dn x^                 dx = (g - x^ mean(g x^)) / sqrt(mean(x^2) + eps)

A mean runs over the dimensions of the weight: (D,), one norm per head, or (H, D), one per token.
Everything is computed in the dtype of x (see block_causal_attention/ref.py).
"""

import torch
from torch import Tensor

from ..precision import widen


def normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * inverse_rms(x, weight, eps) * weight.to(x.dtype)


def inverse_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(mean(x.square(), weight) + eps)


def mean(x: Tensor, weight: Tensor) -> Tensor:
    return x.mean(tuple(range(-weight.dim(), 0)), keepdim=True)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotate x (B, L, H, D) by the angles of cos and sin (L, D / 2)."""
    if cos is None:
        return x
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def normalise_backward(
    dn: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return dn, x.new_empty(0)
    inverse = inverse_rms(x, weight, eps)
    hat = x * inverse
    g = dn * weight.to(x.dtype)
    dx = inverse * (g - hat * mean(g * hat, weight))
    return dx, (dn * hat).sum(tuple(range(x.dim() - weight.dim())))


def forward(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps):
    q, k = normalise(q, q_weight, eps), normalise(k, k_weight, eps)
    q_sink = q.new_empty(0) if cos_sink is None else rotate(q, cos_sink, sin_sink)
    return rotate(q, cos, sin), rotate(k, cos, sin), q_sink


def backward(dq, dk, dq_sink, q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps):
    def turned_back(dx, cos, sin):
        return dx if cos is None else rotate(dx, cos, -sin)

    dn = turned_back(dq, cos, sin)
    if dq_sink is not None:
        dn = dn + turned_back(dq_sink, cos_sink, sin_sink)
    dq, dq_weight = normalise_backward(dn, q, q_weight, eps)
    dk, dk_weight = normalise_backward(turned_back(dk, cos, sin), k, k_weight, eps)
    return dq, dk, dq_weight, dk_weight


def reference_forward(q, *arguments):
    return tuple(_fresh(x, q.dtype) for x in forward(*widen(q, *arguments)))


def reference_backward(dq, *arguments):
    dtype, (q_weight, k_weight) = dq.dtype, arguments[4:6]
    dq, dk, dq_weight, dk_weight = backward(*widen(dq, *arguments))
    return (
        _fresh(dq, dtype),
        _fresh(dk, dtype),
        dq_weight.to(dtype if q_weight is None else q_weight.dtype),
        dk_weight.to(dtype if k_weight is None else k_weight.dtype),
    )


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy, because an op never returns its input: x without norm and
    rotation."""
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)
