"""Bias and GELU in one op, between the two products of an MLP.

hidden = bias_gelu(F.linear(x, up.weight), up.bias)
"""

import torch
from torch import Tensor

from ..backend import deferred, implement, register_autograd, register_fake
from ..checks import (
    check_dense_rows,
    check_device,
    check_no_tangent,
    check_precision,
    check_shape,
)
from ..precision import follow_autocast
from ..schemas import ops
from . import cpu, ref


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x + bias), in the tanh form (docs/method.md#2).

    x (..., L, D), the product without its bias; bias (D,), which may have another dtype. Computed
    in float32, float64 for float64. Under autocast x is cast to its dtype. The gradient of the
    bias comes with that of x, so that the backward pass reads the widest activation of a block once
    less. Differentiable once; on the reference again.

    Returns a contiguous tensor in the shape and dtype of x.

    Raises ValueError or TypeError if the arguments do not fit each other, and NotImplementedError
    in forward-mode differentiation.
    """
    (x,) = follow_autocast(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., rows, width), got {tuple(x.shape)}")
    check_shape("bias", bias, (x.shape[-1],), "this x")
    check_precision(x, {"bias": bias})
    check_dense_rows({"x": x, "bias": bias})
    check_device({"x": x, "bias": bias})
    check_no_tangent("bias_gelu", {"x": x, "bias": bias})
    return ops.bias_gelu.default(x, bias)


@register_fake("bias_gelu")
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("bias_gelu_backward")
def _(dout, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    x, bias = ctx.saved_tensors
    check_no_tangent("bias_gelu_backward", {"dout": dout})
    return ops.bias_gelu_backward.default(dout, x, bias)


implement("bias_gelu", reference=ref.reference_forward, cpu=cpu.forward, triton=deferred(__name__))
implement(
    "bias_gelu_backward",
    reference=ref.reference_backward,
    cpu=cpu.backward,
    triton=deferred(__name__, "backward"),
)
register_autograd("bias_gelu", _backward, _save)
