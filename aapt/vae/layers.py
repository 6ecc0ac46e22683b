"""Layers of the autoencoder, and the states of their convolutions.

Only `causal_conv3d` looks back in time: its state is the last frames it has read. Norms and
attention act within one frame.

Three kinds of upsampling, each with its inverse: "nearest": repeat frames and pixels, then
convolve; "shuffle": convolve, then unfold channels into frames and pixels; "separate" (Wan's): a
convolution in time makes the channels of every new frame, except for the first frame of a stream;
then space as "nearest".
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aapt_kernels import causal_conv3d
from aapt_kernels.causal_conv3d import fuses_next_norm
from aapt_kernels.causal_conv3d.frames import memory_format_of

from .attention import attend
from .config import VAEConfig

# The memory of an encoder or a decoder between chunks: one tensor per convolution, in the order of
# the pass.
EncoderState = DecoderState = tuple[Tensor, ...]


class States:
    """The states of one pass through the convolutions, read and replaced in the order they run.

    Attributes:
        out: The tensors that receive the new states; the old states may be given, because each
            convolution reads its own state alone, before it is replaced.
        active: Inputs that the convolution before has already normed and activated.
    """

    def __init__(self, states: DecoderState | None, out: DecoderState | None = None):
        self.states, self.out = states, out
        self.new_states: list[Tensor] = []
        self.active: dict[CausalConv3d, Tensor] = {}

    @property
    def starts(self) -> bool:
        """True in the pass that holds the first frame."""
        return self.states is None

    def pop(self) -> Tensor | None:
        return None if self.states is None else self.states[len(self.new_states)]

    def push(self, state: Tensor) -> None:
        if self.out is not None:
            state = self.out[len(self.new_states)].copy_(state)
        self.new_states.append(state)


class CausalConv3d(nn.Module):
    """`causal_conv3d` with its parameters; `norm` and `silu` act on its input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        upsample: tuple[int, int] = (1, 1),
        norm: bool = False,
        silu: bool = False,
        eps: float = 1e-6,
        padding: str = "zeros",
    ):
        super().__init__()
        fan_in = in_channels * math.prod(kernel)
        weight = torch.empty(out_channels, in_channels, *kernel)
        # Channels last in memory, as the activations have them
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last_3d))
        nn.init.normal_(self.weight, std=fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.norm_weight = nn.Parameter(torch.ones(in_channels)) if norm else None
        self.silu, self.eps = silu, eps
        self.stride, self.upsample, self.padding = stride, upsample, padding

    def forward(
        self,
        x: Tensor | None,
        stream: States,
        residual: Tensor | None = None,
        pixels: bool = False,
        then: "CausalConv3d | None" = None,
        keep_out: bool = True,
    ) -> Tensor | None:
        """Convolves one chunk.

        If a kernel can, it also norms the output for `then`, the next convolution with a norm.
        Without `keep_out` the output is then None, because only `then` reads it.
        """
        if self.stride[0] > 1:
            return self._subsample(x, stream)
        active = stream.active.pop(self, None)
        options = dict(norm_weight=self.norm_weight, eps=self.eps, silu=self.silu)
        if active is not None:
            x, options = active, dict(eps=self.eps)
        fuses = (
            then is not None
            and self._norms_for(then)
            and self._fuses_next_norm(
                x, self.bias, options.get("norm_weight"), residual, then.norm_weight
            )
        )
        if fuses:
            options |= dict(next_norm_weight=then.norm_weight, eps=then.eps, keep_out=keep_out)
        given = dict(state=stream.pop(), residual=residual, pixels=pixels)
        out, state, *normed = self._convolve(x, **given, **options)
        stream.push(state)
        if fuses:
            stream.active[then] = normed[0]
        return out

    def _fuses_next_norm(self, x: Tensor, *others: Tensor | None) -> bool:
        """True if the operator norms its output for the next layer in its own launch."""
        return fuses_next_norm(x, self.weight, *others)

    def _convolve(self, x: Tensor, **options) -> tuple[Tensor | None, ...]:
        """Runs the operator with the layer's own arguments and `options`."""
        own = dict(stride=self.stride, upsample=self.upsample, padding=self.padding)
        return causal_conv3d(x, self.weight, self.bias, share_state=True, **own, **options)

    def _subsample(self, x: Tensor, stream: States) -> Tensor:
        """Convolves one chunk with a stride in time.

        A kernel with a stride takes no state. So the last frame of the chunk before, which is the
        state here, goes ahead of the chunk, and its own output is dropped. A kernel reaches at most
        one stride back.
        """
        past = stream.pop()
        memory = memory_format_of(x)
        if past is not None:
            x = torch.cat([past, x], dim=2).contiguous(memory_format=memory)
        stream.push(x[:, :, -1:].clone(memory_format=memory))
        options = dict(stride=self.stride, padding=self.padding)
        out, _ = causal_conv3d(x, self.weight, self.bias, **options)
        return out if past is None else last_frames(out, out.shape[2] - 1)

    def _norms_for(self, then: "CausalConv3d") -> bool:
        """True if one epsilon serves both norms, and both layers have weights of one precision: one
        in 8 bits rounds its input after the norm, so the norm is left to it."""
        same = self.norm_weight is None or self.eps == then.eps
        same = same and then.weight.dtype == self.weight.dtype
        return then.norm_weight is not None and then.silu and same

    def needs(self, frames: int) -> int:
        """Returns the number of last input frames that the last `frames` output frames depend
        on."""
        return math.ceil((frames + self.weight.shape[2] - 1) / self.upsample[0])


class Call(NamedTuple):
    """One convolution of a pass, with the size of its input."""

    conv: CausalConv3d
    frames: int
    height: int
    width: int
    residual: bool = False


def active(config: VAEConfig) -> dict:
    """Options of a convolution whose input is normed and activated."""
    return dict(norm=True, silu=True, eps=config.norm_eps, padding=config.padding)


class ResidualBlock(nn.Module):
    """(norm, SiLU, convolution) twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig):
        super().__init__()
        first, second = config.time_kernels
        self.conv1 = CausalConv3d(in_channels, out_channels, (first, 3, 3), **active(config))
        self.conv2 = CausalConv3d(out_channels, out_channels, (second, 3, 3), **active(config))
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, stream: States, then: CausalConv3d | None = None) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x, stream)
        x = self.conv1(x, stream, then=self.conv2, keep_out=False)
        return self.conv2(x, stream, residual, then=then)

    def needs(self, frames: int) -> int:
        return self.conv1.needs(self.conv2.needs(frames))

    def calls(self, *size: int) -> list[Call]:
        shortcut = [] if self.shortcut is None else [Call(self.shortcut, *size)]
        return [*shortcut, Call(self.conv1, *size), Call(self.conv2, *size, residual=True)]


def norm_of(layer: nn.Module) -> CausalConv3d | None:
    """Returns the convolution that norms and activates the input of a layer, if any."""
    return layer if isinstance(layer, CausalConv3d) else getattr(layer, "conv1", None)


class FrameAttention(nn.Module):
    """Single-head self-attention within each frame, added to the input."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.qkv = CausalConv3d(channels, 3 * channels, (1, 1, 1), norm=True, eps=config.norm_eps)
        self.proj = CausalConv3d(channels, channels, (1, 1, 1))
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, stream: States, then: CausalConv3d | None = None) -> Tensor:
        qkv = self.qkv(x, stream).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, H*W, 3C)
        out = attend(*qkv.chunk(3, dim=-1))
        out = out.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
        return self.proj(out, stream, residual=x, then=then)

    def needs(self, frames: int) -> int:
        return frames

    def calls(self, *size: int) -> list[Call]:
        return [Call(self.qkv, *size), Call(self.proj, *size, residual=True)]


class Downsample(nn.Module):
    """Strided convolution. Frame 0 stays on its own: 1 + s*n frames become 1 + n."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int], padding: str):
        super().__init__()
        time, space = self.stride = stride
        self.conv = CausalConv3d(
            in_channels, out_channels, (3, 3, 3), stride=(time, space, space), padding=padding
        )

    def forward(self, x: Tensor, stream: States) -> Tensor:
        return self.conv(x, stream)

    def calls(self, *size: int) -> list[Call]:
        return [Call(self.conv, *size)]


class SeparateDownsample(nn.Module):
    """Space, then time, each by its own strided convolution. Frame 0 skips the one in time."""

    def __init__(self, channels: int, stride: tuple[int, int], padding: str):
        super().__init__()
        time, space = self.stride = stride
        self.conv = CausalConv3d(
            channels, channels, (1, 3, 3), stride=(1, space, space), padding=padding
        )
        self.time_conv = None
        if time > 1:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=(time, 1, 1))

    def forward(self, x: Tensor, stream: States) -> Tensor:
        x = self.conv(x, stream)
        if self.time_conv is None:
            return x
        later = self.time_conv(x, stream)
        if not stream.starts:
            return later
        return torch.cat([x[:, :, :1], later[:, :, 1:]], dim=2)

    def calls(self, frames: int, height: int, width: int) -> list[Call]:
        space = self.stride[1]
        calls = [Call(self.conv, frames, height, width)]
        if self.time_conv is not None:
            calls.append(Call(self.time_conv, frames, height // space, width // space))
        return calls


class Upsample(nn.Module):
    """Inverse of `Downsample` in shape, "nearest" or "shuffle": 1 + n frames become 1 + s*n.

    The first frame of a stream yields one frame: the last of its copies.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int], config: VAEConfig
    ):
        super().__init__()
        time, space = self.stride = stride
        self.shuffle = config.upsample == "shuffle"
        copies = time * space**2 if self.shuffle else 1
        self.conv = CausalConv3d(
            in_channels,
            out_channels * copies,
            (config.time_kernels[1], 3, 3),
            upsample=(1, 1) if self.shuffle else stride,
            padding=config.padding,
        )

    def forward(self, x: Tensor, stream: States, then: CausalConv3d | None = None) -> Tensor:
        if not self.shuffle:
            return self.conv(x, stream, then=then)
        x = self.conv(x, stream)
        time, space = self.stride
        x = unfold_channels(x, time, space)
        return x[:, :, time - 1 :] if stream.starts else x

    def needs(self, frames: int) -> int:
        return self.conv.needs(math.ceil(frames / self.stride[0]) if self.shuffle else frames)

    def calls(self, *size: int) -> list[Call]:
        return [Call(self.conv, *size)]


class SeparateUpsample(nn.Module):
    """Inverse of `SeparateDownsample` in shape. Time begins with the second frame of a stream."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int], config: VAEConfig
    ):
        super().__init__()
        time, space = self.stride = stride
        self.time_conv = None
        if time > 1:
            self.time_conv = CausalConv3d(in_channels, time * in_channels, (3, 1, 1))
        self.conv = CausalConv3d(
            in_channels, out_channels, (1, 3, 3), upsample=(1, space), padding=config.padding
        )

    def forward(
        self,
        x: Tensor,
        stream: States,
        then: CausalConv3d | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if self.time_conv is not None:
            x = self._upsample_time(x, stream)
        return self.conv(x, stream, residual, then=then)

    def _upsample_time(self, x: Tensor, stream: States) -> Tensor:
        time = self.stride[0]
        if not stream.starts:
            return unfold_channels(self.time_conv(x, stream), time, 1)
        memory = memory_format_of(x)
        first, later = (y.contiguous(memory_format=memory) for y in (x[:, :, :1], x[:, :, 1:]))
        if later.shape[2] == 0:
            past = self.time_conv.weight.shape[2] - 1
            stream.push(torch.cat([torch.zeros_like(first)] * past, dim=2))
            return first
        later = unfold_channels(self.time_conv(later, stream), time, 1)
        return torch.cat([first, later], dim=2).contiguous(memory_format=memory)

    def needs(self, frames: int) -> int:
        if self.time_conv is None:
            return frames
        return self.time_conv.needs(math.ceil(frames / self.stride[0]))

    def calls(self, frames: int, height: int, width: int) -> list[Call]:
        if self.time_conv is None:
            return [Call(self.conv, frames, height, width)]
        return [
            Call(self.time_conv, frames, height, width),
            Call(self.conv, frames * self.stride[0], height, width),
        ]


def last_frames(x: Tensor, count: int | None) -> Tensor:
    """Returns the last `count` frames of (B, C, T, H, W), None for all, in the same memory
    format."""
    if count is None or count >= x.shape[2]:
        return x
    return x[:, :, -count:].contiguous(memory_format=memory_format_of(x))


def frames_needed(layers: Sequence[nn.Module], last: int | None) -> list[int | None]:
    """Returns the last input frames of every layer that `last` frames of the final output need.

    They are in the order of `pop`: those of the first layer come last; `last` itself is in front.
    None, for all frames, stays None.
    """
    needs = [last]
    for layer in reversed(layers):
        needs.append(None if last is None else layer.needs(needs[-1]))
    return needs


def unfold_channels(x: Tensor, time: int, space: int) -> Tensor:
    """Unfolds (B, time*space*space*C, T, H, W) to (B, C, time*T, space*H, space*W), in the same
    memory format."""
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels // (time * space**2), frames * time, height * space, width * space)
    folded = x.unflatten(1, (time, space, space, shape[1]))
    if memory_format_of(x) == torch.channels_last_3d:
        # (B, T, time, H, space, W, space, C)
        last = folded.permute(0, 5, 1, 6, 2, 7, 3, 4).reshape(batch, *shape[2:], shape[1])
        return last.contiguous().permute(0, 4, 1, 2, 3)
    # (B, C, T, time, H, space, W, space)
    return folded.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(shape)


def fold_pixels(x: Tensor, space: int) -> Tensor:
    """Folds (B, C, T, space*H, space*W) to (B, space*space*C, T, H, W): undoes
    `unfold_channels`."""
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space))  # (B, C, T, H, space, W, space)
    return x.permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)


def middle(channels: int, config: VAEConfig) -> list[nn.Module]:
    """Returns the layers at the coarsest scale, which encoder and decoder both have."""
    if not config.mid_attention:
        return []
    return [
        ResidualBlock(channels, channels, config),
        FrameAttention(channels, config),
        ResidualBlock(channels, channels, config),
    ]
