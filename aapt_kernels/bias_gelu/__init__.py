"""Bias and GELU in one op, between the two products of an MLP.

hidden = bias_gelu(F.linear(x, up.weight), up.bias)
values, scales = bias_gelu_e4m3(F.linear(x, up.weight), up.bias)
"""

import torch
from torch import Tensor

from ..backend import deferred, implement, register_autograd, register_fake
from ..checks import (
    check_dense_rows,
    check_device,
    check_no_grad,
    check_no_tangent,
    check_precision,
    check_shape,
)
from ..precision import follow_autocast
from ..quantise_rows.ref import empty, rounded
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
    _check_arguments("bias_gelu", x, bias)
    return ops.bias_gelu.default(x, bias)


def bias_gelu_e4m3(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Round what `bias_gelu` returns to e4m3, as `quantise_rows` does, in the same launch
    (docs/method.md#18).

    Arguments and errors are those of `bias_gelu`. It has no gradient: RuntimeError for a tensor
    that requires one.

    Returns values (..., L, D) float8_e4m3fn, and scales (groups of 128 channels, rows) float32, bit
    for bit those of the two operators one after the other.
    """
    (x,) = follow_autocast(x)
    check_no_grad("bias_gelu_e4m3", {"x": x, "bias": bias})
    _check_arguments("bias_gelu_e4m3", x, bias)
    return ops.bias_gelu_e4m3.default(x, bias)


def _check_arguments(op: str, x: Tensor, bias: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., rows, width), got {tuple(x.shape)}")
    check_shape("bias", bias, (x.shape[-1],), "this x")
    check_precision(x, {"bias": bias})
    check_dense_rows({"x": x, "bias": bias})
    check_device({"x": x, "bias": bias})
    check_no_tangent(op, {"x": x, "bias": bias})


@register_fake("bias_gelu")
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("bias_gelu_e4m3")
def _(x, bias):
    return empty(x)


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
implement(
    "bias_gelu_e4m3",
    reference=rounded(ref.reference_forward),
    cpu=rounded(cpu.forward),
    triton=deferred(__name__, "forward_e4m3"),
)
register_autograd("bias_gelu", _backward, _save)
