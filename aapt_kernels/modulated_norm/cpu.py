"""Fast CPU implementation: PyTorch's own LayerNorm, and as few passes as possible around it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import dense, widen
from .ref import by_group, group_count, like_inputs


def by_token(x: Tensor, length: int) -> Tensor:
    """Return modulation x (B, G, D) with a row per token, or one row for all of them."""
    return x if x.shape[1] == 1 else x.repeat_interleave(length // x.shape[1], dim=1)


def add(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    return x + update if gate is None else torch.addcmul(x, by_token(gate, x.shape[1]), update)


def norm(x, shift, scale, weight, bias, eps):
    width = x.shape[-1:]
    if scale is None:
        return F.layer_norm(x, width, weight, bias, eps)
    scale = 1 + scale
    if weight is None and bias is None and scale.shape[:2] == (1, 1):
        return F.layer_norm(x, width, scale.view(width), shift.reshape(width), eps)
    normed = F.layer_norm(x, width, weight, bias, eps)
    return torch.addcmul(by_token(shift, x.shape[1]), normed, by_token(scale, x.shape[1]))


def forward(x, update, gate, shift, scale, weight, bias, eps, dtype):
    residual = x.new_empty(0)
    if update is not None:
        residual = x = dense(add(*widen(x, update, gate)), x.dtype)
    return residual, dense(norm(*widen(x, shift, scale, weight, bias), eps), dtype)


def backward(dnormed, dresidual, *tensors_and_eps):
    *tensors, eps = tensors_and_eps
    dnormed, dresidual, x, update, gate, shift, scale, weight, bias = widen(
        dnormed, dresidual, *tensors
    )
    dupdate = dgate = dshift = dscale = dweight = dbias = None
    width, groups = x.shape[-1:], group_count(gate, scale)
    hat, mean, inverse = torch.native_layer_norm(x, width, None, None, eps)
    if scale is not None:
        grouped = by_group(dnormed, groups)
        affine = hat if weight is None else hat * weight
        affine = affine if bias is None else affine + bias
        dshift = grouped.sum(2)
        dscale = (grouped * by_group(affine, groups)).sum(2)
        dnormed = (grouped * (1 + scale)[:, :, None]).flatten(1, 2)
    if bias is not None:
        dbias = dnormed.sum((0, 1))
    if weight is not None:
        dweight = (dnormed * hat).sum((0, 1))
        dnormed = dnormed * weight
    mask = (True, False, False)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormed, x, width, mean, inverse, None, None, mask
    )
    dx = dx if dresidual is None else dx.add_(dresidual)
    if gate is not None:
        grouped = by_group(dx, groups)
        dupdate = (gate[:, :, None] * grouped).flatten(1, 2)
        dgate = (grouped * by_group(update, groups)).sum(2)
    return like_inputs((dx, dupdate, dgate, dshift, dscale, dweight, dbias), *tensors)
