"""Attention of new frames to the KV cache, which is read in place (docs/method.md#3, #5)."""

import torch
from torch import Tensor

from ..backend import deferred, for_simulator, implement, register_fake
from ..checks import (
    cache_limit,
    check_no_grad,
    check_no_tangent,
    grouped_limit,
    scale_limit,
    sm90_limit,
    transposed_limit,
)
from ..kv_cache import KEY_GROUP, QUANTISED, KVCache
from ..precision import follow_autocast, wide
from ..schemas import ops
from ..self_check import is_due
from . import cpu, ref
from .past import merge
from .self_check import check_attention, rounds_weights


def cached_attention(
    q: Tensor,
    cache: KVCache,
    layer: int,
    *,
    q_sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from n new frames to the text, the sink frames, the window and each other. Call it
    after `kv_append` of the same step and layer, before `cache.advance(n)`.

    The n frames, `cache.step` to `last = cache.step + n - 1`, share one window that ends with the
    last: every query sees frames last - window_frames ... last. For n = 1 that is what
    `block_causal_attention` gives for frame `cache.step`.

    q and q_sink (B, n * tokens_per_frame, H, D), as `kv_append` returns them -> out like q;
    autocast casts both to the cache's `compute_dtype`. scale: factor of the scores, 1 / sqrt(D)
    unless given. return_lse also returns the log-sum-exp of the scores,
    (B, H, n * tokens_per_frame) float32 (float64 for float64).

    A slot that the frames do not see, such as one before `cache.reset()`, never reaches the
    output, not even as NaN.

    A cache with `past_dtype` takes two calls, merged by their log-sum-exp: one sees text, sink and
    the newest frame, the other the frames between. Kernels on a float8 cache round q and the
    weights to float8 too. Their first call for a layer and a number of frames is checked against
    float32 on a sample of rows, see `KVCache`.

    Raises ValueError or TypeError if an argument does not fit the cache, RuntimeError if one
    requires grad or the check fails, and NotImplementedError in forward-mode differentiation.
    """
    q, q_sink = follow_autocast(q, q_sink, dtype=cache.compute_dtype)
    tensors = {"q": q} if q_sink is None else {"q": q, "q_sink": q_sink}
    cache.check_frames(layer, tensors)
    check_no_tangent("cached_attention", tensors)
    check_no_grad("cached_attention", tensors)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out, lse = _attend(q, q_sink, cache, layer, cache.step, scale)
    if cache.past is not None:
        past = cache.past
        # The op counts the queries' own frame, which is not in the past; it sees one at least
        step = (past.step - 1).clamp(min=0)
        if past.signs is not None:  # exact, so that what they lack is in the scale
            with torch.autocast(q.device.type, enabled=False):  # q keeps its dtype
                q, scale = q @ past.signs, scale * q.shape[-1] ** -0.5
        out, lse = merge(out, lse, *_attend(q, None, past, layer, step, scale), past.step > 0)
    return (out, lse) if return_lse else out


def _attend(q, q_sink, cache, layer, step, scale) -> tuple[Tensor, Tensor]:
    """Attend to a cache of one dtype at `step`, and check the result if that is due."""
    q, q_sink = for_simulator(q, q_sink)
    arguments = (
        q,
        cache.k[layer],
        cache.v[layer],
        step,
        cache.text_lens,
        q_sink,
        *cache.integers,
        scale,
        *cache.scales(layer),
        cache.ready_workspace(),
    )
    out, lse = ops.cached_attention.default(*arguments)
    if cache.k_scale is not None and is_due(cache, "cached_attention", layer, q):
        if rounds_weights(*arguments):
            check_attention(cache, layer, out, *arguments)
    return out, lse


@register_fake("cached_attention")
def _(q, *_):
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((batch, heads, length), dtype=wide(q.dtype))


def _sm90_limit(q, k_cache=None, v_cache=None, step=None, text_lens=None, q_sink=None, *options):
    scale = options[4] if options else None
    tensors = dict(k_cache=k_cache, text_lens=text_lens, q_sink=q_sink)
    if k_cache is None or k_cache.dtype not in QUANTISED:
        reason = cache_limit(q, k_cache) or sm90_limit(q, v_cache=v_cache, **tensors)
    elif q.shape[-1] != 128:
        reason = f"it takes a head_dim of 128 with a cache of float8, got {q.shape[-1]}"
    else:
        reason = (
            sm90_limit(q, **tensors)
            or grouped_limit("k_cache", k_cache, KEY_GROUP)
            or transposed_limit("v_cache", v_cache)
        )
    return reason or scale_limit(scale)


implement(
    "cached_attention",
    limits={"cuda": _sm90_limit, "triton": deferred(__name__, "limit")},
    reference=ref.reference_forward,
    cpu=cpu.forward,
    triton=deferred(__name__),
)
