"""Frames that the discriminator of stage 3 is shown (docs/method.md#8)."""

from dataclasses import dataclass, replace

from torch import Tensor

from ..data.randomness import ClipRandom
from ..model.flow import interpolate
from ..model.world_model import Conditions


@dataclass(frozen=True)
class Shown:
    """Frames that the discriminator is shown.

    Attributes:
        latents: (B, C, 1 + T, H, W): the frame before the first, then the T frames that get logits.
        conditions: Conditions of the T frames.
        known: Number of frames, the first of the T, that carry no loss.
        real: Clips that teacher-forced frames continue, each frame separately; None for frames
            that follow each other.
    """

    latents: Tensor
    conditions: Conditions
    known: int = 0
    real: Tensor | None = None

    def detach(self) -> "Shown":
        return replace(self, latents=self.latents.detach())

    def perturbed(self, deviation: float, random: ClipRandom, spare_known: bool) -> "Shown":
        """Draw all frames from N(x, deviation), or, to `spare_known`, those with a loss alone."""
        noise = deviation * random.normal(*self.latents.shape[1:])
        if spare_known:
            noise[:, :, : 1 + self.known] = 0
        return replace(self, latents=self.latents + noise)

    def noised(self, t: Tensor, random: ClipRandom) -> "Shown":
        """Mix all frames with noise up to the time t (B,) of their clip."""
        noise = random.normal(*self.latents.shape[1:])
        return replace(self, latents=interpolate(self.latents, noise, t))
