"""Causal 3D convolution with a fused prologue and a streaming state (docs/method.md#9)."""

import torch
from torch import Tensor

from ..backend import choose, deferred, implement, register_autograd, register_fake
from ..checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_no_grad,
    check_no_tangent,
    check_shape,
)
from ..precision import autocasts, follow_autocast
from ..schemas import ops
from . import cpu, e4m3, ref, sm90
from .frames import memory_format_of, out_size, past_frames

PADDINGS = ("zeros", "replicate")
MAX_NORMED_CHANNELS = 128  # that a tile of a kernel holds, and so can norm in its epilogue


def causal_conv3d(
    x: Tensor,  # (batch, in_channels, time, height, width)
    weight: Tensor,  # (out_channels, in_channels, kt, kh, kw), kh and kw odd
    bias: Tensor | None = None,  # (out_channels,)
    *,
    state: Tensor | None = None,  # (batch, in_channels, (kt - 1) / upsample[0], height, width)
    norm_weight: Tensor | None = None,  # (in_channels,)
    eps: float = 1e-6,
    silu: bool = False,
    residual: Tensor | None = None,  # like the output
    stride: tuple[int, int, int] = (1, 1, 1),
    upsample: tuple[int, int] = (1, 1),
    padding: str = "zeros",
    pixels: bool = False,
    next_norm_weight: Tensor | None = None,  # (out_channels,)
    keep_out: bool = True,
    share_state: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return conv3d(silu(rms_norm(x) * norm_weight)) + bias + residual, and the state for the next
    chunk.

    Output frame t reads input frames up to t * stride[0] only. The norm takes the root mean square
    over the channels of each pixel; without `norm_weight` there is no norm. In space the output has
    ceil(size / stride) pixels.

    `upsample` (time, space) repeats every activated frame and pixel, nearest neighbours, before
    the convolution; kernels fold that into the weights. A stream's first frame yields one frame,
    that of its last copy.

    `state` holds the last normed and activated input frames of the chunk before: as many as kt - 1
    frames span at the output's rate. None starts the stream; `padding` then chooses between zeros
    and copies of the first frame, and beyond the edges of a frame between zeros and copies of the
    edge. Chunks of any length add up to the whole clip. A stride in time takes no state, because
    its chunks would not.

    `next_norm_weight` asks for a third result, silu(rms_norm(out) * next_norm_weight): the x of the
    next convolution, normed and activated. `keep_out=False` returns None for an `out` that nothing
    else reads. `fuses_next_norm` says if this saves a pass.

    `share_state` lets the returned state be a view of x, if x needs neither norm nor SiLU and is
    at most twice as long: x must then stay as it is.

    `pixels` returns uint8, round(127.5 out + 127.5), without a gradient. Output and state have
    their channels last in memory if x has, otherwise they are contiguous.

    Kernels fold and pack a weight that requires no gradient once, and again after a change in
    place; changes through `.data` they do not see. Warm up before capturing a CUDA graph.

    Differentiable once in x, weight, bias, norm_weight and residual, without `next_norm_weight`; on
    the reference again. Neither the given nor the returned state carries a gradient. Under autocast
    all tensors are cast to its dtype; otherwise they share one. Raises ValueError, or TypeError for
    a dtype, naming the argument that does not fit, and NotImplementedError in forward-mode
    differentiation.
    """
    x, weight, bias, state, norm_weight, residual, next_norm_weight = follow_autocast(
        x, weight, bias, state, norm_weight, residual, next_norm_weight
    )
    optional = bias, state, norm_weight, residual, next_norm_weight
    _check(x, weight, *optional, stride, upsample, padding)
    _check_next(x, weight, *optional, pixels, keep_out)
    given = dict(x=x, weight=weight, bias=bias, state=state, norm_weight=norm_weight)
    given |= dict(residual=residual, next_norm_weight=next_norm_weight)
    check_no_tangent("causal_conv3d", given)
    frames, past = x.shape[2], past_frames(weight.shape[2], upsample[0])
    shared = share_state and norm_weight is None and not silu and past <= frames <= 2 * past
    out, new_state, active = ops.causal_conv3d(
        x,
        weight,
        bias,
        state,
        norm_weight,
        eps,
        silu,
        residual,
        stride,
        upsample,
        padding == "replicate",
        pixels,
        next_norm_weight,
        keep_out,
        not shared,
    )
    if shared:
        new_state = x.detach()[:, :, frames - past :]
    if next_norm_weight is None:
        return out, new_state
    return out if keep_out else None, new_state, active


def causal_conv3d_e4m3(
    x: Tensor,  # (batch, in_channels, time, height, width)
    weight: Tensor,  # (out_channels, in_channels, kt, kh, kw) e4m3, kh and kw odd
    weight_scale: Tensor,  # (out_channels,) float32
    bias: Tensor | None = None,  # (out_channels,)
    *,
    state: Tensor | None = None,  # (batch, in_channels, (kt - 1) / upsample[0], height, width) e4m3
    norm_weight: Tensor | None = None,  # (in_channels,)
    eps: float = 1e-6,
    silu: bool = False,
    residual: Tensor | None = None,  # like the output
    upsample: tuple[int, int] = (1, 1),
    padding: str = "zeros",
    pixels: bool = False,
    next_norm_weight: Tensor | None = None,  # (out_channels,)
    keep_out: bool = True,
) -> tuple[Tensor | None, ...]:
    """Do `causal_conv3d` in 8 bits: round silu(rms_norm(x) * norm_weight) to float8_e4m3fn,
    multiply by e4m3 weights, sum in float32, and multiply each output channel by its scale
    (docs/method.md#9).

    `causal_conv3d.e4m3.round_weight` makes weight and scales. The input has no scale: after a norm
    it is around 1, and what exceeds 448 in size becomes 448. x, bias, norm_weight, residual and the
    output share a dtype; the state is e4m3. Other arguments and results are those of
    `causal_conv3d`, without strides. It has no gradient.

    With `next_norm_weight` the third result, the x of the next convolution, is e4m3. x may be such
    a result: it is multiplied as it is, without norm_weight and silu, and the output has the dtype
    of the bias, which must be given.

    Triton needs sm_89 or later. Raises ValueError, TypeError or RuntimeError, naming the argument
    that does not fit, and NotImplementedError in forward-mode differentiation.
    """
    given = dict(x=x, bias=bias, norm_weight=norm_weight, residual=residual)
    given["next_norm_weight"] = next_norm_weight
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    stored = {"weight": weight} if state is None else {"weight": weight, "state": state}
    check_no_grad("causal_conv3d_e4m3", given | {"weight_scale": weight_scale})
    optional = bias, state, norm_weight, residual, next_norm_weight
    _check_shapes(x, weight, *optional, (1, 1, 1), upsample, padding)
    check_shape("weight_scale", weight_scale, weight.shape[:1], "this weight")
    _check_next(x, weight, *optional, pixels, keep_out)
    if x.dtype == e4m3.FORMAT:
        stored["x"] = given.pop("x")
        for name, fits, wanted, got in (
            ("bias", bias is not None, "a tensor", "none"),
            ("norm_weight", norm_weight is None, "none", "a tensor"),
            ("silu", not silu, "False", "True"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {wanted} with x of {x.dtype}, got {got}")
    check_dtype(given, [dtype for dtype in FLOATS if dtype != torch.float64])
    check_dtype(stored, [e4m3.FORMAT])
    check_dtype({"weight_scale": weight_scale}, [torch.float32])
    check_device(given | stored | {"weight_scale": weight_scale})
    check_no_tangent("causal_conv3d_e4m3", given)
    out, new_state, active = ops.causal_conv3d_e4m3.default(
        x,
        weight,
        weight_scale,
        bias,
        state,
        norm_weight,
        eps,
        silu,
        residual,
        upsample,
        padding == "replicate",
        pixels,
        next_norm_weight,
        keep_out,
    )
    if next_norm_weight is None:
        return out, new_state
    return out if keep_out else None, new_state, active


def fuses_next_norm(
    x: Tensor, weight: Tensor, *others: Tensor | None, op: str = "causal_conv3d"
) -> bool:
    """Return whether `next_norm_weight` of an op is cheaper than a norm before the next
    convolution: the kernel that takes x norms in its epilogue, and there is no gradient to compute.

    others: the op's further tensors that may require one, `next_norm_weight` among them. op:
    causal_conv3d or causal_conv3d_e4m3. Never under autocast, because another dtype than that of x
    then chooses the kernel.
    """
    out_channels = weight.shape[0]
    if autocasts(x.device):
        return False
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, *others)
    ):
        return False
    if out_channels > MAX_NORMED_CHANNELS or out_channels % 8:
        return False
    if x.device.type == "meta":  # no backend: shapes alone
        return False
    return choose(op, x) in ("cuda", "sim", "triton")


def _check_next(
    x, weight, bias, state, norm_weight, residual, next_norm_weight, pixels, keep_out
) -> None:
    if next_norm_weight is None:
        if not keep_out:
            raise ValueError("keep_out: expected True without next_norm_weight, got False")
        return
    if pixels:
        raise ValueError("pixels: expected False with next_norm_weight, got True")
    given = dict(x=x, weight=weight, bias=bias, norm_weight=norm_weight, residual=residual)
    given["next_norm_weight"] = next_norm_weight
    for name, tensor in given.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without gradient with next_norm_weight, got "
                f"requires_grad=True"
            )


def _check(x, weight, bias, state, *others) -> None:
    """Check the arguments of a convolution whose tensors share one dtype."""
    tensors = _check_shapes(x, weight, bias, state, *others)
    check_dtype(tensors)
    check_device(tensors)
    if state is not None and state.requires_grad:
        raise ValueError("state: expected a tensor without gradient, got requires_grad=True")


def _check_shapes(
    x, weight, bias, state, norm_weight, residual, next_norm_weight, stride, upsample, padding
) -> dict[str, Tensor]:
    """Check options and sizes; return the tensors that are given, by name."""
    if padding not in PADDINGS:
        raise ValueError(f"padding: expected one of {', '.join(PADDINGS)}, got {padding!r}")
    if len(stride) != 3 or not all(map(_counts, stride)):
        raise ValueError(f"stride: expected three integers >= 1, got {tuple(stride)}")
    if len(upsample) != 2 or not all(map(_counts, upsample)):
        raise ValueError(f"upsample: expected two integers >= 1, got {tuple(upsample)}")
    if max(upsample) > 1 and max(stride) > 1:
        raise ValueError(
            f"upsample: expected (1, 1) with stride {tuple(stride)}, got {tuple(upsample)}"
        )
    check_shape("x", x, ("batch", "in_channels", "time", "height", "width"))
    batch, channels, frames, height, width = x.shape
    if frames < 1:
        raise ValueError(f"x: expected at least one frame, got {tuple(x.shape)}")
    if min(channels, height, width) < 1:
        raise ValueError(f"x: expected at least one channel and pixel, got {tuple(x.shape)}")
    check_shape("weight", weight, ("out_channels", channels, "kt", "kh", "kw"), "the channels of x")
    out_channels, _, kt, kh, kw = weight.shape
    if min(out_channels, kt) < 1:
        raise ValueError(f"weight: expected out_channels and kt >= 1, got {tuple(weight.shape)}")
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"weight: expected odd kh and kw, got {tuple(weight.shape)}")

    optional = {
        "bias": (bias, (out_channels,)),
        "state": (state, (batch, channels, past_frames(kt, upsample[0]), height, width)),
        "norm_weight": (norm_weight, (channels,)),
        "residual": (
            residual,
            (batch, out_channels, *out_size(x, stride, upsample, state is None)),
        ),
        "next_norm_weight": (next_norm_weight, (out_channels,)),
    }
    given = {name: pair for name, pair in optional.items() if pair[0] is not None}
    steps = f"upsample {tuple(upsample)}" if max(upsample) > 1 else f"stride {tuple(stride)}"
    why = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and {steps}"
    for name, (tensor, shape) in given.items():
        check_shape(name, tensor, shape, why)
    if state is not None and stride[0] > 1:
        raise ValueError(f"state: expected None with a stride in time, got stride {tuple(stride)}")
    return {"x": x, "weight": weight} | {name: tensor for name, (tensor, _) in given.items()}


def _counts(number) -> bool:
    return hasattr(number, "__index__") and number >= 1


@register_fake("causal_conv3d")
def _(
    x,
    weight,
    bias,
    state,
    norm_weight,
    eps,
    silu,
    residual,
    stride,
    upsample,
    replicate,
    pixels,
    next_norm_weight,
    keep_out,
    keep_state,
):
    def empty(wanted, size, dtype=x.dtype):
        if not wanted:
            return x.new_empty(0)
        return torch.empty(size, dtype=dtype, device=x.device, memory_format=memory_format_of(x))

    size = (*x.shape[:1], *weight.shape[:1], *out_size(x, stride, upsample, state is None))
    past = past_frames(weight.shape[2], upsample[0])
    return (
        empty(keep_out, size, torch.uint8 if pixels else x.dtype),
        empty(keep_state, (*x.shape[:2], past, *x.shape[3:])),
        empty(next_norm_weight is not None, size),
    )


@register_fake("causal_conv3d_e4m3")
def _(
    x,
    weight,
    weight_scale,
    bias,
    state,
    norm_weight,
    eps,
    silu,
    residual,
    upsample,
    replicate,
    pixels,
    next_norm_weight,
    keep_out,
):
    def empty(wanted, channels, size, dtype):
        if not wanted:
            return x.new_empty(0)
        shape, memory = (x.shape[0], channels, *size), memory_format_of(x)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory)

    size = out_size(x, (1, 1, 1), upsample, state is None)
    past = past_frames(weight.shape[2], upsample[0])
    dtype = torch.uint8 if pixels else e4m3.out_dtype(x, bias)
    return (
        empty(keep_out, weight.shape[0], size, dtype),
        empty(True, x.shape[1], (past, *x.shape[3:]), e4m3.FORMAT),
        empty(next_norm_weight is not None, weight.shape[0], size, e4m3.FORMAT),
    )


@register_fake("causal_conv3d_backward")
def _(dout, x, weight, state, norm_weight, eps, silu, stride, upsample, replicate):
    dnorm_weight = x.new_empty(0 if norm_weight is None else x.shape[1])
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        weight.new_empty(len(weight)),
        dnorm_weight,
    )


def _save(ctx, inputs, output):
    x, weight, bias, state, norm_weight, eps, silu, residual, *options, pixels, _, _, _ = inputs
    ctx.save_for_backward(x, weight, state, norm_weight)
    ctx.options = eps, silu, *options
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.mark_non_differentiable(*output if pixels else output[1:])


def _backward(ctx, dout, *_):
    saved = ctx.saved_tensors  # read once: checkpointing hands it out no second time
    check_no_tangent("causal_conv3d_backward", {"dout": dout})
    dx, dweight, dbias, dnorm_weight = ops.causal_conv3d_backward(dout, *saved, *ctx.options)
    return (
        dx,
        dweight,
        dbias if ctx.has_bias else None,
        None,
        None if saved[3] is None else dnorm_weight,
        None,
        None,
        dout if ctx.has_residual else None,
        *[None] * 7,
    )


implement(
    "causal_conv3d",
    limits={"cuda": sm90.limit, "triton": deferred(__name__, "limit")},
    cpu=cpu.causal_conv3d,
    reference=ref.causal_conv3d,
    triton=deferred(__name__),
    sm90=sm90.forward,
)
implement(
    "causal_conv3d_e4m3",
    limits={"triton": deferred(__name__, "limit_e4m3")},
    cpu=e4m3.emulated(cpu.causal_conv3d),
    reference=e4m3.emulated(ref.causal_conv3d),
    triton=deferred(__name__, "forward_e4m3"),
)
implement(
    "causal_conv3d_backward",
    cpu=cpu.causal_conv3d_backward,
    reference=ref.causal_conv3d_backward,
)
register_autograd("causal_conv3d", _backward, _save)
