"""Stage 1: a causal diffusion model by teacher forcing (SPEC 6)."""

from dataclasses import dataclass

import torch

from ..data.clips import LatentClips
from ..flow import interpolate, shift
from ..model import velocity
from ..optimization import MovingAverage, Schedule, make_optimizer, mixed_precision, update
from ..world_model import WorldModel


@dataclass(frozen=True)
class DiffusionConfig:
    schedule: Schedule
    batch: int
    frames: int
    shift: float = 24.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    caption_dropout: float = 0.1
    muon: bool = False  # in place of AdamW (ours, for small models)
    average: float | None = None
    max_norm: float | None = None


class DiffusionAdaptation:
    """All frames in parallel, one t per clip, the clean previous frame recycled, MSE on v."""

    def __init__(self, config: DiffusionConfig, model: WorldModel, seed: int):
        self.config = config
        self.model = model
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = make_optimizer(model, config.betas, config.weight_decay, config.muon)
        self.average = None
        if config.average is not None:
            self.average = MovingAverage(model, config.average, from_scratch=True)

    def step(self, clips: LatentClips, step: int) -> dict[str, float]:
        config, model = self.config, self.model
        batch = clips.sample(config.batch, config.frames, self.random)
        dropped = torch.rand(config.batch, generator=self.random) < config.caption_dropout
        prompts = ["" if drop else p for drop, p in zip(dropped, batch.prompts, strict=True)]
        t = shift(torch.rand(config.batch, generator=self.random), config.shift)
        noise = torch.randn(batch.targets.shape, generator=self.random)
        x_t = interpolate(batch.targets, noise, t)
        with mixed_precision(noise.device):
            conditions = model.conditions(batch.controls, prompts, batch.size)
            output = model.transformer(x_t, batch.recycled, *conditions, t)
        v = velocity(model.config, output.float(), x_t, batch.recycled)
        loss = (v - (noise - batch.targets)).square().mean()
        loss.backward()
        norm = update(self.optimizer, config.schedule(step), model.parameters(), config.max_norm)
        if self.average:
            self.average.update(model)
        return {"loss": loss.item(), "gradient": norm}

    def export(self) -> WorldModel:
        """The trained model, with averaged weights where an average is kept."""
        if self.average:
            self.average.copy_to(self.model)
        return self.model
