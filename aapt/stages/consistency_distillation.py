"""Stage 2: consistency distillation on fixed times, teacher-forced, no CFG (SPEC 7)."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.clips import ClipBatch, LatentClips
from ..flow import interpolate, per_clip, schedule
from ..losses import pseudo_huber
from ..model import clean, velocity
from ..optimization import Schedule, mixed_precision, update
from ..world_model import Conditions, WorldModel


@dataclass(frozen=True)
class ConsistencyConfig:
    schedule: Schedule
    batch: int
    frames: int
    shift: float = 24.0
    times: int = 32
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_norm: float | None = None


class ConsistencyDistillation:
    """The student at t_k must agree with its own stopped gradient at t_{k-1}, one teacher step
    nearer to the data."""

    def __init__(self, config: ConsistencyConfig, model: WorldModel, seed: int):
        self.config = config
        self.model = model
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.times = schedule(config.times, config.shift)
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=config.betas, weight_decay=config.weight_decay
        )

    def predict(self, x_t: Tensor, batch: ClipBatch, conditions: Conditions, t: Tensor) -> Tensor:
        output = self.model.transformer(x_t, batch.recycled, *conditions, t).float()
        return clean(self.model.config, output, x_t, batch.recycled, t)

    def step(self, clips: LatentClips, step: int) -> dict[str, float]:
        config = self.config
        batch = clips.sample(config.batch, config.frames, self.random)
        k = torch.randint(1, config.times + 1, (config.batch,), generator=self.random)
        t, earlier = self.times[k], self.times[k - 1]
        noise = torch.randn(batch.targets.shape, generator=self.random)
        x_t = interpolate(batch.targets, noise, t)
        arguments = (batch.controls, batch.prompts, batch.size)
        with mixed_precision(noise.device):
            with torch.no_grad():
                teacher = self.teacher
                output = teacher.transformer(
                    x_t, batch.recycled, *teacher.conditions(*arguments), t
                ).float()
                v = velocity(teacher.config, output, x_t, batch.recycled)
                x_earlier = x_t - per_clip(t - earlier) * v
                conditions = self.model.conditions(*arguments)
                target = self.predict(x_earlier, batch, conditions, earlier)
                # f(x, 0) = x
                target = torch.where(per_clip(earlier) == 0, x_earlier, target)
            conditions = self.model.conditions(*arguments)
            prediction = self.predict(x_t, batch, conditions, t)
        loss = pseudo_huber(prediction, target).mean()
        loss.backward()
        norm = update(
            self.optimizer, config.schedule(step), self.model.parameters(), config.max_norm
        )
        return {"loss": loss.item(), "gradient": norm}

    def export(self) -> WorldModel:
        return self.model
