"""The training stages, one file each.

A stage holds networks that learn. For an update, `accumulate` is called for each part of the clips
and adds to the gradients, then `update` is called once and takes a step along them.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from ...data.clips import Clips
from ...data.randomness import ClipRandom
from ..optimization import Trained

Metrics = dict[str, float]


class Stage(Protocol):
    """The methods that the training loop calls.

    Attributes:
        steps: Number of updates.
        trained: Networks, optimizers and averages by name: all that a resumed run needs.
    """

    steps: int
    trained: dict[str, Trained]

    def batch(self, step: int) -> int:
        """Number of clips of update `step`, on all ranks."""

    def accumulate(
        self, sets: Mapping[str, Clips], random: ClipRandom, step: int, share: float = 1.0
    ) -> Metrics:
        """Add `share` of the gradients of a loss, averaged over the clips of `random`.

        Returns the metrics of these clips, as means.
        """

    def update(self, step: int) -> Metrics:
        """Step the optimizers and clear the gradients. Returns the norms of the gradients."""

    def export(self) -> nn.Module:
        """The network that is the stage's result."""
