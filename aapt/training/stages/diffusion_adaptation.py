"""Stage 1: adapts a diffusion model to causal attention (docs/method.md#6)."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...data.clips import Clips
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.config import FewStepConfig, SamplingConfig
from ...model.flow import interpolate, schedule, shift
from ...model.low_rank import LoRA
from ...model.transformer import velocity
from ...model.world_model import WorldModel
from ..curriculum import Curriculum
from ..forcing import DenoisingForcing, Forcing
from ..optimization import MovingAverage, Schedule, Trained, make_optimizer


@dataclass(frozen=True)
class DiffusionConfig:
    """Numbers of stage 1; the defaults are the paper's, or ours where docs/method.md#12 says so.

    Attributes:
        start: The stage whose weights the model starts from; None for the run's start.
        forcing: "teacher" (paper), or "diffusion" for a baseline, see `DenoisingForcing`.
        shift: Shift of the times towards noise.
        caption_dropout: Probability that a clip's prompt is empty, for guidance.
        muon: Train with `MuonAdamW` instead of AdamW (ours, for small models).
        average: Decay of the moving average that is exported; None for none.
        max_norm: Norm to which gradients are clipped; None for no clipping.
        lora: Adaptation of the model; None to train all of its weights.
        state_bits: Bits per number of the optimizer's moments, 32 or 8.
        offload: True to keep parameters, gradients and moments in the CPU's memory, see `savings`.
        sampling_steps: Passes per frame when the trained model is sampled, as a baseline. Under
            diffusion forcing the finished frame takes one more.
        guidance: Its guidance; none under diffusion forcing.
    """

    curriculum: Curriculum
    schedule: Schedule
    start: str | None = None
    forcing: Forcing = "teacher"
    shift: float = 24.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    caption_dropout: float = 0.1
    muon: bool = False
    average: float | None = None
    max_norm: float | None = None
    lora: LoRA | None = None
    state_bits: int = 32
    offload: bool = False
    sampling_steps: int = 32
    guidance: float = 10.0

    @property
    def sampling(self) -> SamplingConfig | FewStepConfig:
        """The sampling of a frame by the trained model."""
        if self.forcing == "diffusion":
            _, *times = schedule(self.sampling_steps, self.shift).tolist()
            return FewStepConfig(tuple(reversed(times)))
        return SamplingConfig(self.sampling_steps, self.shift, self.guidance)

    @property
    def needs(self) -> dict[str, int]:
        return self.curriculum.needs

    @property
    def batches(self) -> set[int]:
        return self.curriculum.batches


class DiffusionAdaptation:
    """Trains on all frames of a clip in parallel, with one time t per clip.

    Each frame is conditioned on the clean frame before it. The loss is the squared error of v.
    Under diffusion forcing each frame has its own time.
    """

    def __init__(self, config: DiffusionConfig, model: WorldModel):
        self.config = config
        self.model = model
        self.forcing = DenoisingForcing(config.forcing, model.config)
        self.steps = config.curriculum.steps
        average = None
        if config.average is not None:
            average = MovingAverage(model, config.average, from_scratch=True)
        optimizer = make_optimizer(
            model, config.betas, config.weight_decay, config.muon, config.state_bits
        )
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
        clean, recycled = self.forcing.frames(batch)
        t = shift(self.forcing.draw(clean.shape[2], random.uniform), config.shift)
        noise = random.normal(*clean.shape[1:])
        x_t = interpolate(clean, noise, t)
        with mixed_precision(noise.device):
            conditions = model.conditions(batch.motion, prompts, batch.size)
            conditions = self.forcing.conditions(conditions)
            output = model.transformer(x_t, recycled, *conditions, t)
        v = velocity(model.config, output.float(), x_t, recycled)
        loss = self.forcing.learnt(v - (noise - clean)).square().mean()
        (share * loss).backward()
        return {"loss": loss.item()}

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.schedule(step, self.steps)
        return {"gradient": self.trained["model"].update(rate, config.max_norm)}

    def export(self) -> WorldModel:
        """The trained model, with averaged weights if it has an average."""
        return self.trained["model"].export()
