"""Check of what kv_append has stored in a float8 cache, against its arguments."""

import torch
from torch import Tensor

from ..kv_cache import KVCache
from ..precision import as_bits, wide
from ..qk_norm_rope.ref import normalise, rotate
from ..self_check import SelfCheckError, check_stored, sample
from .ref import cache_rows

# Root mean square over the scores of a head, in nats: attention then has a cosine of 0.99 with the
# exact one. Gaussian inputs give 0.03, peaked scores 0.1, a norm with four weights of 8 0.3 without
# the Hadamard matrix and 0.08 with it (benchmarks/float8_accuracy.py).
MOST_CHANGE = 0.15


def check_append(
    cache: KVCache,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> None:
    """Compare a sample of rows, as kv_append has stored them, with its arguments k and v (B, L, H,
    D), normalised and rotated here; and scores of its result q with those of exact keys.

    Raises SelfCheckError as `check_stored`, and if the scores of a head change by more than
    MOST_CHANGE.
    """
    rows = sample(k.shape[1], k.device)
    exact = k[:, rows].to(wide(k.dtype))
    exact = normalise(exact, k_weight, eps)
    exact = rotate(exact, *(x if x is None else x[rows] for x in (cos, sin)))
    index = cache_rows(cache.step, rows, cache.integers)
    stored = (as_bits(x[layer])[:, index].view(x.dtype) for x in (cache.k, cache.v))
    errors = check_stored(cache, "kv_append", layer, k.shape[1], stored, (exact, v[:, rows]))
    changes = torch.einsum("bqhd,bkhd->bhqk", q[:, rows].to(errors.dtype), errors)
    changes = changes.square().mean((0, 2, 3)).sqrt() * k.shape[-1] ** -0.5
    wrong = (changes > MOST_CHANGE).nonzero().flatten().tolist()
    if wrong:
        cache.checked.discard(("kv_append", layer, k.shape[1]))
        mend = "with dtype=torch.bfloat16"
        if not cache.use_hadamard:
            mend = f"with use_hadamard=True or {mend}"
        raise SelfCheckError(
            f"kv_append: expected rounded keys to change scores by at most {MOST_CHANGE}, got "
            f"{float(changes[wrong[0]]):.2f} in head {wrong[0]} of layer {layer}",
            f"make the cache {mend}",
        )
