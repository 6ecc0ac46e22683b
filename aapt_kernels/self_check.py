"""Checks of a float8 cache at its first use, so that its noise is never silent (docs/method.md#16).

Here is what all share, and the check of keys and values as they are stored; in the folders of
`kv_append` and `cached_attention` is what these compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .precision import dequantise, hadamard, quantise, wide

if TYPE_CHECKING:
    from .kv_cache import KVCache

ROWS = 16  # of a sample, per head
# Relative L2 error of keys and values of a head. E4M3 loses 2.6 % of normal numbers.
MOST_LOSS = 0.06


class SelfCheckError(RuntimeError):
    """Says which head of a float8 cache loses too much, and what to do.

    loss: what is lost, and where. mend: what those who make the cache can do. The message is both.
    """

    def __init__(self, loss: str, mend: str):
        super().__init__(f"{loss}; {mend}")
        self.loss, self.mend = loss, mend

    def __reduce__(self):
        return type(self), (self.loss, self.mend)


def is_due(cache: KVCache, op: str, layer: int, x: Tensor) -> bool:
    """Return whether no call of an op with as many tokens as x (B, L, H, D) has been checked for
    this layer. A call in a captured or compiled step is not checked, because the check waits for
    the device, nor one on the meta device, where no numbers are."""
    if cache.k_scale is None or not cache.self_check or torch.compiler.is_compiling() or x.is_meta:
        return False
    if (op, layer, x.shape[1]) in cache.checked:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def sample(length: int, device: torch.device) -> Tensor:
    """Return at most ROWS indices, evenly spread over `length`."""
    count = min(ROWS, length)
    return torch.arange(count, device=device) * length // count


def check_stored(cache: KVCache, op: str, layer: int, length: int, stored, exact) -> Tensor:
    """Compare stored keys and values (B, L, H, D) with exact ones, of which the keys are not yet
    multiplied by the Hadamard matrix, head by head. Returns the errors of the keys.

    Raises SelfCheckError if the relative L2 error of a head is more than MOST_LOSS, and says
    whether the scale is to blame or the code that has stored. A head that is zero or not finite
    says nothing: the layer is then checked again in the next call.
    """
    known, errors = [], []
    for name, found, x, scale in zip("kv", stored, exact, cache.scales(layer), strict=True):
        x = x.to(wide(x.dtype))
        if name == "k" and cache.use_hadamard:
            x = hadamard(x)
        size = norm(x)
        error, own = (
            dequantise(y, scale, x.dtype) - x for y in (found, quantise(x, scale, found.dtype))
        )
        found, rounded = norm(error) / size, norm(own) / size
        errors.append(error)
        counts = size.isfinite() & (size > 0)
        known.append(counts)
        wrong = (counts & ~(found <= MOST_LOSS)).nonzero().flatten().tolist()
        if wrong:
            raise _error(name, op, layer, wrong[0], found, rounded)
    if torch.stack(known).all():
        cache.checked.add((op, layer, length))
    return errors[0]


def norm(x: Tensor) -> Tensor:
    """Return the norms (H,) of the heads of x (B, L, H, D)."""
    return x.square().sum((0, 1, 3)).sqrt()


def _error(
    name: str, op: str, layer: int, head: int, found: Tensor, rounded: Tensor
) -> SelfCheckError:
    loss = (
        f"{op}: expected {name} as stored to be within {100 * MOST_LOSS:.0f} % of what was given, "
        f"got {100 * float(found[head]):.1f} % in head {head} of layer {layer}"
    )
    if rounded[head] <= MOST_LOSS:
        loss += f"; rounding loses {100 * float(rounded[head]):.1f} %, so the fault is in {op}"
        return SelfCheckError(loss, 'run it under use_backend("reference"), and report it')
    mend = (
        f"set {name}_scale[{layer}, {head}] of the cache to the largest number of the head / 448, "
        f"or make the cache with dtype=torch.bfloat16"
    )
    return SelfCheckError(loss, mend)
