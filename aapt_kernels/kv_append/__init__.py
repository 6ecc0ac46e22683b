"""Norm, rotate and append new frames to the KV cache, in place (docs/method.md#5)."""

import torch
from torch import Tensor

from ..backend import deferred, for_simulator, implement, register_fake
from ..checks import (
    cache_limit,
    check_no_grad,
    check_no_tangent,
    sm90_limit,
    transposed_limit,
)
from ..kv_cache import QUANTISED, KVCache
from ..precision import follow_autocast
from ..qk_norm_rope import check_arguments
from ..schemas import ops
from ..self_check import is_due
from . import cpu, ref
from .self_check import check_append


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
    """Apply `qk_norm_rope` to n new frames and write their k and v to the cache slots of frames
    `cache.step` to `cache.step + n - 1`, over the oldest frames of the ring.

    q, k, v (B, n * tokens_per_frame, H, D) with n from 1 to window_frames + 1, in the cache's
    `compute_dtype`, to which autocast casts them; cos and sin (n * tokens_per_frame, D / 2). A
    float8 cache stores k / k_scale and v / v_scale, limited to the largest finite value. Returns
    the rotated q, or (q, q_sink) if cos_sink and sin_sink are given, in the dtype of q. With
    `cache.use_hadamard`, k and what is returned are multiplied by the Hadamard matrix of a head.
    Call it once per layer and step, before `cached_attention`; a second call in a step writes the
    frames anew. The first call for a layer and a number of frames of a float8 cache is checked on a
    sample of rows, see `KVCache`.

    Raises ValueError or TypeError if an argument does not fit the cache, RuntimeError if the check
    fails or an argument requires grad, because writing in place has no gradient, and
    NotImplementedError in forward-mode differentiation.
    """
    q, k, v = follow_autocast(q, k, v, dtype=cache.compute_dtype)
    tensors = {"q": q, "k": k, "v": v}
    cache.check_frames(layer, tensors)
    check_arguments(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink)
    tensors |= {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    tensors |= {"cos_sink": cos_sink, "sin_sink": sin_sink}
    check_no_tangent("kv_append", tensors)
    check_no_grad("kv_append", tensors)
    q, k, v, q_weight, k_weight, cos, sin, cos_sink, sin_sink = for_simulator(
        q, k, v, q_weight, k_weight, cos, sin, cos_sink, sin_sink
    )
    q, q_sink = ops.kv_append.default(
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
        *cache.scales(layer),
        cache.use_hadamard,
    )
    if cache.k_scale is not None and is_due(cache, "kv_append", layer, k):
        check_append(cache, layer, q, k, v, k_weight, cos, sin, eps)
    return q if cos_sink is None else (q, q_sink)


@register_fake("kv_append")
def _(q, k, v, k_cache, v_cache, step, q_weight, k_weight, cos, sin, cos_sink, *_):
    q_sink = q.new_empty(0 if cos_sink is None else q.shape)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q_sink


def _sm90_limit(q, k=None, v=None, k_cache=None, v_cache=None, step=None, *rest):
    """`sm90_limit`; weights of one dtype, bfloat16 or float32, and tables of float32."""
    names = ("q_weight", "k_weight", "cos", "sin", "cos_sink", "sin_sink")
    rest = {name: x for name, x in zip(names, rest, strict=False) if x is not None}
    tensors = dict(k=k, v=v, k_cache=k_cache, **rest)
    if k_cache is not None and k_cache.dtype in QUANTISED:
        reason = sm90_limit(q, **tensors) or transposed_limit("v_cache", v_cache)
    else:
        reason = cache_limit(q, k_cache) or sm90_limit(q, v_cache=v_cache, **tensors)
    first = next(iter(rest.values()), None)
    for name, tensor in {} if reason else rest.items():
        dtype = torch.float32
        if name in names[:2] and first.dtype == torch.bfloat16:
            dtype = first.dtype
        if tensor.dtype != dtype:
            return f"{name}: expected a contiguous tensor of {dtype}, got {tensor.dtype}"
    return reason


implement(
    "kv_append",
    limits={"cuda": _sm90_limit, "triton": deferred(__name__, "limit")},
    reference=ref.forward,
    cpu=cpu.forward,
    triton=deferred(__name__),
)
