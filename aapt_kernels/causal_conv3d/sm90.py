"""Limits of the sm_90a kernel, and its weights, folded and rounded once for every version."""

from types import ModuleType

import torch
from torch import Tensor

from ..checks import ALIGNMENT, aligned
from .frames import memory_format_of
from .packed import PackedWeights


def limit(x, weight=None, bias=None, state=None, norm_weight=None, *options) -> str | None:
    """Return why the kernel does not take these arguments, None if it does."""
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


def aligned_frames(x: Tensor | None, apart: bool = False) -> Tensor | None:
    """Return frames with channels last in memory, on a boundary of vector loads: a copy if they are
    not stored so. `apart`: batch entries may be any number of whole frames apart."""
    if x is None:
        return None
    entries = x[:1] if apart else x
    # NOTE: entries of an expanded batch are 0 apart, which no tensor map takes
    pitch, frame = x.stride(0), max(x[:1, :, :1].numel(), 1)
    whole = not apart or len(x) < 2 or (pitch > 0 and pitch % frame == 0)
    fits = whole and entries.is_contiguous(memory_format=torch.channels_last_3d)
    if fits and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.channels_last_3d)


def aligned_vector(x: Tensor | None) -> Tensor | None:
    """Return x contiguous on a boundary of vector loads, None for None."""
    return None if x is None else aligned(x)


def forward(
    kernels: ModuleType,  # torch.ops.aapt_sm90 or aapt_sim
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
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.causal_conv3d(
        aligned_frames(x),
        packed_weights(weight, kernels, tuple(upsample)),
        aligned_vector(bias),
        aligned_frames(state, apart=True),
        aligned_vector(norm_weight),
        eps,
        silu,
        aligned_frames(residual),
        weight.shape[2:],
        upsample,
        replicate,
        pixels,
        aligned_vector(next_norm_weight),
        *options,
    )
