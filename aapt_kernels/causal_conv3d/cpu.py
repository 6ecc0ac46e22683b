"""CPU implementation: the prologue writes right after the past frames, then oneDNN convolves.

Frames have their channels last in memory, as oneDNN reads them, with the past in front: nothing is
concatenated. The backward pass recomputes the prologue instead of keeping it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from .frames import frames_to_skip, memory_format_of, past_frames, to_bytes
from .packed import PackedWeights

LAST = torch.channels_last_3d
DILATION = [1, 1, 1]
MAX_PACKED_PIXELS = 4096  # per convolution; packing for more saves less than 2 % and holds memory


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
    frames, past = _frames(x, weight, state, norm_weight, eps, silu, upsample, replicate)
    new_state = x.new_empty(0)
    if keep_state:
        last = frames[:, :, frames.shape[2] - past :]
        new_state = torch.empty(last.shape, dtype=x.dtype, memory_format=memory_format_of(x))
        if past:
            new_state.copy_(last)
    if max(upsample) > 1:
        frames = _repeat(frames, kt, upsample, state is None)
    margins = [kh // 2, kw // 2]
    if replicate and any(margins):
        frames, margins = F.pad(frames, _margins(weight), "replicate"), [0, 0]

    out = _convolve(frames, weight, bias, stride, margins)
    if residual is not None:
        out += residual
    active = x.new_empty(0)
    if next_norm_weight is not None:
        active = torch.empty(out.shape, dtype=out.dtype, memory_format=memory_format_of(x))
        _write_active(active, out, next_norm_weight, eps, True)
    if not keep_out:
        return x.new_empty(0), new_state, active
    out = to_bytes(out) if pixels else out
    return out.contiguous(memory_format=memory_format_of(x)), new_state, active


def _convolve(
    frames: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], margins: list[int]
) -> Tensor:
    """frames (batch, channels, time, height, width), the past included."""
    outputs = (frames.shape[2] - weight.shape[2]) // stride[0] + 1
    # Sums of frames round too much in 16 bits
    exact = weight.dtype == wide(weight.dtype)
    if not exact or weight.shape[2] != 3 or stride[0] > 1 or outputs == 1:
        return _conv3d(frames, weight, bias, stride, margins)
    if outputs % 2 == 0:
        return _convolve_pairs(frames, weight, bias, stride, margins)
    first = _conv3d(frames[:, :, :3], weight, bias, stride, margins)
    rest = _convolve_pairs(frames[:, :, 1:], weight, bias, stride, margins)
    return torch.cat([first, rest], dim=2)


def _convolve_pairs(
    frames: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], margins: list[int]
) -> Tensor:
    """Two output frames a, b at a time from frames f0 to f3, with four flat convolutions, not six
    (Winograd's F(2, 3) in time):

        a = w0 f0 + w1 f1 + w2 f2 = m0 + m1 + m2,   m0 = w0 (f0 - f2),  m3 = w2 (f3 - f1),
        b = w0 f1 + w1 f2 + w2 f3 = m1 - m2 + m3,   m1, m2 = (w0 ± w1 + w2) / 2 (f2 ± f1)

    m1 is in both, and so brings the bias. The four are the groups of one convolution.
    """
    f0, f1 = frames[:, :, :-2:2], frames[:, :, 1:-2:2]
    f2, f3 = frames[:, :, 2::2], frames[:, :, 3::2]
    batch, channels, pairs, *size = f0.shape
    shape = (batch, 4 * channels, pairs, *size)
    sums = torch.empty(shape, dtype=frames.dtype, memory_format=LAST)
    into = sums.chunk(4, dim=1)
    torch.sub(f0, f2, out=into[0])
    torch.add(f2, f1, out=into[1])
    torch.sub(f2, f1, out=into[2])
    torch.sub(f3, f1, out=into[3])
    if bias is not None:
        bias = F.pad(bias, (len(bias), 2 * len(bias)))
    products = _conv3d(sums, weight, bias, stride, margins, pairs=True)
    m0, m1, m2, m3 = products.chunk(4, dim=1)
    shape = (batch, len(weight), 2 * pairs, *m0.shape[3:])
    out = torch.empty(shape, dtype=frames.dtype, memory_format=LAST)
    torch.add(m0.add_(m1), m2, out=out[:, :, ::2])
    torch.sub(m3.add_(m1), m2, out=out[:, :, 1::2])
    return out


def _conv3d(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    margins: list[int],
    pairs: bool = False,
) -> Tensor:
    """`pairs`: with `_pair_weights`, in four groups. Asks for oneDNN by name: ATen itself takes a
    slow path for small float32 inputs. On small pictures packing the weights takes a share of the
    time; those of frozen weights are kept."""
    frames, padding, groups = frames.contiguous(memory_format=LAST), [0, *margins], 1 + 3 * pairs
    bias = None if bias is None else bias.contiguous()  # oneDNN reads past the strides of a view
    onednn = frames.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    pixels = frames.numel() // max(frames.shape[1], 1)
    if onednn and not weight.requires_grad and pixels <= MAX_PACKED_PIXELS:
        packed = packed_weights(weight, frames.shape, tuple(stride), tuple(padding), groups)
        return torch.ops.mkldnn._convolution_pointwise(
            frames, packed, bias, padding, stride, DILATION, groups, "none", [], ""
        )
    weight = _pair_weights(weight) if pairs else weight
    if onednn:
        return torch.mkldnn_convolution(frames, weight, bias, padding, stride, DILATION, groups)
    return F.conv3d(frames, weight, bias, stride, padding, groups=groups)


def _pair_weights(weight: Tensor) -> Tensor:
    """Return the weights of m0 to m3, (4 * out_channels, in_channels, 1, kh, kw)."""
    w0, w1, w2 = weight.split(1, dim=2)
    middle, half = (w0 + w2) / 2, w1 / 2
    return torch.cat([w0, middle + half, middle - half, w2])


def _pack(
    weight: Tensor,
    shape: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return the weight in the blocks that oneDNN multiplies for frames of this shape."""
    weight = _pair_weights(weight) if groups == 4 else weight
    return torch._C._nn.mkldnn_reorder_conv3d_weight(
        weight.to_mkldnn(), padding, stride, DILATION, groups, shape
    )


packed_weights = PackedWeights(_pack)


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
    """Return the gradients of x, weight, bias and norm_weight, the last empty without a norm."""
    frames, past = _frames(x, weight, state, norm_weight, eps, silu, upsample, replicate)
    kt, kh, kw = weight.shape[2:]
    frames = _repeat(frames, kt, upsample, state is None)
    padded, left = frames, [0, kh // 2, kw // 2]
    if replicate:
        padded, left = F.pad(frames, _margins(weight), "replicate"), [0, 0, 0]
    grad, dweight, dbias = torch.ops.aten.convolution_backward(
        dout.contiguous(memory_format=LAST),
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
    return _laid_out_like(dx, x), _laid_out_like(dweight, weight), dbias, dnorm_weight


def _laid_out_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    like = torch.empty_like(tensor)
    return gradient if gradient.stride() == like.stride() else like.copy_(gradient)


def _frames(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    silu: bool,
    upsample: list[int],
    replicate: bool,
) -> tuple[Tensor, int]:
    """[past frames | prologue of x] along time, in the dtype of x, channels last in memory; and how
    many past frames there are."""
    past = past_frames(weight.shape[2], upsample[0])
    x = x.contiguous(memory_format=LAST)
    if past == 0 and norm_weight is None and not silu:
        return x, past
    batch, channels, time, *size = x.shape
    shape = (batch, channels, past + time, *size)
    frames = torch.empty(shape, dtype=x.dtype, memory_format=LAST)
    active = frames[:, :, past:]
    _write_active(active, x, norm_weight, eps, silu)
    if state is not None:
        frames[:, :, :past].copy_(state)
    elif replicate:
        frames[:, :, :past].copy_(active[:, :, :1])
    else:
        frames[:, :, :past].zero_()
    return frames, past


def _repeat(frames: Tensor, kt: int, upsample: list[int], starts: bool) -> Tensor:
    """Do `ref.repeat` in one copy, channels last."""
    time, space = upsample
    batch, channels, count, height, width = frames.shape
    copies = frames.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]
    copies = copies.expand(batch, count, time, height, space, width, space, channels)
    size = (count * time, height * space, width * space)
    copies = copies.reshape(batch, *size, channels).permute(0, 4, 1, 2, 3)
    return copies[:, :, frames_to_skip(kt, time, starts) :]


def _sum_copies(grad: Tensor, skipped: int, upsample: list[int]) -> Tensor:
    """Return the gradient of the frames that `_repeat` copies."""
    time, space = upsample
    if space > 1:
        grad = grad.unflatten(4, (-1, space)).sum(5).unflatten(3, (-1, space)).sum(4)
    if time > 1:
        grad = F.pad(grad, (0, 0, 0, 0, skipped, 0)).unflatten(2, (-1, time)).sum(3)
    return grad


def _margins(weight: Tensor) -> list[int]:
    """Return spatial padding in the order of `F.pad`, none in time."""
    kh, kw = weight.shape[3:]
    return [kw // 2, kw // 2, kh // 2, kh // 2, 0, 0]


def _widened(x: Tensor) -> Tensor:
    """Return a copy of x to compute in."""
    return x.to(wide(x.dtype), copy=True)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x over its root mean square across channels, and the inverse of this root."""
    normed = _widened(x)
    inverse = normed.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    return normed.mul_(inverse), inverse


def _per_channel(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype).view(1, -1, 1, 1, 1)


def _write_active(
    active: Tensor, x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool
) -> None:
    """Write norm and SiLU of x into `active`, in place if its dtype is wide enough."""
    y = active if active.dtype == wide(x.dtype) else torch.empty_like(x, dtype=wide(x.dtype))
    if norm_weight is None:
        y.copy_(x)
    else:
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=y.dtype)
        inverse = size.square_().div_(x.shape[1]).add_(eps).rsqrt_()
        torch.mul(x, inverse, out=y).mul_(_per_channel(norm_weight, y))
    if silu:
        F.silu(y, inplace=True)
    if y is not active:
        active.copy_(y)


def _prologue_backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and norm_weight.

    With n = x * r, r = rsqrt(mean(x^2) + eps) and y = n * w:
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
    # Row by row first: one long sum over the outer dimensions rounds more
    dnorm_weight = product.sum((0, 2, 3, 4), dtype=torch.float64).to(norm_weight.dtype)
    mean = product.mul_(scale).mean(1, keepdim=True)
    dx = torch.mul(grad, scale).sub_(normed.mul_(mean)).mul_(inverse)
    return dx.to(x.dtype), dnorm_weight
