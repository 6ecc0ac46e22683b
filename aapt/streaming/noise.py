"""Counter-based noise: a step's noise is a function of its seed and its number alone.

Philox4x32-10 (Salmon et al., 2011) and Box-Muller, in tensor operations: nothing is remembered
between steps, nothing is read on the host, and a CUDA graph can hold it. So a stream that is
restored at step n draws what it drew before.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
WORD = 0xFFFFFFFF  # a word has 32 bits, held in an int64
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the two words of the key after each round


def philox(counters: Tensor, keys: Tensor, multipliers: Tensor) -> Tensor:
    """Random words of counters: (4, n) int64 each.

    keys: (ROUNDS, 2, 1), see `round_keys`; multipliers: MULTIPLIERS as (2, 1), on the same device.
    """
    even, odd = counters[0::2], counters[1::2]  # (2, n)
    for key in keys:
        product = even * multipliers  # wraps, which leaves all 64 bits right
        high, low = (product >> 32) & WORD, product & WORD
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
    return torch.stack([even, odd], dim=1).flatten(0, 1)


def round_keys(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key of every round, (ROUNDS, 2, 1) int64, for a seed from 0 to 2**64 - 1."""
    words = (seed & WORD, seed >> 32 & WORD)
    keys = [[(word + i * step) & WORD for word, step in zip(words, WEYL)] for i in range(ROUNDS)]
    return torch.tensor(keys, device=device)[:, :, None]


class Noise:
    """Standard normal noise of `shape` for each step of one stream.

    seed: from 0 to 2**64 - 1. Noise of two seeds, and of two steps, is independent.
    """

    def __init__(self, seed: int, shape: Sequence[int], device: torch.device | str = "cpu"):
        self.shape = tuple(shape)
        self.keys = round_keys(seed, device)
        self.multipliers = torch.tensor(MULTIPLIERS, device=device)[:, None]
        self.counters = torch.zeros(4, -(-math.prod(shape) // 4), dtype=torch.int64, device=device)
        self.counters[0] = torch.arange(self.counters.shape[1])

    def reseed(self, seed: int) -> None:
        """Draws from another seed from now on, at the addresses that a captured step reads."""
        self.keys.copy_(round_keys(seed))

    def __call__(self, step: int | Tensor) -> Tensor:
        """The noise of one step, float32. step: a number, or a () int64 tensor on the device."""
        counters = self.counters.clone()
        counters[2:3] = step & WORD
        counters[3:4] = step >> 32
        words = philox(counters, self.keys, self.multipliers)
        uniform = (words.double() + 0.5) * 2.0**-32  # in (0, 1), never 0
        radius = (-2 * uniform[0::2].log()).sqrt()
        angle = 2 * math.pi * uniform[1::2]
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()]).float()
        return normal.flatten()[: math.prod(self.shape)].view(self.shape)
