"""Small calls of every op, as functions of the tensors that they could be differentiated in."""

from collections.abc import Callable

import torch
from torch import Tensor

from aapt_kernels import (
    FrameLayout,
    KVCache,
    bias_gelu,
    block_causal_attention,
    cached_attention,
    causal_conv3d,
    kv_append,
    modulated_norm,
    qk_norm_rope,
)

LAYOUT = FrameLayout(5, 3, 4, 2)
LENGTH, TOKENS, HEADS = LAYOUT.query_length, 3, 2
DIFFERENTIABLE = (
    "block_causal_attention",
    "qk_norm_rope",
    "causal_conv3d",
    "modulated_norm",
    "bias_gelu",
)
CACHED = ("kv_append", "cached_attention")

Call = tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]


def make_cache(head_dim=8, dtype=torch.float32, device="cpu") -> KVCache:
    sizes = dict(text_tokens=2, tokens_per_frame=TOKENS, window_frames=2)
    return KVCache(1, 2, HEADS, head_dim, **sizes, dtype=dtype, device=device)


def make_call(op: str, dtype=torch.float32, head_dim=8, device="cpu", batch=1) -> Call:
    """Return (function, tensors): function(*tensors) returns all results of the op as a tuple."""

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float32).to(device, dtype)

    if op == "block_causal_attention":
        shape = (batch, LENGTH, HEADS, head_dim)
        lens = torch.full((batch,), 3, device=device)

        def attend(q, k, v, q_sink):
            options = dict(text_lens=lens, q_sink=q_sink, return_lse=True)
            return block_causal_attention(q, k, v, LAYOUT, **options)

        q_sink = normal(batch, LENGTH - LAYOUT.text_tokens, HEADS, head_dim)
        return attend, [*(normal(*shape) for _ in range(3)), q_sink]
    if op == "qk_norm_rope":
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        tables = torch.rand(4, LENGTH, head_dim // 2, dtype=precise).to(device)
        sink = dict(cos_sink=tables[2], sin_sink=tables[3])

        def rotate(q, k, q_weight, k_weight):
            return qk_norm_rope(q, k, q_weight, k_weight, *tables[:2], **sink)

        shape = (batch, LENGTH, HEADS, head_dim)
        return rotate, [normal(*shape), normal(*shape), normal(head_dim), normal(head_dim)]
    if op == "modulated_norm":

        def norm(x, shift, scale, weight):
            return (modulated_norm(x, shift, scale, weight=weight),)

        modulation = normal(batch, 2, 2, head_dim)
        return norm, [normal(batch, 6, head_dim), *modulation.unbind(1), normal(head_dim)]
    if op == "bias_gelu":

        def activate(x, bias):
            return (bias_gelu(x, bias),)

        return activate, [normal(batch, 6, head_dim), normal(head_dim)]
    if op == "causal_conv3d":

        def convolve(x, weight, bias, norm_weight, residual):
            options = dict(norm_weight=norm_weight, silu=True, residual=residual)
            return causal_conv3d(x, weight, bias, **options)[:1]

        x, weight = normal(batch, 8, 2, 4, 4), normal(8, 8, 3, 3, 3)
        return convolve, [x, weight, normal(8), normal(8), normal(batch, 8, 2, 4, 4)]
    cache = make_cache(head_dim, dtype, device)
    frame = (1, TOKENS, HEADS, head_dim)
    cache.k.copy_(normal(*cache.k.shape))
    cache.v.copy_(normal(*cache.v.shape))
    if op == "kv_append":

        def append(q, k, v, q_weight):
            return (kv_append(q, k, v, cache, 0, q_weight, None, None, None),)

        return append, [*(normal(*frame) for _ in range(3)), normal(head_dim)]

    def look_back(q, q_sink):
        return cached_attention(q, cache, 0, q_sink=q_sink, return_lse=True)

    return look_back, [normal(*frame), normal(*frame)]
