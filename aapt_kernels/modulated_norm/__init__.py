"""Gated residual, LayerNorm and modulation in one op: what adaLN does between two products.

x, normed = modulated_norm(x, shift, scale, update=attended, gate=gate)
x, values, scales = modulated_norm_e4m3(x, shift, scale, update=attended, gate=gate)
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
from ..precision import autocasts
from ..quantise_rows.ref import empty, rounded
from ..schemas import ops
from . import cpu, ref


def modulated_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm x over its width, then modulate: layer_norm(x, weight, bias) (1 + scale) + shift
    (docs/method.md#2). With an update, first add gate * update to x.

    x and update (B, L, D). shift, scale and gate (B, G, D): G divides L, and group g serves tokens
    g L / G to (g + 1) L / G, so (B, 1, D) serves a whole clip and (B, frames, D) each frame. weight
    and bias (D,), of an affine norm. All but x are optional: shift and scale together, and gate
    with an update. Computed in float32, float64 for float64; the other dtypes may differ from one
    another.

    Returns normed, or (x + gate * update, normed) with an update; both in the dtype of x. Under
    autocast the sum has the widest dtype of its terms, as PyTorch's own, and normed has autocast's
    dtype, for the product that reads it.
    Differentiable once; on the reference again.

    Raises ValueError or TypeError if the arguments do not fit each other, and NotImplementedError
    in forward-mode differentiation.
    """
    tensors = {"update": update, "gate": gate, "shift": shift, "scale": scale}
    tensors |= {"weight": weight, "bias": bias}
    x, dtype = _prepare("modulated_norm", x, tensors)
    residual, normed = ops.modulated_norm.default(x, *tensors.values(), eps, dtype)
    return normed if update is None else (residual, normed)


def modulated_norm_e4m3(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """Round what `modulated_norm` returns to e4m3, as `quantise_rows` does, in the same launch
    (docs/method.md#18).

    Arguments, sums and errors are those of `modulated_norm`. It has no gradient: RuntimeError for a
    tensor that requires one.

    Returns (values, scales), or (x + gate * update, values, scales) with an update: values
    (B, L, D) float8_e4m3fn, and scales (groups of 128 channels, B L) float32. They are bit for bit
    those of the two operators one after the other.
    """
    tensors = {"update": update, "gate": gate, "shift": shift, "scale": scale}
    tensors |= {"weight": weight, "bias": bias}
    check_no_grad("modulated_norm_e4m3", {"x": x, **tensors})
    x, dtype = _prepare("modulated_norm_e4m3", x, tensors)
    residual, values, scales = ops.modulated_norm_e4m3.default(x, *tensors.values(), eps, dtype)
    return (values, scales) if update is None else (residual, values, scales)


def _prepare(op: str, x: Tensor, tensors: dict[str, Tensor | None]) -> tuple[Tensor, torch.dtype]:
    """Check the arguments of an op; return x as the residual sum has it, and the dtype of normed,
    under autocast as it asks."""
    dtype = x.dtype
    if autocasts(x.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        for term in (tensors["update"], tensors["gate"]):
            x = x if term is None else x.to(torch.promote_types(x.dtype, term.dtype))
    others = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check_arguments(x, others)
    check_no_tangent(op, {"x": x, **others})
    return x, dtype


def _check_arguments(x: Tensor, others: dict[str, Tensor]) -> None:
    """Check x, and the others that are given: ValueError or TypeError."""
    rows = batch, length, width = check_shape("x", x, ("batch", "length", "width"))
    if ("shift" in others) != ("scale" in others):
        given = "shift" if "shift" in others else "scale"
        raise ValueError(f"shift, scale: expected both or neither, got {given} only")
    if "gate" in others and "update" not in others:
        raise ValueError("gate: expected an update with it, got update=None")
    group_rows = None
    for name, tensor in others.items():
        if name == "update":
            check_shape(name, tensor, rows, "this x")
        elif name in ("weight", "bias"):
            check_shape(name, tensor, (width,), "this x")
        elif group_rows is not None:
            check_shape(name, tensor, group_rows, "this x")
        else:
            group_rows = check_shape(name, tensor, (batch, "groups", width), "this x")
            if group_rows[1] < 1 or length % group_rows[1] != 0:
                raise ValueError(
                    f"{name}: expected a number of groups that divides the {length} tokens of x, "
                    f"got {group_rows[1]}"
                )
    check_precision(x, others)
    tensors = {"x": x, **others}
    check_dense_rows(tensors)
    check_device(tensors)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@register_fake("modulated_norm")
def _(x, update, gate, shift, scale, weight, bias, eps, dtype):
    return x.new_empty(0) if update is None else _like(x), _like(x, dtype)


@register_fake("modulated_norm_e4m3")
def _(x, update, gate, shift, scale, weight, bias, eps, dtype):
    return x.new_empty(0) if update is None else _like(x), *empty(x)


@register_fake("modulated_norm_backward")
def _(dnormed, dresidual, residual, update, gate, shift, scale, weight, bias, eps):
    return empty_gradients(residual, update, gate, shift, scale, weight, bias)


def empty_gradients(residual, update, gate, *others) -> list[Tensor]:
    """Return memory for the results of the backward op, in the order of the tensors; none for a
    tensor that is None, nor for an update without gate, whose gradient is that of x."""
    tensors = (residual, None if gate is None else update, gate, *others)
    return [residual.new_empty(0) if x is None else _like(x) for x in tensors]


def _save(ctx, inputs, output):
    x, update, *others, ctx.eps, _ = inputs
    ctx.save_for_backward(x if update is None else output[0], update, *others)
    ctx.set_materialize_grads(False)


def _backward(ctx, dresidual, dnormed):
    residual, update, gate, *others = ctx.saved_tensors
    check_no_tangent("modulated_norm_backward", {"dresidual": dresidual, "dnormed": dnormed})
    if dnormed is None:
        dnormed = torch.zeros_like(residual)
    dx, dupdate, *gradients = ops.modulated_norm_backward.default(
        dnormed,
        None if update is None else dresidual,
        residual,
        None if gate is None else update,
        gate,
        *others,
        ctx.eps,
    )
    if update is not None and gate is None:
        dupdate = dx.to(update.dtype)
    tensors = (residual, update, gate, *others)
    gradients = (dx, dupdate, *gradients)
    return *(None if x is None else d for x, d in zip(tensors, gradients, strict=True)), None, None


implement(
    "modulated_norm", reference=ref.reference_forward, cpu=cpu.forward, triton=deferred(__name__)
)
implement(
    "modulated_norm_backward",
    reference=ref.reference_backward,
    cpu=cpu.backward,
    triton=deferred(__name__, "backward"),
)
implement(
    "modulated_norm_e4m3",
    reference=rounded(ref.reference_forward),
    cpu=rounded(cpu.forward),
    triton=deferred(__name__, "forward_e4m3"),
)
register_autograd("modulated_norm", _backward, _save)
