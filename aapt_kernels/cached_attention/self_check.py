"""Check of attention to a float8 cache against float32, so that its noise is never silent
(docs/method.md#16)."""

import torch
from torch import Tensor

from ..backend import choose
from ..kv_cache import KVCache
from . import ref

ROWS = 16  # queries per sample and head
# With q and the weights in E4M3, Gaussian inputs give 0.999, peaked scores 0.998, and keys whose
# norms vary a hundredfold 0.97
LEAST_COSINE = 0.99


def is_due(cache: KVCache, layer: int, q: Tensor, *arguments) -> bool:
    """Return whether a call rounds q and the weights, and has not been checked for this layer and
    number of queries. A call in a captured or compiled step is not: the check waits for the
    device."""
    if not cache.self_check or torch.compiler.is_compiling():
        return False
    if (layer, q.shape[1]) in cache.checked:
        return False
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return choose("cached_attention", q, *arguments) in ("cuda", "sim", "triton")


def check(out: Tensor, q: Tensor, q_sink: Tensor | None, cache: KVCache, layer: int, scale: float):
    """Compare a sample of rows of a result with float32 attention to the cache, head by head.

    Raises RuntimeError if the cosine of a head is below LEAST_COSINE, also for NaN. A head whose
    exact rows are zero or not finite says nothing: the layer is then checked again in the next
    call.
    """
    tokens, geometry = cache.tokens_per_frame, cache.integers
    k, v = cache.k[layer], cache.v[layer]
    seen = ref.visible(cache.step, q.shape[1] // tokens, cache.text_lens, k.shape[1], geometry)
    sink = slice(cache.text_tokens, cache.text_tokens + cache.sink_frames * tokens)
    queries = q.shape[1]
    count = min(ROWS, queries)
    rows = torch.arange(count, device=q.device) * queries // count
    q, q_sink, out = (x if x is None else x[:, rows].float() for x in (q, q_sink, out))
    cosines, known = [], []
    for head in range(q.shape[2]):  # one at a time, because a cache in float32 is large
        one = slice(head, head + 1)
        scales = (x[one] for x in cache.scales(layer))
        of_head = (x if x is None else x[:, :, one] for x in (q, k, v, q_sink))
        exact, _ = ref.attend(*of_head, seen, sink, scale, *scales)
        size, ours = exact.norm(), out[:, :, one]
        cosines.append((exact * ours).sum() / (size * ours.norm()))
        known.append(size.isfinite() & (size > 0))
    cosines, known = torch.stack(cosines), torch.stack(known)
    wrong = (known & ~(cosines >= LEAST_COSINE)).nonzero().flatten().tolist()
    if wrong:
        raise RuntimeError(
            f"cached_attention: expected a cosine of at least {LEAST_COSINE} with attention in "
            f"float32, got {float(cosines[wrong[0]]):.4f} in head {wrong[0]} of layer {layer}; "
            f"norm queries and keys, or make the cache with dtype=torch.bfloat16"
        )
    if known.all():
        cache.checked.add((layer, queries))
