"""The whole state of a stream between two steps (docs/method.md#17)."""

from dataclasses import dataclass

from ..vae.stream import DecoderSnapshot
from .student import RolloutSnapshot


@dataclass(frozen=True)
class Snapshot:
    """A copy of a stream's state: `Stream.restore` returns to it, any number of times.

    Nothing writes to it, and it can be pickled.

    Attributes:
        seed, steps: The seed of the noise and the steps made with it; noise has no other state.
        prompt: The prompt in force.
        rollout, decoder: Keys, values and recycled frame; states of the decoder's convolutions.
    """

    seed: int
    steps: int
    prompt: str
    rollout: RolloutSnapshot
    decoder: DecoderSnapshot

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return self.rollout.bytes + self.decoder.bytes
