"""The whole state of a stream between two steps (docs/method.md#17)."""

from dataclasses import dataclass

from torch import Tensor

from ..model.transformer import KVCache
from ..vae import EncoderState
from ..vae.stream import DecoderSnapshot
from .student import Past


@dataclass(frozen=True)
class Snapshot:
    """A copy of a stream's state: `Stream.restore` returns to it, any number of times.

    Nothing writes to it, and it can be pickled.

    Attributes:
        seed, steps: The seed of the noise and the steps made with it; noise has no other state.
        prompt: The prompt in force.
        latent: The last frame (1, C, 1, h, w), which the next step recycles; in a few-step model
            the last chunk after the first, or before any step the picture that begins it.
        cache: Text, first frame and window of every layer.
        past: The inputs of the remembered steps, in a stream opened with `recache`.
        decoder: The states of the decoder's convolutions.
        skeleton: The states of the encoder of poses, if the model follows poses.
    """

    seed: int
    steps: int
    prompt: str
    latent: Tensor
    cache: KVCache
    past: Past | None
    decoder: DecoderSnapshot
    skeleton: EncoderState = ()

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        remembered = self.past.bytes if self.past else 0
        skeleton = sum(part.nbytes for part in self.skeleton)
        return self.latent.nbytes + self.cache.bytes + remembered + self.decoder.bytes + skeleton
