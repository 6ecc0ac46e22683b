"""Emulate attention in E4M3 in float64, and print its error against exact attention, for the
choices of docs/method.md#16 on inputs that are hard for them.

    python -m benchmarks.float8_accuracy

q, k, v and the weights p are rounded to E4M3, everything else is float64. Keys come in tiles of
128; p is relative to the running maximum of the row, as a kernel has it, times 2^OFFSET. Scales of
keys and values are per head, or per token for comparison. What the tensor core's adder loses is not
in here: 0.015 % with one promotion per tile (benchmarks/LOG.md, 2026-11-29). "Past alone" is a
cache with `past_dtype`, in which a sixteenth of the keys at either end stays exact.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aapt_kernels.precision import hadamard

E4M3 = torch.float8_e4m3fn
LIMIT = 448.0
TILE = 128  # keys
OFFSET = 8  # 2^8 is the largest weight; 2^9 would be beyond LIMIT
HEAD_DIM = 128


def round_e4m3(x: Tensor) -> Tensor:
    """Return float64 values rounded to E4M3, limited to its largest."""
    return x.float().clamp(-LIMIT, LIMIT).to(E4M3).to(torch.float64)


def largest(x: Tensor, per_token: bool) -> Tensor:
    """Return the scale of x (heads, length, D) that puts its largest value at LIMIT."""
    dims = (-1,) if per_token else (-2, -1)
    return x.abs().amax(dims, keepdim=True).clamp(min=1e-30) / LIMIT


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return exact attention of q (heads, queries, D) to k and v (heads, keys, D)."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def attend_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    use_hadamard: bool = False,
    per_token: bool = False,
    offset: int = OFFSET,
    exact: float = 0.0,
) -> Tensor:
    """Return `attend` with q, k, v and p in E4M3.

    A row of q is scaled by its norm, which no rotation changes and no element exceeds. exact: share
    of the keys at either end that meet exact queries and have exact weights, as in a cache with
    `past_dtype`, 0 unless given.
    """
    if end := int(exact * k.shape[1]):
        ends = [torch.cat((x[:, :end], x[:, -end:]), 1) for x in (k, v)]
        k, v = k[:, end:-end], v[:, end:-end]
        scores = q @ ends[0].mT * q.shape[-1] ** -0.5
        other, other_lse = scores.softmax(-1) @ ends[1], scores.logsumexp(-1, keepdim=True)
    if use_hadamard:
        q, k = hadamard(q), hadamard(k)
    q_scale = q.norm(dim=-1, keepdim=True) / LIMIT
    k_scale, v_scale = largest(k, per_token), largest(v, per_token)
    q, k, v = (round_e4m3(x / scale) for x, scale in ((q, q_scale), (k, k_scale), (v, v_scale)))
    factor = q_scale * q.shape[-1] ** -0.5 * torch.log2(torch.tensor(torch.e, dtype=q.dtype))
    out, total = torch.zeros_like(q), torch.zeros_like(q_scale)
    highest = torch.full_like(q_scale, -torch.inf)
    for first in range(0, k.shape[-2], TILE):
        tile = slice(first, first + TILE)
        scales = [x[:, tile].mT if per_token else x for x in (k_scale, v_scale)]
        scores = q @ k[:, tile].mT * factor * scales[0]
        before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
        decay, p = torch.exp2(before - highest), torch.exp2(scores - highest)
        total = total * decay + p.sum(-1, keepdim=True)
        if per_token:  # of values: part of the weight, relative to the largest of the tile
            whole = scales[1].amax(-1, keepdim=True)
            p = round_e4m3(p * scales[1] / whole * 2.0**offset) * whole
        else:
            p = round_e4m3(p * 2.0**offset) * scales[1]
        out = out * decay + p @ v[:, tile] * 2.0**-offset
    out = out / total
    if not end:
        return out
    lse = (highest + total.log2()) * math.log(2)
    return torch.lerp(out, other, torch.sigmoid(other_lse - lse))


def normalise(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt() * weight


def inputs(name: str, keys: int = 4096, queries: int = 32, heads: int = 8) -> tuple[Tensor, ...]:
    """Return q (heads, queries, D), k and v (heads, keys, D) of a kind of INPUTS."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, HEAD_DIM, generator=generator, dtype=torch.float64)

    q, k, v = normal(heads, queries), normal(heads, keys), normal(heads, keys)
    weight = torch.ones(HEAD_DIM, dtype=torch.float64)
    if name == "outlier weights":  # of the norms: four channels of 8
        weight[::32] = 8
    if name == "biased channels":  # keys share a part that softmax cancels
        k = k + 4 * normal(1)
    q, k = normalise(q, weight), normalise(k, weight)
    if name == "varying norms":  # as without a norm
        k, v = (x * torch.exp2(2 * normal(heads, keys)[..., :1]) for x in (k, v))
    if name == "outlier values":
        v[..., ::32] *= 30
    if name == "peaked scores":
        q = 4 * q
    if name == "one key above all":  # by 8.5; the others weigh as much together
        q[..., 0], k[:, keys // 8, 0] = 8, 12
        v = v + 2
    if name == "both ends above all":  # by 2.1: a sixteenth at either end, as much as the others
        q[..., 0], end = 8, keys // 16
        k[:, :end, 0] = k[:, -end:, 0] = 3
    return q, k, v


INPUTS = (
    "Gaussian",
    "outlier weights",
    "biased channels",
    "varying norms",
    "outlier values",
    "peaked scores",
    "one key above all",
    "both ends above all",
)


@dataclass(frozen=True)
class Loss:
    """Relative L2 error of a result, and its cosine with the exact one."""

    error: float
    cosine: float


def loss(ours: Tensor, exact: Tensor) -> Loss:
    error = (ours - exact).norm() / exact.norm()
    cosine = (ours * exact).sum() / ours.norm() / exact.norm()
    return Loss(float(error), float(cosine))


def main() -> None:
    choices = [
        (f"{scale}{', Hadamard' if use else ''}", dict(per_token=token, use_hadamard=use))
        for scale, token in (("per head", False), ("per token", True))
        for use in (False, True)
    ]
    choices += [
        (f"past alone{', Hadamard' if use else ''}", dict(exact=1 / 16, use_hadamard=use))
        for use in (False, True)
    ]
    cases = [(name, 4096) for name in INPUTS] + [("Gaussian", 200_000)]
    print(f"| inputs | keys | {' | '.join(name for name, _ in choices)} |")
    print("|---|---|" + "---|" * len(choices))
    for name, keys in cases:
        tensors = inputs(name, keys, heads=8 if keys < 10_000 else 1)
        exact = attend(*tensors)
        cells = []
        for _, options in choices:
            lost = loss(attend_e4m3(*tensors, **options), exact)
            cells.append(f"{100 * lost.error:.2f} %, {lost.cosine:.4f}")
        print(f"| {name} | {keys} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
