"""Check of attention to a float8 cache against attention in float32 to the same cache."""

import torch
from torch import Tensor

from ..backend import choose
from ..kv_cache import KVCache
from ..self_check import SelfCheckError, sample
from . import ref

# With q and the weights in E4M3, Gaussian inputs give 0.999, peaked scores 0.998, and keys whose
# norms vary a hundredfold 0.97
LEAST_COSINE = 0.99


def rounds_weights(*arguments) -> bool:
    """Return whether cached_attention rounds q and the weights for these arguments."""
    return choose("cached_attention", *arguments) in ("cuda", "sim", "triton")


def check_attention(
    cache: KVCache, layer: int, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments
) -> None:
    """Compare a sample of rows of `out` with float32 attention to the cache, head by head. q, k, v
    and the rest: arguments of the op.

    Raises SelfCheckError if the cosine of a head is below LEAST_COSINE, also for NaN. A head whose
    exact rows are zero or not finite says nothing: the layer is then checked again in the next
    call.
    """
    step, text_lens, q_sink, *geometry, scale, k_scale, v_scale, _ = arguments
    text_tokens, tokens, _, sink_frames = geometry
    length = q.shape[1]
    seen = ref.visible(step, length // tokens, text_lens, k.shape[1], geometry)
    sink = slice(text_tokens, text_tokens + sink_frames * tokens)
    rows = sample(length, q.device)
    q, q_sink, out = (x if x is None else x[:, rows].float() for x in (q, q_sink, out))
    cosines, known = [], []
    for head in range(q.shape[2]):  # one at a time, because a cache in float32 is large
        one = slice(head, head + 1)
        of_head = (x if x is None else x[:, :, one] for x in (q, k, v, q_sink))
        exact, _ = ref.attend(*of_head, seen, sink, scale, k_scale[one], v_scale[one])
        size, ours = exact.norm(), out[:, :, one]
        cosines.append((exact * ours).sum() / (size * ours.norm()))
        known.append(size.isfinite() & (size > 0))
    cosines, known = torch.stack(cosines), torch.stack(known)
    wrong = (known & ~(cosines >= LEAST_COSINE)).nonzero().flatten().tolist()
    if wrong:
        raise SelfCheckError(
            f"cached_attention: expected a cosine of at least {LEAST_COSINE} with attention in "
            f"float32, got {float(cosines[wrong[0]]):.4f} in head {wrong[0]} of layer {layer}",
            "norm queries and keys, or make the cache with dtype=torch.bfloat16",
        )
    if known.all():
        cache.checked.add(("cached_attention", layer, length))
