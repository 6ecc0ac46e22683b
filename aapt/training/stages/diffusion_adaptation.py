"""Stage 1: a causal diffusion model by teacher forcing (SPEC 6)."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...data.clips import Clips
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.config import SamplingConfig
from ...model.flow import interpolate, shift
from ...model.transformer import velocity
from ...model.world_model import WorldModel
from ..curriculum import Curriculum
from ..optimization import MovingAverage, Schedule, Trained, make_optimizer


@dataclass(frozen=True)
class DiffusionConfig:
    curriculum: Curriculum
    schedule: Schedule
    start: str | None = None  # the stage whose weights it begins with
    shift: float = 24.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    caption_dropout: float = 0.1
    muon: bool = False  # in place of AdamW (ours, for small models)
    average: float | None = None
    max_norm: float | None = None
    sampling_steps: int = 32  # of the baseline that the trained model is, with its guidance
    guidance: float = 10.0

    @property
    def sampling(self) -> SamplingConfig:
        """How the trained model makes a frame."""
        return SamplingConfig(self.sampling_steps, self.shift, self.guidance)

    @property
    def needs(self) -> dict[str, int]:
        return self.curriculum.needs

    @property
    def batches(self) -> set[int]:
        return self.curriculum.batches


class DiffusionAdaptation:
    """All frames in parallel, one t per clip, the clean previous frame recycled, MSE on v."""

    def __init__(self, config: DiffusionConfig, model: WorldModel):
        self.config = config
        self.model = model
        self.steps = config.curriculum.steps
        average = None
        if config.average is not None:
            average = MovingAverage(model, config.average, from_scratch=True)
        optimizer = make_optimizer(model, config.betas, config.weight_decay, config.muon)
        self.trained = {"model": Trained(model, optimizer, average)}

    def batch(self, step: int) -> int:
        return self.config.curriculum.phase(step).batch

    def accumulate(
        self, sets: Mapping[str, Clips], random: ClipRandom, step: int, share: float = 1.0
    ) -> dict[str, float]:
        config, model = self.config, self.model
        batch = config.curriculum.phase(step).sample(sets, random)
        dropped = random.uniform() < config.caption_dropout
        prompts = ["" if drop else p for drop, p in zip(dropped, batch.prompts, strict=True)]
        t = shift(random.uniform(), config.shift)
        noise = random.normal(*batch.targets.shape[1:])
        x_t = interpolate(batch.targets, noise, t)
        with mixed_precision(noise.device):
            conditions = model.conditions(batch.motion, prompts, batch.size)
            output = model.transformer(x_t, batch.recycled, *conditions, t)
        v = velocity(model.config, output.float(), x_t, batch.recycled)
        loss = (v - (noise - batch.targets)).square().mean()
        (share * loss).backward()
        return {"loss": loss.item()}

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.schedule(step, self.steps)
        return {"gradient": self.trained["model"].update(rate, config.max_norm)}

    def export(self) -> WorldModel:
        """The trained model, with averaged weights where an average is kept."""
        return self.trained["model"].export()
