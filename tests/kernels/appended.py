"""Random frames that are appended to a cache, for tests of the sm_90a kernels of kv_append."""

import torch

from aapt_kernels import KVCache, kv_append

from .oracles import normalize, rotate

TEXT = 5
EPS = 1e-5


class Appended:
    """Frames for one layer of a cache. Subclasses fill the cache and check what was appended."""

    def __init__(
        self,
        device,
        *,
        batch=1,
        tokens=7,
        heads=3,
        head_dim=64,
        weight_dtype=torch.float32,
        across_heads=False,
        window_frames=2,
        sink_frames=1,
        frames=1,
        seed=0,
        **options,
    ):
        self.device, self.shape = device, (batch, frames * tokens, heads, head_dim)
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = KVCache(
            batch,
            2,
            heads,
            head_dim,
            text_tokens=TEXT,
            tokens_per_frame=tokens,
            window_frames=window_frames,
            sink_frames=sink_frames,
            device=device,
            **options,
        )
        self.fill()
        weight = (heads, head_dim) if across_heads else (head_dim,)
        weights = torch.rand(2, *weight, generator=self.generator) + 0.5
        self.weights = weights.to(device, weight_dtype).unbind()
        self.angles, self.sink_angles = self.make_angles(), self.make_angles()

    def fill(self):
        """Fill the new cache with what no step may leave behind."""
        raise NotImplementedError

    def make_angles(self):
        angles = torch.rand(self.shape[1], self.shape[3] // 2, generator=self.generator) * 6.3
        return angles.cos().to(self.device), angles.sin().to(self.device)

    def make_qkv(self):
        """Random float32 projections on the CPU, (batch, tokens, 3, heads, head_dim)."""
        batch, tokens, heads, head_dim = self.shape
        return torch.randn(batch, tokens, 3, heads, head_dim, generator=self.generator)

    def make_frame(self):
        """q, k, v: strided views of one projection, as a model makes them."""
        return self.make_qkv().bfloat16().to(self.device).unbind(2)

    def append(self, q, k, v):
        """Append one step to layer 1. Returns pairs of what came back and its float64 value, for q
        and q_sink, and the float64 values of the keys."""
        sink = dict(zip(("cos_sink", "sin_sink"), self.sink_angles))
        made = kv_append(q, k, v, self.cache, 1, *self.weights, *self.angles, eps=EPS, **sink)
        q, k = (normalize(x, weight, EPS) for x, weight in zip((q, k), self.weights, strict=True))
        exact = (rotate(q, *angles) for angles in (self.angles, self.sink_angles))
        return list(zip(made, exact, strict=True)), rotate(k, *self.angles)

    def rows(self, slots):
        """The cache's rows of the frames in these slots."""
        tokens = self.cache.tokens_per_frame
        return [TEXT + slot * tokens + token for slot in slots for token in range(tokens)]
