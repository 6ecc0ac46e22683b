"""Distribution matching: a warm-up between stages 2 and 3, from the literature on few-step models.

DMD (arXiv 2311.18828 and 2405.14867), as CausVid (2412.07772) and Self-Forcing (2506.08009) apply
it to rollouts. It is not part of AAPT (docs/method.md#12). The teacher here is causal: stage 1's
model, so its score of a frame is that of the frame after the generator's own frames.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.clips import Clips, FirstFrame
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.flow import interpolate, shift, to_clean
from ...model.low_rank import LoRA
from ...model.transformer import velocity
from ...model.world_model import WorldModel
from ...streaming.student import Segment, StudentRollout
from ..forcing import parallel_pass
from ..losses import distribution_matching_gradient
from ..optimization import MovingAverage, Schedule, Trained, adamw, learning


@dataclass(frozen=True)
class DistributionMatchingConfig:
    """Numbers of the stage; the defaults are Self-Forcing's (docs/post-training.md#evidence).

    Attributes:
        clips: Name of the set that first frames, motion and prompts come from.
        steps: Updates of the generator. The critic makes `critic_updates` for each of them.
        batch: Clips per update.
        segment_frames: Frames per rollout.
        first_frame: Share of rollouts that start with frame 0 of a clip, see `Clips.sample`.
        start: The stage whose weights the generator starts from; None for the run's start.
        teacher: The diffusion stage whose model is the teacher, and whose weights the critic starts
            from.
        critic_updates: Updates of the critic per update of the generator.
        guidance: The teacher's w of v = v_empty + w (v_prompt - v_empty); 1 for none.
        shift: Shift of the times towards noise.
        times: Least and greatest time, to which shifted times are clamped.
        average: Decay of the moving average that is exported; None for none.
        max_norm: Norm to which gradients are clipped; None for no clipping.
        lora: Adaptation of the generator and of the critic; None to train all of their weights.
        state_bits: Bits per number of the optimizers' moments, 32 or 8.
        offload: True to keep parameters, gradients and moments in the CPU's memory, see `savings`.
    """

    clips: str
    steps: int
    batch: int
    segment_frames: int
    generator_schedule: Schedule
    critic_schedule: Schedule
    first_frame: FirstFrame = "always"
    start: str | None = "consistency"
    teacher: str = "diffusion"
    critic_updates: int = 5
    guidance: float = 4.0
    shift: float = 5.0
    times: tuple[float, float] = (0.02, 0.98)
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    average: float | None = 0.99
    max_norm: float | None = 10.0
    lora: LoRA | None = None
    state_bits: int = 32
    offload: bool = False

    def __post_init__(self):
        if self.critic_updates < 1:
            raise ValueError(f"critic_updates: expected 1 or more, got {self.critic_updates}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance: expected 0 or more, got {self.guidance}")
        if not 0 < self.times[0] <= self.times[1] <= 1:
            raise ValueError(
                f"times: expected a least and a greatest time in (0, 1], got {self.times}"
            )

    @property
    def needs(self) -> dict[str, int]:
        return {self.clips: self.segment_frames}

    @property
    def batches(self) -> set[int]:
        return {self.batch}


class DistributionMatching:
    """Moves the frames that a generator makes to where the teacher finds them more likely.

    A rollout is mixed with noise. Teacher and critic denoise each frame beside the frame that the
    generator recycled, and the difference between their results is the generator's gradient. The
    critic, a diffusion model of the rollouts, learns from every rollout by stage 1's loss. The
    generator learns from every `critic_updates`-th. Both move after the rollout's gradients.
    """

    def __init__(
        self,
        config: DistributionMatchingConfig,
        model: WorldModel,
        critic: WorldModel,
        teacher: WorldModel,
    ):
        self.config, self.model, self.critic = config, model, critic
        self.teacher = teacher.requires_grad_(False)
        self.steps = config.steps * config.critic_updates
        average = None if config.average is None else MovingAverage(model, config.average)
        numbers = config.betas, config.weight_decay, config.state_bits
        self.trained = {
            "generator": Trained(model, adamw(learning(model), *numbers), average),
            "critic": Trained(critic, adamw(learning(critic), *numbers)),
        }

    def batch(self, step: int) -> int:
        return self.config.batch

    def learns(self, step: int) -> bool:
        """True if the generator moves in update `step`."""
        return (step + 1) % self.config.critic_updates == 0

    def accumulate(
        self, sets: Mapping[str, Clips], random: ClipRandom, step: int, share: float = 1.0
    ) -> dict[str, float]:
        config, model = self.config, self.model
        batch = sets[config.clips].sample(random, config.segment_frames, config.first_frame)
        noise = random.normal(*batch.targets.shape[1:])
        with mixed_precision(noise.device), torch.no_grad():
            channels, *words = model.conditions(batch.motion, batch.prompts, batch.size)
            rollout = StudentRollout(model.transformer, *words, batch.recycled[:, :, :1])
            segment = rollout.roll(noise, channels)
        metrics = {"critic": self.train_critic(segment, batch.prompts, random, share)}
        if self.learns(step):
            metrics["distance"] = self.train_generator(segment, batch.prompts, random, share)
        return metrics

    def train_critic(
        self, segment: Segment, prompts: Sequence[str], random: ClipRandom, share: float
    ) -> float:
        """Accumulate the critic's gradients on a rollout. Returns the squared error of v."""
        x_t, noise, t = self.noised(segment, random)
        v = self.velocity(self.critic, x_t, segment, prompts, t)
        loss = (v - (noise - segment.output)).square().mean()
        (share * loss).backward()
        return loss.item()

    def train_generator(
        self, segment: Segment, prompts: Sequence[str], random: ClipRandom, share: float
    ) -> float:
        """Accumulate the generator's gradients on its rollout.

        Returns the mean magnitude of the gradient that each number of the rollout has, before it is
        averaged over numbers.
        """
        with torch.no_grad():
            x_t, _, t = self.noised(segment, random)
            v = self.velocity(self.teacher, x_t, segment, prompts, t)
            if self.config.guidance != 1:
                free = self.velocity(self.teacher, x_t, segment, [""] * len(prompts), t)
                v = free + self.config.guidance * (v - free)
            fake = to_clean(x_t, self.velocity(self.critic, x_t, segment, prompts, t), t)
            gradient = distribution_matching_gradient(segment.output, fake, to_clean(x_t, v, t))
        with mixed_precision(x_t.device):
            words = self.model.text_encoder(prompts)
            made = parallel_pass(self.model.transformer, segment, *words)
        # The gradient of (x - stopped(x - gradient))^2 / 2, which is the published loss.
        (share * (made * gradient).mean()).backward()
        return gradient.abs().mean().item()

    def noised(self, segment: Segment, random: ClipRandom) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a rollout with noise. Returns x_t and the noise (B, C, T, H, W), and times (B,)."""
        noise = random.normal(*segment.output.shape[1:])
        t = shift(random.uniform(), self.config.shift).clamp(*self.config.times)
        return interpolate(segment.output, noise, t), noise, t

    def velocity(
        self, network: WorldModel, x_t: Tensor, segment: Segment, prompts: Sequence[str], t: Tensor
    ) -> Tensor:
        """Predict v (B, C, T, H, W) of a noised rollout, whose clean frames are recycled."""
        with mixed_precision(x_t.device):
            words = network.text_encoder(prompts)
            output = network.transformer(x_t, segment.recycled, segment.condition, *words, t)
        return velocity(network.config, output.float(), x_t, segment.recycled)

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.critic_schedule(step, self.steps)
        norms = {"critic_gradient": self.trained["critic"].update(rate, config.max_norm)}
        if self.learns(step):
            rate = config.generator_schedule(step // config.critic_updates, config.steps)
            generator = self.trained["generator"]
            norms["generator_gradient"] = generator.update(rate, config.max_norm)
        return norms

    def export(self) -> WorldModel:
        return self.trained["generator"].export()
