"""The sm_90a kernel: what it takes, and its weights, folded and rounded once for every version."""

from types import ModuleType

import torch
from torch import Tensor

from .frames import memory_format_of
from .packed import PackedWeights


def limit(x, weight=None, bias=None, state=None, norm_weight=None, *options) -> str | None:
    """Why the kernel does not take these arguments; None if it does."""
    if x.dtype != torch.bfloat16:
        return f"it takes bfloat16, got {x.dtype}"
    if memory_format_of(x) != torch.channels_last_3d:
        return "it takes channels last in memory (torch.channels_last_3d)"
    if x.shape[1] % 8 or x.shape[1] > 1024:
        return f"it takes a multiple of 8 input channels, at most 1024, got {x.shape[1]}"
    if weight is None:
        return None
    _, _, residual, stride, upsample, _, pixels, next_norm_weight, *_ = options
    if max(weight.shape[3:]) > 3:
        return f"it takes kh and kw of 1 or 3, got {tuple(weight.shape)}"
    if max(stride) > 1 or max(upsample) > 2:
        return f"it takes no stride and an upsampling of at most 2, got {stride}, {upsample}"
    if residual is not None and (pixels or weight.shape[0] % 8):
        return "it takes a residual with a multiple of 8 output channels and no pixels"
    if next_norm_weight is not None and (weight.shape[0] % 8 or weight.shape[0] > 1024):
        return "it takes next_norm_weight with a multiple of 8 output channels, at most 1024"
    return None


packed_weights = PackedWeights(
    lambda weight, kernels, upsample: kernels.causal_conv3d_pack(weight, upsample)
)


def forward(
    kernels: ModuleType,  # torch.ops.aapt_sm90, or the simulated ones
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
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = packed_weights(weight, kernels, tuple(upsample))
    arguments = packed, bias, state, norm_weight, eps, silu, residual
    return kernels.causal_conv3d(x, *arguments, weight.shape[2:], upsample, *options)
