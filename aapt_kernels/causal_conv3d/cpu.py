"""CPU implementation: the prologue writes straight behind the past frames, then ATen convolves.

Frames lie one after another in memory, (batch, time, channels, height, width). So the kt frames
that an output frame reads are one picture of kt * channels channels, where they lie, and a 2D
convolution does the work: ATen's 3D convolution takes a slow path for small float32 inputs. The
backward pass recomputes the prologue instead of keeping it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from .ref import frames_to_skip, layout, past_frames, repeat, to_pixels


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
    upsample: list[int],
    replicate: bool,
    pixels: bool,
    next_norm_weight: Tensor | None,
    keep_out: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kt, kh, kw = weight.shape[2:]
    buffer, past = _buffer(x, weight, state, norm_weight, eps, silu, upsample, replicate)
    memory_format = layout(x)
    new_state = x.new_empty(0)
    if keep_state:
        last = buffer[:, :, buffer.shape[2] - past :]
        new_state = torch.empty(last.shape, dtype=x.dtype, memory_format=memory_format)
        if past:
            new_state.copy_(last)
    if max(upsample) > 1:
        buffer = repeat(buffer, kt, upsample, state is None)
    frames = buffer.transpose(1, 2)
    margins = [kh // 2, kw // 2]
    if replicate and any(margins):
        frames, margins = F.pad(frames, _margins(weight), "replicate"), [0, 0]

    out = _convolve(frames, weight, bias, stride, margins, residual, memory_format)
    active = x.new_empty(0)
    if next_norm_weight is not None:
        active = torch.empty_like(out)
        _write_active(active, out, next_norm_weight, eps, True)
        out = out if keep_out else x.new_empty(0)
    return to_pixels(out) if pixels else out, new_state, active


def _convolve(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    margins: list[int],
    residual: Tensor | None,
    memory_format: torch.memory_format,
) -> Tensor:
    """frames (batch, time, channels, height, width), the past included."""
    kt, plane = weight.shape[2], (stride[1:], margins)
    batch, time, _, *size = frames.shape
    if kt > 1:
        flat_weight = weight.transpose(1, 2).flatten(1, 2)  # (out, kt * in_channels, kh, kw)
    else:
        flat_weight = weight[:, :, 0]
    if time == kt:  # one frame
        window = frames.flatten(1, 2) if kt > 1 else frames[:, 0]
        out = F.conv2d(window, flat_weight, bias, *plane).unsqueeze(2)
        out = out.contiguous(memory_format=memory_format)
        return out if residual is None else out.add_(residual)

    starts = range(0, time - kt + 1, stride[0])
    size = [
        (n + 2 * margin - k) // step + 1
        for n, margin, k, step in zip(size, margins, weight.shape[3:], stride[1:], strict=True)
    ]
    shape = (batch, len(weight), len(starts), *size)
    out = torch.empty(shape, dtype=frames.dtype, memory_format=memory_format)
    by_frame = out.transpose(1, 2)
    if kt == 1:
        by_frame.copy_(_convolve_frames(frames[:, :: stride[0]], flat_weight, bias, *plane))
    else:
        pairs = len(starts) // 2 if _pairs_pay(weight, stride) else 0
        if pairs:
            _convolve_pairs(
                by_frame[:, : 2 * pairs], frames[:, : 2 * pairs + 2], weight, bias, *plane
            )
        for t, start in list(enumerate(starts))[2 * pairs :]:
            window = frames[:, start : start + kt].flatten(1, 2)
            by_frame[:, t] = F.conv2d(window, flat_weight, bias, *plane)
    return out if residual is None else out.add_(residual)


def _convolve_frames(
    frames: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], margins: list[int]
) -> Tensor:
    """A 2D convolution of every frame of (batch, time, channels, height, width)."""
    out = F.conv2d(frames.flatten(0, 1), weight, bias, stride, margins)
    return out.unflatten(0, frames.shape[:2])


def _pairs_pay(weight: Tensor, stride: list[int]) -> bool:
    """Sums of frames round too much in 16 bits."""
    exact = weight.dtype == wide(weight.dtype)
    return exact and weight.shape[2] == 3 and stride[0] == 1


def _convolve_pairs(
    out: Tensor,
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    margins: list[int],
) -> None:
    """Writes two output frames a, b at a time from frames f0 to f3, with four 2D convolutions, not
    six (Winograd's F(2, 3) in time):

        a = w0 f0 + w1 f1 + w2 f2 = m0 + m1 + m2,   m0 = w0 (f0 - f2),  m3 = w2 (f3 - f1),
        b = w0 f1 + w1 f2 + w2 f3 = m1 - m2 + m3,   m1, m2 = (w0 ± w1 + w2) / 2 (f2 ± f1)

    m1 is in both, and so brings the bias.
    """
    f0, f1, f2, f3 = frames[:, :-2:2], frames[:, 1:-2:2], frames[:, 2::2], frames[:, 3::2]
    w0, w1, w2 = weight.unbind(2)
    middle = (w0 + w2) / 2
    pictures = f0 - f2, f2 + f1, f2 - f1, f3 - f1
    weights = w0, middle + w1 / 2, middle - w1 / 2, w2
    if out.shape[1] == 2:  # one pair is little work: one call
        channels = len(weight)
        bias = None if bias is None else F.pad(bias, (channels, 2 * channels))
        picture, stacked = torch.cat(pictures, dim=2)[:, 0], torch.cat(weights)
        products = F.conv2d(picture, stacked, bias, stride, margins, groups=4)
        m0, m1, m2, m3 = products.unsqueeze(1).chunk(4, dim=2)
    else:
        biases = None, bias, None, None
        m0, m1, m2, m3 = (
            _convolve_frames(*product, stride, margins)
            for product in zip(pictures, weights, biases, strict=True)
        )
    torch.add(m0.add_(m1), m2, out=out[:, ::2])
    torch.sub(m3.add_(m1), m2, out=out[:, 1::2])


def causal_conv3d_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    stride: list[int],
    upsample: list[int],
    replicate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and norm_weight (empty without one)."""
    buffer, past = _buffer(x, weight, state, norm_weight, eps, silu, upsample, replicate)
    kt, kh, kw = weight.shape[2:]
    frames = repeat(buffer, kt, upsample, state is None)
    padded, left = frames, [0, kh // 2, kw // 2]
    if replicate:
        padded, left = F.pad(frames, _margins(weight), "replicate"), [0, 0, 0]
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
    if replicate:
        grad = torch.ops.aten.replication_pad3d_backward(grad, frames, _margins(weight))
    grad = _sum_copies(grad, frames_to_skip(kt, upsample[0], state is None), upsample)
    dactive = grad[:, :, past:]
    if replicate and state is None and past:
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
    upsample: list[int],
    replicate: bool,
) -> tuple[Tensor, int]:
    """[past frames | prologue of x] along time, in the dtype of x, frame after frame in memory; and
    how many past frames there are."""
    past = past_frames(weight.shape[2], upsample[0])
    identity = norm_weight is None and not silu
    if past == 0 and identity:
        return x, past
    batch, channels, time, *size = x.shape
    buffer = x.new_empty(batch, past + time, channels, *size).transpose(1, 2)
    active = buffer[:, :, past:]
    _write_active(active, x, norm_weight, eps, silu)
    if state is not None:
        buffer[:, :, :past].copy_(state)
    elif replicate:
        buffer[:, :, :past].copy_(active[:, :, :1])
    else:
        buffer[:, :, :past].zero_()
    return buffer, past


def _sum_copies(grad: Tensor, skipped: int, upsample: list[int]) -> Tensor:
    """Gradient of what `repeat` copies."""
    time, space = upsample
    if space > 1:
        grad = grad.unflatten(4, (-1, space)).sum(5).unflatten(3, (-1, space)).sum(4)
    if time > 1:
        grad = F.pad(grad, (0, 0, 0, 0, skipped, 0)).unflatten(2, (-1, time)).sum(3)
    return grad


def _margins(weight: Tensor) -> list[int]:
    """Spatial padding in the order of `F.pad`, none in time."""
    kh, kw = weight.shape[3:]
    return [kw // 2, kw // 2, kh // 2, kh // 2, 0, 0]


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


def _write_active(
    active: Tensor, x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool
) -> None:
    """Norm and SiLU of x into `active`, in place where that is wide enough to compute in."""
    y = active if active.dtype == wide(x.dtype) else torch.empty_like(x, dtype=wide(x.dtype))
    if norm_weight is None:
        y.copy_(x)
    else:
        inverse = x.to(y.dtype).square().mean(1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, inverse, out=y).mul_(_per_channel(norm_weight, y))
    if silu:
        F.silu(y, inplace=True)
    if y is not active:
        active.copy_(y)


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
