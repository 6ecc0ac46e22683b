"""The training stages, one file each.

A stage holds networks that learn. An update is one `accumulate` for each part of its clips, which
adds to the gradients, and one `update`, which takes the step.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from ...data.clips import Clips
from ...data.randomness import ClipRandom
from ..optimization import Trained

Metrics = dict[str, float]


class Stage(Protocol):
    """What the training loop asks of a stage."""

    steps: int
    trained: dict[str, Trained]  # all that has to outlive an interruption

    def batch(self, step: int) -> int:
        """How many clips update `step` takes, on all ranks together."""

    def accumulate(
        self, sets: Mapping[str, Clips], random: ClipRandom, step: int, share: float = 1.0
    ) -> Metrics:
        """Adds `share` of the gradients of a mean over the clips of `random`; returns that mean's
        metrics."""

    def update(self, step: int) -> Metrics:
        """Steps the optimizers and clears the gradients; returns their norms."""

    def export(self) -> nn.Module:
        """The network to keep."""
