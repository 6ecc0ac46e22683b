"""Specification: gated residual, LayerNorm, modulation, forward and backward.

    r = x + gate update                 r^ = (r - mean(r)) / sqrt(var(r) + eps)
    a = weight r^ + bias                normed = (1 + scale) a + shift

and backwards, with da = (1 + scale) dnormed and g = weight da,

    dr = dresidual + (g - mean(g) - r^ mean(g r^)) / sqrt(var(r) + eps)
    dx = dr             dupdate = gate dr           dgate = sum dr update
    dshift = sum dnormed                dscale = sum dnormed a
    dweight = sum da r^                 dbias = sum da

A mean runs over the width. A sum of modulation runs over the tokens of a group: group g of gate,
shift and scale (B, G, D) serves tokens g L / G to (g + 1) L / G. Everything is computed in the
dtype of x (see block_causal_attention/ref.py); the norm reads r as it is returned, rounded.
"""

import torch
from torch import Tensor

from ..precision import dense, widen


def group_count(*modulation: Tensor | None) -> int:
    """Return the number of groups of gate, shift and scale, 1 if there are none."""
    return next((x.shape[1] for x in modulation if x is not None), 1)


def by_group(x: Tensor, groups: int) -> Tensor:
    """Return x (B, L, D) as (B, groups, L / groups, D), a view."""
    return x.unflatten(1, (groups, x.shape[1] // groups))


def add(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """Return x + gate update."""
    if gate is None:
        return x + update
    gated = gate[:, :, None] * by_group(update, gate.shape[1])
    return x + gated.flatten(1, 2)


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x with mean 0 and variance 1 over its last dimension, and 1 / deviation."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def affine(hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    hat = hat if weight is None else hat * weight
    return hat if bias is None else hat + bias


def norm(x, shift, scale, weight, bias, eps):
    normed = affine(normalise(x, eps)[0], weight, bias)
    if scale is None:
        return normed
    normed = by_group(normed, scale.shape[1])
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def backward(dnormed, dresidual, residual, update, gate, shift, scale, weight, bias, eps):
    groups = group_count(gate, scale)
    dnormed = by_group(dnormed, groups)
    hat, inverse = normalise(by_group(residual, groups), eps)
    dupdate = dgate = dshift = dscale = dweight = dbias = None
    if scale is not None:
        dshift, dscale = dnormed.sum(2), (dnormed * affine(hat, weight, bias)).sum(2)
        dnormed = dnormed * (1 + scale[:, :, None])
    if bias is not None:
        dbias = dnormed.sum((0, 1, 2))
    if weight is not None:
        dweight = (dnormed * hat).sum((0, 1, 2))
        dnormed = dnormed * weight
    mean, projection = (y.mean(-1, keepdim=True) for y in (dnormed, dnormed * hat))
    dx = inverse * (dnormed - mean - hat * projection)
    if dresidual is not None:
        dx = dx + by_group(dresidual, groups)
    if gate is not None:
        dupdate = (gate[:, :, None] * dx).flatten(1, 2)
        dgate = (dx * by_group(update, groups)).sum(2)
    return dx.flatten(1, 2), dupdate, dgate, dshift, dscale, dweight, dbias


def reference_forward(x, update, gate, shift, scale, weight, bias, eps, dtype):
    residual = x.new_empty(0)
    if update is not None:
        residual = x = dense(add(*widen(x, update, gate)), x.dtype)
    return residual, dense(norm(*widen(x, shift, scale, weight, bias), eps), dtype)


def reference_backward(dnormed, dresidual, *tensors_and_eps):
    gradients = backward(*widen(dnormed, dresidual, *tensors_and_eps))
    return like_inputs(gradients, *tensors_and_eps[:-1])


def like_inputs(gradients, *tensors):
    """Return the gradients contiguous in the dtypes of their tensors, for None one of size 0."""
    return tuple(
        tensors[0].new_empty(0) if gradient is None else dense(gradient, tensor.dtype)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    )
