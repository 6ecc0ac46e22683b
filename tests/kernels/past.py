"""A stream over a cache whose past is float8, with an oracle in float64, for tests of all
backends."""

import torch

from aapt_kernels import KVCache, cached_attention, kv_append

from .oracles import attend, hadamard_matrix, rotate, round_to_e4m3

E4M3 = torch.float8_e4m3fn
TEXT, LAYER = 5, 1


class Stream:
    """A cache that is NaN where nothing has been stored, and every key and value beside it."""

    def __init__(
        self,
        device="cpu",
        *,
        dtype=torch.float64,
        window=2,
        sink=1,
        tokens=6,
        heads=3,
        head_dim=8,
        text_lens=(TEXT, 2),
        use_hadamard=True,
        self_check=True,
    ):
        self.device, self.dtype, self.window, self.sink = device, dtype, window, sink
        self.shape = (len(text_lens), tokens, heads, head_dim)
        self.generator = torch.Generator().manual_seed(0)
        self.cache = KVCache(
            *(len(text_lens), 2, heads, head_dim),
            **dict(text_tokens=TEXT, tokens_per_frame=tokens, window_frames=window),
            **dict(sink_frames=sink, dtype=dtype, past_dtype=E4M3, use_hadamard=use_hadamard),
            **dict(self_check=self_check, device=device),
        )
        past = self.cache.past
        for x in (self.cache.k, self.cache.v):
            x.fill_(torch.nan)
        for x in (past.k, past.v):
            x.view(torch.uint8).fill_(0x7F)
        self.scales = [0.01 * (1 + torch.arange(heads)), 0.015 * (1 + torch.arange(heads))]
        past.k_scale[LAYER], past.v_scale[LAYER] = (x.to(device) for x in self.scales)
        self.matrix = hadamard_matrix(head_dim) if use_hadamard else torch.eye(head_dim).double()
        self.text_lens = torch.tensor(text_lens)
        self.text = [self.normal(len(text_lens), TEXT, heads, head_dim) for _ in range(2)]
        self.cache.write_text(LAYER, *(x.to(device) for x in self.text), self.text_lens)
        self.frames = []  # keys, turned, and values of every frame

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def step(self, pinned=False, passes=1):
        """Append a frame, attend, end the step. Return out and lse, and both from the oracle, of
        exact weights and of weights in E4M3."""
        for _ in range(passes):
            q, k, v = (self.normal(*self.shape) for _ in range(3))
            angles = torch.rand(2, *self.shape[1::2], generator=self.generator)[..., ::2] * 6.3
            tables = [x.to(self.device) for x in (*angles.cos(), *angles.sin())]
            cos, cos_sink, sin, sin_sink = tables
            given = (x.to(self.device) for x in (q, k, v))
            options = dict(cos_sink=cos_sink, sin_sink=sin_sink) if pinned else {}
            made = kv_append(*given, self.cache, LAYER, None, None, cos, sin, **options)
            made, q_sink = made if pinned else (made, None)
            ours = cached_attention(made, self.cache, LAYER, q_sink=q_sink, return_lse=True)
        k = rotate(k, angles[0].cos(), angles[0].sin()).to(self.dtype)
        self.frames.append((k, v))
        self.cache.advance()
        q_sink = q_sink if q_sink is None else q_sink.cpu()
        return [x.cpu() for x in ours], *(self.attend(made.cpu(), q_sink, e) for e in (False, True))

    def stored(self, k, v):
        """The past as the cache keeps it, keys turned back."""
        k, v = (
            round_to_e4m3(x / scale[:, None]) * scale[:, None].double()
            for x, scale in zip((k.double() @ self.matrix, v.double()), self.scales, strict=True)
        )
        return k @ self.matrix, v

    def attend(self, q, q_sink, rounds):
        tokens, scale = self.shape[1], self.shape[3] ** -0.5
        sinks, newest = self.frames[:-1][: self.sink], self.frames[-1]
        past = self.frames[self.sink : -1][-self.window :]
        near = [torch.cat([x, *y, z], 1) for x, y, z in zip(self.text, pairs(sinks), newest)]
        seen = torch.ones(near[0].shape[:2], dtype=torch.bool)
        seen[:, :TEXT] = torch.arange(TEXT) < self.text_lens[:, None]
        sink = slice(TEXT, TEXT + min(len(self.frames), self.sink) * tokens)
        out, lse = attend(q, *near, seen, scale, q_sink=q_sink, sink=sink)
        if not past:
            return out, lse
        far = [torch.cat(x, 1) for x in zip(*(self.stored(*frame) for frame in past), strict=True)]
        turned = q.double() @ self.matrix
        if self.cache.past.use_hadamard:  # rounded after a product with the signs of the matrix
            root = self.shape[3] ** 0.5
            turned = (turned * root).to(self.dtype).double() / root
        turned = [turned, far[0] @ self.matrix]
        seen = torch.ones(far[0].shape[:2], dtype=torch.bool)
        other, other_lse = attend(*turned, far[1], seen, scale, e4m3=rounds)
        merged = torch.logaddexp(lse, other_lse)
        weights = ((x - merged).exp().transpose(1, 2)[..., None] for x in (lse, other_lse))
        return sum(x * weight for x, weight in zip((out, other), weights, strict=True)), merged


def pairs(frames):
    """Keys and values of frames, in lists."""
    return [[k for k, _ in frames], [v for _, v in frames]]


def relative(x, y):
    return float((x.double() - y).norm() / y.norm())
