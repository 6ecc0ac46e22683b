"""CPU implementation: the prologue writes straight behind the past frames, then one ATen conv.

The prologue is memory-bound, so it works in place on one buffer of at least float32, and the
backward pass recomputes it instead of keeping it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
    stride: list[int],
    padding: str,
) -> tuple[Tensor, Tensor]:
    past = weight.shape[2] - 1
    buffer = _buffer(x, weight, state, norm_weight, eps, silu, padding)
    new_state = buffer[:, :, buffer.shape[2] - past :].clone()
    # oneDNN's float32 forward is about a quarter faster on an input padded beforehand; its
    # bfloat16 forward and its backward passes are not.
    beforehand = padding == "replicate" or x.dtype == torch.float32
    padded, left = _pad_space(buffer, weight, padding, beforehand)
    out = F.conv3d(padded, weight, bias, stride, left)
    if residual is not None:
        out += residual
    return out, new_state


def causal_conv3d_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    stride: list[int],
    padding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and norm_weight (empty without one)."""
    past = weight.shape[2] - 1
    buffer = _buffer(x, weight, state, norm_weight, eps, silu, padding)
    padded, left = _pad_space(buffer, weight, padding, beforehand=padding == "replicate")
    grad, dweight, dbias = torch.ops.aten.convolution_backward(
        dout.contiguous(),
        padded,
        weight,
        [weight.shape[0]],
        stride,
        left,
        [1, 1, 1],
        False,
        [0, 0, 0],
        1,
        [True, True, True],
    )
    if padding == "replicate":
        grad = torch.ops.aten.replication_pad3d_backward(grad, buffer, _margins(weight))
    dactive = grad[:, :, past:]
    if padding == "replicate" and state is None and past:
        dactive[:, :, 0] += grad[:, :, :past].sum(2)
    dx, dnorm_weight = _prologue_backward(dactive, x, norm_weight, eps, silu)
    return dx, dweight, dbias, dnorm_weight


def _buffer(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    padding: str,
) -> Tensor:
    """[past frames | prologue of x] along time, in the dtype of x."""
    past = weight.shape[2] - 1
    identity = norm_weight is None and not silu
    if past == 0 and identity:
        return x
    buffer = x.new_empty(*x.shape[:2], past + x.shape[2], *x.shape[3:])
    active = buffer[:, :, past:]
    active.copy_(x if identity else _prologue(x, norm_weight, eps, silu))
    if state is not None:
        buffer[:, :, :past].copy_(state)
    elif padding == "replicate":
        buffer[:, :, :past].copy_(active[:, :, :1])
    else:
        buffer[:, :, :past].zero_()
    return buffer


def _margins(weight: Tensor) -> list[int]:
    """Spatial padding in the order of `F.pad`, none in time."""
    kh, kw = weight.shape[3:]
    return [kw // 2, kw // 2, kh // 2, kh // 2, 0, 0]


def _pad_space(
    buffer: Tensor, weight: Tensor, padding: str, beforehand: bool
) -> tuple[Tensor, list[int]]:
    """Input of the convolution, and the zero padding that is left to it."""
    margins = _margins(weight)
    if not beforehand:
        return buffer, [0, margins[2], margins[0]]
    mode = "replicate" if padding == "replicate" else "constant"
    return F.pad(buffer, margins, mode) if any(margins) else buffer, [0, 0, 0]


def _widened(x: Tensor) -> Tensor:
    """A copy of x to compute in."""
    return x.to(wide(x.dtype), copy=True)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square across channels, and the inverse of that root."""
    normed = _widened(x)
    inverse = normed.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    return normed.mul_(inverse), inverse


def _per_channel(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype).view(1, -1, 1, 1, 1)


def _prologue(x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool) -> Tensor:
    if norm_weight is None:
        y = _widened(x)
    else:
        y, _ = _normalize(x, eps)
        y.mul_(_per_channel(norm_weight, y))
    return F.silu(y, inplace=True) if silu else y


def _prologue_backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and norm_weight. With n = x * r, r = rsqrt(mean(x^2) + eps), y = n * w:
    dx = r * (dy * w - n * mean(dy * w * n)) and dw = sum(dy * n).
    """
    grad = grad.to(wide(x.dtype))
    if norm_weight is None:
        if silu:
            grad = torch.ops.aten.silu_backward(grad, _widened(x))
        return grad.to(x.dtype, copy=True), x.new_empty(0)
    normed, inverse = _normalize(x, eps)
    scale = _per_channel(norm_weight, normed)
    if silu:
        grad = torch.ops.aten.silu_backward(grad, normed * scale)
    product = grad * normed
    dnorm_weight = product.sum((0, 2, 3, 4)).to(norm_weight.dtype)
    mean = product.mul_(scale).mean(1, keepdim=True)
    dx = torch.mul(grad, scale).sub_(normed.mul_(mean)).mul_(inverse)
    return dx.to(x.dtype), dnorm_weight
