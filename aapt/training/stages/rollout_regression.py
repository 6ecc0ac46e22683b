"""Student-forced regression: a warm-up between stages 2 and 3 for small models (ours).

It is not part of AAPT. A tiny generator drifts before a discriminator can teach it not to. After a
few hundred updates of regression on its own rollouts, with corrupted first recycled frames, the
adversarial stage is stable (stabilisers, docs/method.md#12).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.clips import Clips, FirstFrame
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.low_rank import LoRA
from ...model.world_model import WorldModel
from ...streaming.student import StudentRollout, frames_of
from ..corruption import Corruption
from ..forcing import parallel_pass
from ..losses import channel_weighted_error
from ..optimization import MovingAverage, Schedule, Trained, make_optimizer


@dataclass(frozen=True)
class RolloutRegressionConfig:
    """Numbers of the regression stage.

    Attributes:
        clips: Name of the set that clips come from.
        steps: Number of updates.
        batch: Clips per update.
        segment_frames: Frames per segment.
        segments: Segments per rollout.
        first_frame: Share of rollouts that start with frame 0 of a clip, see `Clips.sample`.
        start: The stage whose weights the generator starts from; None for the run's start.
        corruption: Corruption of the first recycled frame of each segment.
        muon: Train with `MuonAdamW` instead of AdamW.
        average: Decay of the moving average that is exported.
        max_norm: Norm to which gradients are clipped; None for no clipping.
        lora: Adaptation of the generator; None to train all of its weights.
        state_bits: Bits per number of the optimizer's moments, 32 or 8.
        offload: True to keep parameters, gradients and moments in the CPU's memory, see `savings`.
    """

    clips: str
    steps: int
    batch: int
    segment_frames: int
    segments: int
    schedule: Schedule
    first_frame: FirstFrame = "always"
    start: str | None = "consistency"
    corruption: Corruption = Corruption()
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    muon: bool = False
    average: float = 0.98
    max_norm: float | None = 1.0
    lora: LoRA | None = None
    state_bits: int = 32
    offload: bool = False

    @property
    def frames(self) -> int:
        """Frames per rollout."""
        return self.segments * self.segment_frames

    @property
    def needs(self) -> dict[str, int]:
        return {self.clips: self.frames}

    @property
    def batches(self) -> set[int]:
        return {self.batch}


class RolloutRegression:
    """Trains on the squared error between the generator's rollout and the real clip.

    Both follow the same controls. Latents are whitened, but a unit of one channel may move pixels
    twenty times as far as a unit of another. Errors are weighted by `pixel_deviation` (C,), a
    compromise between equal weights of latents and equal weights of pixels.
    """

    def __init__(self, config: RolloutRegressionConfig, model: WorldModel, pixel_deviation: Tensor):
        self.config = config
        self.model = model
        self.pixel_deviation = pixel_deviation
        self.steps = config.steps
        optimizer = make_optimizer(
            model, config.betas, config.weight_decay, config.muon, config.state_bits
        )
        average = MovingAverage(model, config.average)
        self.trained = {"model": Trained(model, optimizer, average)}

    def batch(self, step: int) -> int:
        return self.config.batch

    def accumulate(
        self, sets: Mapping[str, Clips], random: ClipRandom, step: int, share: float = 1.0
    ) -> dict[str, float]:
        config, model = self.config, self.model
        batch = sets[config.clips].sample(random, config.frames, config.first_frame)
        noise = random.normal(*batch.targets.shape[1:])
        total = 0.0
        precision = mixed_precision(noise.device)
        with precision, torch.no_grad():
            channels, text, text_lens = model.conditions(batch.motion, batch.prompts, batch.size)
            rollout = StudentRollout(model.transformer, text, text_lens, batch.recycled[:, :, :1])
        for index in range(config.segments):
            frames = slice(index * config.segment_frames, (index + 1) * config.segment_frames)
            start = config.corruption(rollout.last, index == 0, random)
            with precision:
                segment = rollout.roll(noise[:, :, frames], frames_of(channels, frames), start)
            with precision:
                text, text_lens = model.text_encoder(batch.prompts)
                fake = parallel_pass(model.transformer, segment, text, text_lens)
            error = channel_weighted_error(fake, batch.targets[:, :, frames], self.pixel_deviation)
            (share * error / config.segments).backward()
            total += error.item() / config.segments
        return {"loss": total}

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.schedule(step, self.steps)
        return {"gradient": self.trained["model"].update(rate, config.max_norm)}

    def export(self) -> WorldModel:
        return self.trained["model"].export()
