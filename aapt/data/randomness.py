"""Random numbers that depend on their purpose and not on earlier draws."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ClipRandom:
    """The random numbers of one update: each of its clips has a generator of its own.

    So a rank with some clips of a batch draws the numbers that a single rank would draw for these
    clips. A run resumed at update n draws the numbers of an uninterrupted run, although no random
    state is saved.

    Args:
        seed: Seed of the run.
        step: Number of the update.
        clips: Numbers of this rank's clips within the update.
        device: Device of the tensors. The numbers are drawn on the CPU and do not depend on it.
    """

    def __init__(self, seed: int, step: int, clips: range, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        # The fourth word keeps the shared numbers apart from those of the clips.
        self.shared = np.random.Generator(np.random.Philox([seed, step, 0, 1]))
        self._clips = [np.random.Generator(np.random.Philox([seed, step, i, 0])) for i in clips]

    def __len__(self) -> int:
        return len(self._clips)

    def normal(self, *shape: int) -> Tensor:
        """Draw normal numbers (clips, *shape), float32."""
        return self._stack([g.standard_normal(shape, np.float32) for g in self._clips])

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers (clips, *shape) in [0, 1), float32."""
        return self._stack([g.random(shape, np.float32) for g in self._clips])

    def integers(self, high: int | Sequence[int]) -> list[int]:
        """Draw one integer per clip in [0, high); `high` may differ from clip to clip."""
        limits = [high] * len(self) if isinstance(high, int) else high
        return [int(g.integers(limit)) for g, limit in zip(self._clips, limits, strict=True)]

    def _stack(self, draws: list) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(draw) for draw in draws])).to(self.device)
