"""Student-forced regression: a warm-up between stages 2 and 3 for small models (ours).

Not part of AAPT. A tiny generator drifts before a discriminator can teach it not to; a few
hundred updates of plain regression on its own rollouts, with the first recycled frame corrupted,
bring it to a start from which the adversarial stage is stable (SPEC 12, stabilisers).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.clips import LatentClips
from ..losses import channel_weighted_error
from ..optimization import MovingAverage, Schedule, make_optimizer, mixed_precision, update
from ..student_forcing import StudentRollout, parallel_pass
from ..world_model import WorldModel


@dataclass(frozen=True)
class Corruption:
    """White noise up to `white` plus a constant per channel up to `offset`, with a chance of
    `clip_chance` per clip, on the first recycled frame of a segment; the user's frame itself is
    corrupted only in `first_chance` of the updates. Offsets of a deviation turn a theme into
    another one, and only the prompt and the first frame tell the way back."""

    white: float = 0.35
    offset: float = 0.35
    clip_chance: float = 0.6
    first_chance: float = 0.3

    def __call__(self, frame: Tensor, first: bool, random: torch.Generator) -> Tensor:
        """frame (B, C, 1, H, W), `first`: whether it is the user's own."""
        if first and torch.rand((), generator=random) >= self.first_chance:
            return frame
        batch, channels = frame.shape[:2]

        def strength(most: float) -> Tensor:
            return most * torch.rand(batch, 1, 1, 1, 1, generator=random)

        white = strength(self.white) * torch.randn(frame.shape, generator=random)
        offset = strength(self.offset) * torch.randn(batch, channels, 1, 1, 1, generator=random)
        chosen = torch.rand(batch, 1, 1, 1, 1, generator=random) < self.clip_chance
        return torch.where(chosen, frame + white + offset, frame)


@dataclass(frozen=True)
class RolloutRegressionConfig:
    schedule: Schedule
    batch: int
    segment_frames: int
    segments: int
    corruption: Corruption = Corruption()
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    muon: bool = False  # in place of AdamW
    average: float = 0.98
    max_norm: float | None = 1.0

    @property
    def frames(self) -> int:
        return self.segments * self.segment_frames


class RolloutRegression:
    """Squared error between the generator's own rollout and the real clip, same controls.

    Latents are whitened, but a unit of one channel moves the picture twenty times as far as a unit
    of another: errors are weighted by `pixel_deviation` (C,), between what whitened latents and
    what pixels would ask for.
    """

    def __init__(
        self,
        config: RolloutRegressionConfig,
        model: WorldModel,
        pixel_deviation: Tensor,
        seed: int,
    ):
        self.config = config
        self.model = model
        self.pixel_deviation = pixel_deviation
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = make_optimizer(model, config.betas, config.weight_decay, config.muon)
        self.average = MovingAverage(model, config.average)

    def step(self, clips: LatentClips, step: int) -> dict[str, float]:
        config, model = self.config, self.model
        batch = clips.sample(config.batch, config.frames, self.random)
        noise = torch.randn(batch.targets.shape, generator=self.random)
        total = 0.0
        precision = mixed_precision(noise.device)
        with precision, torch.no_grad():
            rays, text, text_lens = model.conditions(batch.controls, batch.prompts, batch.size)
            rollout = StudentRollout(model.transformer, text, text_lens, batch.recycled[:, :, :1])
        for index in range(config.segments):
            frames = slice(index * config.segment_frames, (index + 1) * config.segment_frames)
            start = config.corruption(rollout.last, index == 0, self.random)
            with precision:
                segment = rollout.roll(noise[:, :, frames], rays[:, :, frames], start)
                text, text_lens = model.text_encoder(batch.prompts)
                fake = parallel_pass(model.transformer, segment, text, text_lens)
            error = channel_weighted_error(fake, batch.targets[:, :, frames], self.pixel_deviation)
            loss = error / config.segments
            loss.backward()
            total += loss.item()
        norm = update(self.optimizer, config.schedule(step), model.parameters(), config.max_norm)
        self.average.update(model)
        return {"loss": total, "gradient": norm}

    def export(self) -> WorldModel:
        self.average.copy_to(self.model)
        return self.model
