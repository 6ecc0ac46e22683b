"""Stage 2: consistency distillation on fixed times, without classifier-free guidance
(docs/method.md#7)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...data.clips import ClipBatch, Clips
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.config import FewStepConfig
from ...model.flow import interpolate, per_clip, schedule
from ...model.low_rank import LoRA
from ...model.transformer import clean, velocity
from ...model.world_model import Conditions, WorldModel
from ..curriculum import Curriculum
from ..forcing import DenoisingForcing, Forcing
from ..losses import frame_error, pseudo_huber
from ..optimization import Schedule, Trained, adamw, learning


@dataclass(frozen=True)
class ConsistencyConfig:
    """Numbers of stage 2; the defaults are the paper's, or ours where docs/method.md#12 says so.

    Attributes:
        start: The stage whose weights student and teacher start from.
        forcing: As in the stage before, see `DiffusionConfig`.
        times: Number of times k above 0 between which the student is compared.
        distance: Distance between frames, squared or pseudo-Huber.
        step_weight: Weight each clip's loss by 1 / (t_k - t_{k-1}).
        lora: Adaptation of the student; None to train all of its weights.
        state_bits: Bits per number of the optimizer's moments, 32 or 8.
        offload: True to keep parameters, gradients and moments in the CPU's memory, see `savings`.
    """

    curriculum: Curriculum
    schedule: Schedule
    start: str = "diffusion"
    forcing: Forcing = "teacher"
    shift: float = 24.0
    times: int = 32
    distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"
    step_weight: bool = False
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_norm: float | None = None
    lora: LoRA | None = None
    state_bits: int = 32
    offload: bool = False

    @property
    def sampling(self) -> FewStepConfig | None:
        """One pass per frame and, under diffusion forcing, a second one over the clean frame."""
        return FewStepConfig((1.0,)) if self.forcing == "diffusion" else None

    @property
    def needs(self) -> dict[str, int]:
        return self.curriculum.needs

    @property
    def batches(self) -> set[int]:
        return self.curriculum.batches

    def __post_init__(self):
        if self.times < 1:
            raise ValueError(f"times: expected 1 or more, got {self.times}")
        if self.distance not in ("pseudo_huber", "squared"):
            raise ValueError(
                f"distance: expected 'pseudo_huber' or 'squared', got {self.distance!r}"
            )


class ConsistencyDistillation:
    """Trains a student to predict the same clean frames at neighbouring times.

    Its prediction at t_k must equal its prediction at t_{k-1}, which gets no gradient. The teacher,
    the diffusion model that the student starts from, makes the step from t_k to t_{k-1}.
    """

    def __init__(self, config: ConsistencyConfig, model: WorldModel, teacher: WorldModel):
        self.config = config
        self.model = model
        self.teacher = teacher.requires_grad_(False)
        self.forcing = DenoisingForcing(config.forcing, model.config)
        self.steps = config.curriculum.steps
        self.times = schedule(config.times, config.shift)
        optimizer = adamw(learning(model), config.betas, config.weight_decay, config.state_bits)
        self.trained = {"model": Trained(model, optimizer)}

    def batch(self, step: int) -> int:
        return self.config.curriculum.phase(step).batch

    def predict(self, x_t: Tensor, batch: ClipBatch, conditions: Conditions, t: Tensor) -> Tensor:
        """The student's clean frames (B, C, T, H, W) for noisy frames x_t at times t."""
        _, recycled = self.forcing.frames(batch)
        conditions = self.forcing.conditions(conditions)
        output = self.model.transformer(x_t, recycled, *conditions, t).float()
        return clean(self.model.config, output, x_t, recycled, t)

    def accumulate(
        self, sets: Mapping[str, Clips], random: ClipRandom, step: int, share: float = 1.0
    ) -> dict[str, float]:
        config, teacher = self.config, self.teacher
        batch = config.curriculum.phase(step).sample(sets, random)
        real, recycled = self.forcing.frames(batch)
        k = self.forcing.draw(
            real.shape[2], lambda: 1 + torch.tensor(random.integers(config.times))
        )
        t, earlier = (self.times[at].to(random.device) for at in (k, (k - 1).clamp_min(0)))
        noise = random.normal(*real.shape[1:])
        x_t = interpolate(real, noise, t)
        given = (batch.motion, batch.prompts, batch.size)
        with mixed_precision(noise.device), torch.no_grad():
            conditions = self.forcing.conditions(teacher.conditions(*given))
            output = teacher.transformer(x_t, recycled, *conditions, t).float()
            v = velocity(teacher.config, output, x_t, recycled)
            x_earlier = x_t - per_clip(t - earlier) * v
            conditions = self.model.conditions(*given)
            target = self.predict(x_earlier, batch, conditions, earlier)
            # f(x, 0) = x
            target = torch.where(per_clip(earlier) == 0, x_earlier, target)
        with mixed_precision(noise.device):
            conditions = self.model.conditions(*given)
            prediction = self.predict(x_t, batch, conditions, t)
        distance = pseudo_huber if config.distance == "pseudo_huber" else frame_error
        losses = self.forcing.learnt(distance(prediction, target))  # (B, T)
        if config.step_weight:
            step = t - earlier
            losses = losses / (self.forcing.learnt(step) if step.dim() == 2 else step[:, None])
        loss = losses.mean()
        (share * loss).backward()
        return {"loss": loss.item()}

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.schedule(step, self.steps)
        return {"gradient": self.trained["model"].update(rate, config.max_norm)}

    def export(self) -> WorldModel:
        return self.model
