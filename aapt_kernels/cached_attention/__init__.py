"""One new frame's queries against the KV cache, in place (SPEC 3, 5)."""

import torch
from torch import Tensor

from ..backend import deferred, implement, register_fake
from ..checks import check_no_grad, sm90_limit
from ..kv_cache import KVCache
from ..precision import wide
from . import cpu, ref


def cached_attention(
    q: Tensor,
    cache: KVCache,
    layer: int,
    *,
    q_sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `block_causal_attention` gives for the frame `cache.step`: it sees its text, the sink
    frames, the window and itself. Call it after `kv_append` of the same step and layer, before
    `cache.advance()`.

    q and q_sink (B, tokens_per_frame, H, D), as `kv_append` returns them -> out like q; scale:
    1 / sqrt(D) unless given; return_lse adds (B, H, tokens_per_frame) float32 (float64 for
    float64).

    Raises ValueError or TypeError where the arguments do not fit the cache, and RuntimeError if
    one requires grad.
    """
    tensors = {"q": q} if q_sink is None else {"q": q, "q_sink": q_sink}
    cache.check_frame(layer, tensors)
    check_no_grad("cached_attention", tensors)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out, lse = torch.ops.aapt.cached_attention.default(
        q,
        cache.k[layer],
        cache.v[layer],
        cache.step,
        cache.text_lens,
        q_sink,
        *cache.integers,
        scale,
    )
    return (out, lse) if return_lse else out


@register_fake("cached_attention")
def _(q, *_):
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((batch, heads, length), dtype=wide(q.dtype))


implement(
    "cached_attention",
    limits={"cuda": sm90_limit, "triton": deferred(__name__, "limit")},
    reference=ref.reference_forward,
    cpu=cpu.forward,
    triton=deferred(__name__),
)
