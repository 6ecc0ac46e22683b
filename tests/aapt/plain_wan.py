"""A Wan-type transformer and its few-step sampler written again from their published definitions.

The network: "Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv 2503.20314). The
rolling cache and the sampler: "Self Forcing" (arXiv 2506.08009): a chunk attends to the sink, to
the frames of the local window and to itself; each pass writes its keys anew, and a last pass at the
time of the context leaves the ones that stay. Relative positions: keys are kept unrotated, and at
each step the visible frames are numbered from 0.

Attention is dense softmax over a list of frames; autograd runs through the list.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt.model.wan import WanTransformer

from .plain_unipc import told, unipc


def float_of(x: Tensor) -> Tensor:
    """Wan computes norms and modulation in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x: Tensor) -> Tensor:
    centred = float_of(x) - float_of(x).mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    scale = (float_of(x).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (float_of(x) * scale).to(x.dtype) * weight.flatten()


class PlainWan:
    """One stream of a batch. `keys[layer]` lists the unrotated keys and values of every frame.

    relative: Number the visible frames from 0 at each step; else by their index in the stream.
    """

    def __init__(self, net: WanTransformer, text: Tensor, text_lens: Tensor, relative: bool):
        self.net, self.relative = net, relative
        self.keys: list[list[tuple[Tensor, Tensor]]] = [[] for _ in net.blocks]
        self.set_text(text, text_lens)

    def set_text(self, text: Tensor, text_lens: Tensor) -> None:
        words = torch.zeros(len(text), self.net.config.text_tokens, text.shape[2]).to(text)
        for row, length in enumerate(text_lens.tolist()):
            words[row, :length] = text[row, :length]
        first, _, second = self.net.text_in
        self.words = second(F.gelu(first(words), approximate="tanh"))

    def visible(self, last: int) -> list[int]:
        """Frames that a step sees whose last frame is `last`."""
        config = self.net.config
        oldest = last - config.window_frames
        return [i for i in range(last + 1) if i < config.sink_frames or i >= oldest]

    def rotate(self, x: Tensor, places: list[int], grid: tuple[int, int]) -> Tensor:
        """Rotates (B, len(places) * tokens, heads, head_dim), each frame at its place in time."""
        config, (rows, columns) = self.net.config, grid
        reference = config.reference_grid or grid
        position = torch.zeros(len(places), rows, columns, 3, dtype=torch.float64)
        position[..., 0] = torch.tensor(places, dtype=torch.float64)[:, None, None]
        position[..., 1] = (torch.arange(rows) * reference[0] / rows).double()[:, None]
        position[..., 2] = (torch.arange(columns) * reference[1] / columns).double()
        angles = []
        for axis, size in enumerate(config.rope_axes):
            frequency = config.rope_theta ** (-torch.arange(0, size, 2).double() / size)
            angles.append(position[..., axis, None] * frequency)
        turn = torch.cat(angles, -1).flatten(0, 2)[:, None]  # (tokens, 1, head_dim / 2)
        turn = torch.polar(torch.ones_like(turn), turn)
        low, high = x.double().chunk(2, dim=-1)
        rotated = torch.complex(low, high) * turn
        return torch.cat([rotated.real, rotated.imag], dim=-1).to(x.dtype)

    def run(self, x: Tensor, t: Tensor, *channels: Tensor) -> tuple[Tensor, list]:
        """Runs the next frames x (B, C, n, H, W) at t, (B,) or (B, n): the output, and keys and
        values of the new frames, layer by layer."""
        net, config = self.net, self.net.config
        batch, _, n, height, width = x.shape
        p = config.patch
        grid = (height // p, width // p)
        stacked = torch.cat([x, *channels], dim=1)
        patches = stacked.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 2, 3, 5, 4, 6, 1)
        tokens = net.video_in(patches.flatten(4, 6).flatten(1, 3))

        frequency = 10_000.0 ** (-torch.arange(128).double() / 128)
        t = t.double() if t.dim() == 2 else t.double()[:, None].expand(-1, n)
        angles = 1000 * t.repeat_interleave(grid[0] * grid[1], dim=1)[..., None] * frequency
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        time = net.time.down(F.silu(net.time.up(waves)))
        shared = net.video_modulation(F.silu(time)).unflatten(-1, (6, -1))

        start = len(self.keys[0])
        new = range(start, start + n)
        seen = self.visible(start + n - 1)
        place = {frame: seen.index(frame) if self.relative else frame for frame in seen}
        made = []
        for layer, block in enumerate(net.blocks):
            video, cross = block.video, block.cross
            m = float_of(shared + video.modulation_bias).unbind(-2)
            y = (layer_norm(tokens) * (1 + m[1]) + m[0]).to(x.dtype)
            q, k, v = video.qkv(y).chunk(3, dim=-1)
            q, k = rms_norm(q, video.q_norm), rms_norm(k, video.k_norm)
            q, k, v = (part.unflatten(-1, (config.heads, -1)) for part in (q, k, v))
            count = grid[0] * grid[1]
            pairs = list(zip(k.split(count, dim=1), v.split(count, dim=1), strict=True))
            made.append(pairs)
            known = [*self.keys[layer], *pairs]
            keys = torch.cat([known[i][0] for i in seen], dim=1)
            values = torch.cat([known[i][1] for i in seen], dim=1)
            q = self.rotate(q, [place[i] for i in new], grid)
            keys = self.rotate(keys, [place[i] for i in seen], grid)
            tokens = self.add(tokens, m[2], video.out(attention(q, keys, values)))

            y = (layer_norm(tokens) * cross.norm.weight + cross.norm.bias).to(x.dtype)
            k, v = cross.text_kv(self.words).chunk(2, dim=-1)
            q, k = rms_norm(cross.q(y), cross.q_norm), rms_norm(k, cross.k_norm)
            q, k, v = (part.unflatten(-1, (config.heads, -1)) for part in (q, k, v))
            tokens = tokens + cross.out(attention(q, k, v))

            y = (layer_norm(tokens) * (1 + m[4]) + m[3]).to(x.dtype)
            hidden = F.gelu(video.mlp_up(y), approximate="tanh")
            tokens = self.add(tokens, m[5], video.mlp_down(hidden))
        shift, scale = float_of(net.out_table + time[:, :, None]).unbind(-2)
        y = net.video_out((layer_norm(tokens) * (1 + scale) + shift).to(x.dtype))
        y = y.unflatten(1, (n, *grid)).unflatten(-1, (p, p, -1))
        return y.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4), made

    @staticmethod
    def add(tokens: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return (float_of(tokens) + gate * float_of(branch)).to(tokens.dtype)

    def keep(self, made: list) -> None:
        """Ends a step: its frames are part of the past."""
        for known, pairs in zip(self.keys, made, strict=True):
            known.extend(pairs)

    def unipc_chunk(self, noise: Tensor, times: list[float]) -> Tensor:
        """Makes a chunk from noise (B, C, n, H, W) with UniPC, refreshed at time 0."""

        def estimate(x: Tensor, time: float) -> Tensor:
            t = torch.full((len(x),), told(time), dtype=torch.float64)
            return x - time * self.run(x, t)[0]

        clean = unipc(estimate, noise, times)
        self.keep(self.run(clean, torch.zeros(len(clean), dtype=torch.float64))[1])
        return clean

    def chunk(
        self, noise: Tensor, times: list[float], refresh: float | None, *channels: Tensor
    ) -> Tensor:
        """Makes a chunk from noise (len(times), B, C, n, H, W), one draw for each time."""
        x = noise[0]
        for index, time in enumerate(times):
            t = torch.full((len(x),), time, dtype=torch.float64)
            velocity, made = self.run(x, t, *channels)
            clean = x.double() - time * velocity.double()
            if index + 1 < len(times):
                sigma = times[index + 1]
                x = ((1 - sigma) * clean + sigma * noise[index + 1].double()).to(noise.dtype)
        clean = clean.to(noise.dtype)
        if refresh is not None:
            t = torch.full((len(x),), refresh, dtype=torch.float64)
            made = self.run(clean, t, *channels)[1]
        self.keep(made)
        return clean


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    share = float_of(scores).softmax(-1).to(q.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", share, v).flatten(2)
