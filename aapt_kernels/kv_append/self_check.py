"""Check of what kv_append has stored in a float8 cache, against its arguments."""

from torch import Tensor

from ..kv_cache import KVCache
from ..precision import as_bits, wide
from ..qk_norm_rope.ref import normalise, rotate
from ..self_check import check_stored, sample
from .ref import cache_rows


def check_append(
    cache: KVCache,
    layer: int,
    k: Tensor,
    v: Tensor,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> None:
    """Compare a sample of rows, as kv_append has stored them, with its arguments k and v (B, L, H,
    D), normalised and rotated here. Raises RuntimeError as `check_stored`."""
    rows = sample(k.shape[1], k.device)
    exact = k[:, rows].to(wide(k.dtype))
    exact = normalise(exact, k_weight, eps)
    exact = rotate(exact, *(x if x is None else x[rows] for x in (cos, sin)))
    index = cache_rows(cache.step, rows, cache.integers)
    stored = (as_bits(x[layer])[:, index].view(x.dtype) for x in (cache.k, cache.v))
    check_stored(cache, "kv_append", layer, k.shape[1], stored, (exact, v[:, rows]))
