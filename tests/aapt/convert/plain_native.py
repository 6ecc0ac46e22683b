"""A Wan transformer and its few-step rollout written again, on weights by Wan's own names.

The network: arXiv 2503.20314; the rolling cache and the sampler: arXiv 2506.08009. Neighbours are
rotated as complex numbers, the patch embedding is a convolution, every projection stands alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plain_unipc import told, unipc

HEAD_DIM, AXES = 128, (44, 42, 42)


def random_weights(width=256, depth=2, hidden=96, text=24, channels=4) -> dict[str, Tensor]:
    """A small Wan in float64, in which every path matters."""

    def normal(*shape: int, scale: float | None = None) -> Tensor:
        scale = scale or math.prod(shape[1:]) ** -0.5
        return torch.randn(shape, dtype=torch.float64) * scale

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
        weight, bias = normal(outputs, inputs), normal(outputs, scale=0.1)
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 0.5 + torch.rand(width, dtype=torch.float64)}

    weights = {
        "patch_embedding.weight": normal(width, channels, 1, 2, 2),
        "patch_embedding.bias": normal(width, scale=0.1),
        "head.modulation": normal(1, 2, width, scale=0.2),
        **linear("text_embedding.0", width, text),
        **linear("text_embedding.2", width, width),
        **linear("time_embedding.0", width, 256),
        **linear("time_embedding.2", width, width),
        **linear("time_projection.1", 6 * width, width),
        **linear("head.head", 4 * channels, width),
    }
    for index in range(depth):
        block = f"blocks.{index}"
        weights[f"{block}.modulation"] = normal(1, 6, width, scale=0.2)
        weights |= norm(f"{block}.norm3")
        weights[f"{block}.norm3.bias"] = normal(width, scale=0.1)
        weights |= linear(f"{block}.ffn.0", hidden, width)
        weights |= linear(f"{block}.ffn.2", width, hidden)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                weights |= linear(f"{block}.{attention}.{name}", width, width)
            for name in "qk":
                weights |= norm(f"{block}.{attention}.norm_{name}")
    return weights


class PlainNativeWan:
    """One stream of a batch. `keys[block]` lists rotated keys, and values, of every frame.

    text: (B, 512, text_width), padded with zeros. window, sink: in frames, besides the newest.
    """

    def __init__(self, weights: dict[str, Tensor], text: Tensor, window: int, sink: int):
        self.weights, self.window, self.sink = weights, window, sink
        self.width = len(weights["patch_embedding.bias"])
        self.depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        self.keys: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.depth)]
        hidden = F.gelu(self.linear("text_embedding.0", text), approximate="tanh")
        self.words = self.linear("text_embedding.2", hidden)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def normed_heads(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
        return x.unflatten(-1, (-1, HEAD_DIM))

    @staticmethod
    def rotate(x: Tensor, first: int, grid: tuple[int, int, int]) -> Tensor:
        places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
        places[:, 0] += first
        angles = [
            places[:, axis, None] * 10_000.0 ** (-torch.arange(0, size, 2).double() / size)
            for axis, size in enumerate(AXES)
        ]
        turn = torch.cat(angles, dim=-1)[:, None]
        turn = torch.polar(torch.ones_like(turn), turn)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def run(self, x: Tensor, t: float) -> tuple[Tensor, list]:
        """The velocity of the next frames x (B, C, n, H, W) at t, and their keys and values."""
        w, frames = self.weights, x.shape[2]
        grid = (frames, x.shape[3] // 2, x.shape[4] // 2)
        embedded = F.conv3d(x, w["patch_embedding.weight"], w["patch_embedding.bias"], (1, 2, 2))
        tokens = embedded.flatten(2).transpose(1, 2)

        angles = 1000 * t * 10_000.0 ** (-torch.arange(128).double() / 128)
        waves = torch.cat([angles.cos(), angles.sin()]).expand(len(x), -1)
        time = F.silu(self.linear("time_embedding.0", waves))
        time = self.linear("time_embedding.2", time)
        shared = self.linear("time_projection.1", F.silu(time)).unflatten(-1, (6, -1))

        start, made = len(self.keys[0]), []
        last, count = start + frames - 1, grid[1] * grid[2]
        seen = [i for i in range(last + 1) if i < self.sink or i >= last - self.window]
        for index in range(self.depth):
            block = f"blocks.{index}"
            own, cross = f"{block}.self_attn", f"{block}.cross_attn"
            m = (shared + w[f"{block}.modulation"]).unsqueeze(2).unbind(1)
            y = F.layer_norm(tokens, (self.width,), eps=1e-6) * (1 + m[1]) + m[0]
            q, k, v = (self.linear(f"{own}.{name}", y) for name in "qkv")
            q, k = self.normed_heads(f"{own}.norm_q", q), self.normed_heads(f"{own}.norm_k", k)
            q, k = self.rotate(q, start, grid), self.rotate(k, start, grid)
            v = v.unflatten(-1, (-1, HEAD_DIM))
            pairs = list(zip(k.split(count, dim=1), v.split(count, dim=1), strict=True))
            made.append(pairs)
            known = [*self.keys[index], *pairs]
            k, v = (torch.cat([known[i][part] for i in seen], dim=1) for part in (0, 1))
            tokens = tokens + m[2] * self.linear(f"{own}.o", attention(q, k, v))

            scale, shift = w[f"{block}.norm3.weight"], w[f"{block}.norm3.bias"]
            y = F.layer_norm(tokens, (self.width,), scale, shift, eps=1e-6)
            q = self.normed_heads(f"{cross}.norm_q", self.linear(f"{cross}.q", y))
            k = self.normed_heads(f"{cross}.norm_k", self.linear(f"{cross}.k", self.words))
            v = self.linear(f"{cross}.v", self.words).unflatten(-1, (-1, HEAD_DIM))
            tokens = tokens + self.linear(f"{cross}.o", attention(q, k, v))

            y = F.layer_norm(tokens, (self.width,), eps=1e-6) * (1 + m[4]) + m[3]
            y = F.gelu(self.linear(f"{block}.ffn.0", y), approximate="tanh")
            tokens = tokens + m[5] * self.linear(f"{block}.ffn.2", y)
        shift, scale = (w["head.modulation"] + time[:, None]).unsqueeze(2).unbind(1)
        y = F.layer_norm(tokens, (self.width,), eps=1e-6) * (1 + scale) + shift
        y = self.linear("head.head", y).unflatten(1, grid).unflatten(-1, (2, 2, -1))
        return torch.einsum("bthwpqc->bcthpwq", y).flatten(5, 6).flatten(3, 4), made

    def chunk(self, noise: Tensor, times: tuple[float, ...], refresh: float) -> Tensor:
        """Makes a chunk from noise (len(times), B, C, n, H, W), and keeps its refreshed keys."""
        x = noise[0]
        for index, time in enumerate(times):
            clean = x - time * self.run(x, time)[0]
            if index + 1 < len(times):
                x = (1 - times[index + 1]) * clean + times[index + 1] * noise[index + 1]
        return self.keep(clean, refresh)

    def unipc_chunk(
        self, noise: Tensor, times: tuple[float, ...], refresh: float, guidance: float | None
    ) -> Tensor:
        """Makes a chunk from noise (B, C, n, H, W) with UniPC, and keeps its refreshed keys. With
        guidance the text has 2 B rows: the prompts, and the negative ones."""

        def estimate(x: Tensor, time: float) -> Tensor:
            if guidance is None:
                return x - time * self.run(x, told(time))[0]
            prompted, negative = self.run(torch.cat([x, x]), told(time))[0].chunk(2)
            return x - time * (negative + guidance * (prompted - negative))

        clean = unipc(estimate, noise, times)
        self.keep(clean if guidance is None else torch.cat([clean, clean]), refresh)
        return clean

    def keep(self, clean: Tensor, refresh: float) -> Tensor:
        for known, pairs in zip(self.keys, self.run(clean, refresh)[1], strict=True):
            known.extend(pairs)
        return clean


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
