"""Fast CPU implementation: PyTorch's own LayerNorm, and as few passes as possible around it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import dense, widen
from .ref import by_group, group_count, like_inputs


def add(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return x + update
    x, update = (by_group(y, gate.shape[1]) for y in (x, update))
    return torch.addcmul(x, gate[:, :, None], update).flatten(1, 2)


def norm(x, shift, scale, weight, bias, eps):
    width = x.shape[-1:]
    if scale is None:
        return F.layer_norm(x, width, weight, bias, eps)
    if weight is None and bias is None and scale.shape[:2] == (1, 1):
        return F.layer_norm(x, width, (1 + scale).view(width), shift.reshape(width), eps)
    normed = by_group(F.layer_norm(x, width, weight, bias, eps), scale.shape[1])
    return torch.addcmul(shift[:, :, None], normed, (1 + scale)[:, :, None]).flatten(1, 2)


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
