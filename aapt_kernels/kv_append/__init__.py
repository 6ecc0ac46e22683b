"""Norm, rotate and append one frame to the KV cache, in place (SPEC 5)."""

import torch
from torch import Tensor

from ..backend import deferred, implement, register_fake
from ..checks import check_no_grad, sm90_limit
from ..kv_cache import KVCache
from ..qk_norm_rope import check_arguments
from . import cpu, ref


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    layer: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float = 1e-6,
    cos_sink: Tensor | None = None,
    sin_sink: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`qk_norm_rope` of one new frame; its k and v go to the cache slot that `cache.step` names,
    over the oldest frame of the ring.

    q, k, v (B, tokens_per_frame, H, D) in the cache's dtype; cos and sin (tokens_per_frame, D / 2).
    Returns the rotated q, or (q, q_sink) with cos_sink and sin_sink. Call it once per layer and
    step, before `cached_attention`.

    Raises ValueError or TypeError where the arguments do not fit the cache, and RuntimeError if
    one requires grad: what is written in place has no gradient.
    """
    tensors = {"q": q, "k": k, "v": v}
    cache.check_frame(layer, tensors)
    check_arguments(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink)
    check_no_grad("kv_append", {**tensors, "q_weight": q_weight, "k_weight": k_weight})
    q, q_sink = torch.ops.aapt.kv_append.default(
        q,
        k,
        v,
        cache.k[layer],
        cache.v[layer],
        cache.step,
        q_weight,
        k_weight,
        cos,
        sin,
        cos_sink,
        sin_sink,
        eps,
        *cache.integers,
    )
    return q if cos_sink is None else (q, q_sink)


@register_fake("kv_append")
def _(q, k, v, k_cache, v_cache, step, q_weight, k_weight, cos, sin, cos_sink, *_):
    q_sink = q.new_empty(0 if cos_sink is None else q.shape)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q_sink


implement(
    "kv_append",
    limits={"cuda": sm90_limit},
    reference=ref.forward,
    cpu=cpu.forward,
    triton=deferred(__name__),
)
