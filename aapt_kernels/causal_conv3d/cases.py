"""Shapes and inputs shared by the tests and the benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Call of `causal_conv3d`: input size, kernel and options."""

    size: tuple[int, int, int]  # time, height, width
    channels: tuple[int, int]  # in, out
    kernel: tuple[int, int, int] = (3, 3, 3)
    batch: int = 2
    stride: tuple[int, int, int] = (1, 1, 1)
    upsample: tuple[int, int] = (1, 1)
    padding: str = "zeros"
    bias: bool = True
    norm: bool = False
    silu: bool = False
    state: bool = False
    residual: bool = False
    next_norm: bool = False


ACTIVE = dict(norm=True, silu=True)

# Arguments of the specification that `make_inputs` leaves out
ABSENT = dict(state=None, norm_weight=None, eps=1e-6, residual=None, pixels=False)
ABSENT |= dict(next_norm_weight=None, keep_out=True, keep_state=True)

CASES = {
    "plain": Case((4, 6, 7), (3, 5)),
    "norm-silu": Case((4, 6, 7), (5, 4), **ACTIVE),
    "norm": Case((2, 5, 4), (6, 3), kernel=(1, 1, 1), norm=True, bias=False),
    "silu": Case((3, 5, 4), (3, 4), silu=True),
    "one-frame": Case((1, 7, 5), (4, 4), state=True, residual=True, **ACTIVE),
    "chunk": Case((3, 4, 9), (4, 3), state=True, residual=True, **ACTIVE),
    "one-frame-start": Case((1, 4, 4), (3, 3), residual=True, **ACTIVE),
    "flat-kernel": Case((2, 6, 6), (4, 4), kernel=(1, 3, 3), residual=True, **ACTIVE),
    "long": Case((7, 4, 5), (3, 4), state=True, residual=True, **ACTIVE),
    "odd-kernel": Case((3, 6, 6), (3, 2), kernel=(2, 1, 5), state=True),
    "down-space": Case((3, 7, 6), (3, 4), stride=(1, 2, 2)),
    "down-both": Case((5, 6, 7), (3, 4), stride=(2, 2, 2), **ACTIVE),
    "replicate": Case((3, 5, 6), (4, 3), padding="replicate", **ACTIVE),
    "replicate-chunk": Case((2, 5, 6), (4, 3), padding="replicate", state=True, residual=True),
    "replicate-down": Case((5, 6, 5), (3, 4), padding="replicate", stride=(2, 2, 2)),
    "up-space": Case((2, 3, 4), (4, 3), upsample=(1, 2), state=True, residual=True),
    "up-both": Case((2, 4, 3), (3, 4), upsample=(2, 2), state=True, **ACTIVE),
    "up-both-start": Case((3, 2, 3), (3, 4), upsample=(2, 2), residual=True, **ACTIVE),
    "up-replicate": Case((2, 3, 2), (3, 4), upsample=(2, 2), padding="replicate"),
    "next-norm": Case((3, 5, 4), (4, 6), state=True, residual=True, next_norm=True, **ACTIVE),
    "next-norm-up": Case((2, 3, 4), (3, 4), upsample=(2, 2), next_norm=True),
    "up-threefold": Case((2, 2, 3), (2, 3), kernel=(5, 3, 1), upsample=(3, 3), state=True),
}


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], dict]:
    """([x, weight, bias], keyword arguments) of `causal_conv3d`, on the CPU, without gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    inner, outer = case.channels
    fan_in = inner * case.kernel[0] * case.kernel[1] * case.kernel[2]
    (repeats, copies), (frames, *size) = case.upsample, case.size
    frames = frames * repeats - (0 if case.state else repeats - 1)
    repeated = (frames, *(copies * n for n in size))
    out_size = [(n - 1) // s + 1 for n, s in zip(repeated, case.stride, strict=True)]
    x = normal(case.batch, inner, *case.size)
    weight = normal(outer, inner, *case.kernel, scale=fan_in**-0.5)
    bias = normal(outer) if case.bias else None
    options = dict(silu=case.silu, stride=case.stride, upsample=case.upsample, padding=case.padding)
    if case.norm:
        options["norm_weight"] = 1 + normal(inner, scale=0.3)
    if case.state:
        past = -(-(case.kernel[0] - 1) // repeats)
        options["state"] = normal(case.batch, inner, past, *size)
    if case.residual:
        options["residual"] = normal(case.batch, outer, *out_size)
    if case.next_norm:
        options["next_norm_weight"] = 1 + normal(outer, scale=0.3)
    return [x, weight, bias], options
