"""Random numbers that depend on what they are for, not on what was drawn before."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ClipRandom:
    """The random numbers of one update: each of its clips has a generator of its own.

    A rank that trains some clips of a batch draws for them what one rank alone would have drawn,
    and a run resumed at update n goes on as if it had never stopped: no random state is saved.

    Args:
        seed, step: Of the run, and the number of the update.
        clips: Which of the update's clips these are.
        device: Where tensors go; they are drawn on the CPU, the same for every device.
    """

    def __init__(self, seed: int, step: int, clips: range, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        # Four words, so that no clip's numbers are those of all clips together.
        self.shared = np.random.Generator(np.random.Philox([seed, step, 0, 1]))
        self._clips = [np.random.Generator(np.random.Philox([seed, step, i, 0])) for i in clips]

    def __len__(self) -> int:
        return len(self._clips)

    def normal(self, *shape: int) -> Tensor:
        """(clips, *shape) float32."""
        return self._stack([g.standard_normal(shape, np.float32) for g in self._clips])

    def uniform(self, *shape: int) -> Tensor:
        """(clips, *shape) float32 in [0, 1)."""
        return self._stack([g.random(shape, np.float32) for g in self._clips])

    def integers(self, high: int | Sequence[int]) -> list[int]:
        """One per clip in [0, high); `high` may differ from clip to clip."""
        limits = [high] * len(self) if isinstance(high, int) else high
        return [int(g.integers(limit)) for g, limit in zip(self._clips, limits, strict=True)]

    def _stack(self, draws: list) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(draw) for draw in draws])).to(self.device)
