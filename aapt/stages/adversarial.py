"""Stage 3: adversarial training with student forcing, segment by segment (SPEC 8)."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.clips import LatentClips
from ..discriminator import Discriminator
from ..losses import (
    approximate_penalty,
    channel_weighted_error,
    discriminator_loss,
    generator_loss,
)
from ..optimization import MovingAverage, Schedule, mixed_precision, update
from ..student_forcing import StudentRollout, parallel_pass
from ..world_model import Conditions, WorldModel
from .rollout_regression import Corruption


@dataclass(frozen=True)
class AdversarialConfig:
    """`overlap_frames` known frames precede each later segment before the discriminator, and
    carry no loss. `discriminator_warmup` updates come before the generator's first. `regression`
    weighs a squared error against the real clip, beside the adversarial loss (ours, for small
    models; 0 in the paper)."""

    generator_schedule: Schedule
    discriminator_schedule: Schedule
    batch: int
    segment_frames: int
    segments: int = 1
    overlap_frames: int = 0
    penalty: float = 1000.0  # lambda
    perturbation: float = 0.1  # sigma
    alpha: float = 0.9  # RMSProp
    discriminator_warmup: int = 0
    average: float = 0.995
    max_norm: float | None = None
    corruption: Corruption | None = None
    regression: float = 0.0

    @property
    def frames(self) -> int:
        return self.segments * self.segment_frames


@dataclass(frozen=True)
class Judged:
    """Frames before the discriminator: latents (B, C, 1 + T, H, W), the frame before the first
    and then the frames to judge, with what conditions those. The first `known` of them carry no
    loss."""

    latents: Tensor
    conditions: Conditions
    known: int = 0

    def detach(self) -> "Judged":
        return replace(self, latents=self.latents.detach())

    def perturbed(self, deviation: float, random: torch.Generator) -> "Judged":
        """N(x, sigma): both what is judged and, as the frame before the next, what it follows."""
        noise = deviation * torch.randn(self.latents.shape, generator=random)
        noise[:, :, : 1 + self.known] = 0
        return replace(self, latents=self.latents + noise)


class Adversarial:
    """The generator rolls out on its own frames; the discriminator gives one logit per frame.

    Each segment continues from the detached cache of the one before; the first is compared with
    the same clip, later ones with real clips drawn on their own. Gradients accumulate after every
    segment, and one update of both networks follows the whole rollout.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        model: WorldModel,
        diffusion: WorldModel,
        pixel_deviation: Tensor,
        seed: int,
    ):
        self.config = config
        self.model = model
        self.pixel_deviation = pixel_deviation
        self.random = torch.Generator().manual_seed(seed)
        self.judge_inputs = copy.deepcopy(diffusion)
        self.discriminator = Discriminator(self.judge_inputs.transformer)
        judging = [*self.discriminator.parameters(), *self.judge_inputs.text_encoder.parameters()]
        self.judging = [p for p in judging if p.requires_grad]
        self.generator_optimizer = torch.optim.RMSprop(model.parameters(), alpha=config.alpha)
        self.discriminator_optimizer = torch.optim.RMSprop(self.judging, alpha=config.alpha)
        self.average = MovingAverage(model, config.average)

    def step(self, clips: LatentClips, step: int) -> dict[str, float]:
        config, model = self.config, self.model
        batch = clips.sample(config.batch, config.frames, self.random)
        noise = torch.randn(batch.targets.shape, generator=self.random)
        warming = step < config.discriminator_warmup
        metrics: dict[str, float] = {}
        precision = mixed_precision(noise.device)
        with precision, torch.no_grad():
            rays, text, text_lens = model.conditions(batch.controls, batch.prompts, batch.size)
            rollout = StudentRollout(model.transformer, text, text_lens, batch.recycled[:, :, :1])
        history = batch.recycled[:, :, :1]
        for index in range(config.segments):
            frames = slice(index * config.segment_frames, (index + 1) * config.segment_frames)
            start = rollout.last
            if config.corruption:
                start = config.corruption(start, index == 0, self.random)
            with precision:
                segment = rollout.roll(noise[:, :, frames], rays[:, :, frames], start)
                fake = segment.output
                if not warming:
                    text, text_lens = model.text_encoder(batch.prompts)
                    fake = parallel_pass(model.transformer, segment, text, text_lens)

            known = min(config.overlap_frames, index * config.segment_frames)
            shown = slice(frames.start - known, frames.stop)
            faked = self.judged(
                torch.cat([history, fake], dim=2)[:, :, -(known + config.segment_frames + 1) :],
                batch.controls[:, shown],
                batch.prompts,
                known,
            )
            if index == 0:
                real_latents, real = batch.latents[:, :, : config.segment_frames + 1], batch
            else:
                count = known + config.segment_frames
                real = clips.sample(config.batch, count, self.random, first_frame="never")
                real_latents = real.latents
            real = self.judged(
                real_latents,
                real.controls[:, : real_latents.shape[2] - 1],
                real.prompts,
                known,
            )
            t = torch.rand(config.batch, generator=self.random)
            on_real, seen = self.train_discriminator(real, faked, t)
            add(metrics, seen, config.segments)
            if not warming:
                targets = batch.targets[:, :, frames]
                error = channel_weighted_error(fake, targets, self.pixel_deviation)
                seen = self.train_generator(on_real, faked, error, t)
                add(metrics, seen, config.segments)
            history = torch.cat([history, fake.detach()], dim=2)
        return {**metrics, **self.update(step, warming)}

    def judged(self, latents: Tensor, controls: Tensor, prompts, known: int) -> Judged:
        """latents (B, C, 1 + T, H, W): the frame before the first, then the frames to judge."""
        with mixed_precision(latents.device):
            conditions = self.judge_inputs.conditions(controls, prompts, latents.shape[-2:])
        return Judged(latents, conditions, known)

    def logits(self, judged: Judged, t: Tensor) -> Tensor:
        """One logit per frame that carries a loss, (B, T - known)."""
        x, previous = judged.latents[:, :, 1:], judged.latents[:, :, :-1]
        with mixed_precision(x.device):
            logits = self.discriminator(x, previous, *judged.conditions, t)
        return logits[:, judged.known :].float()

    def train_discriminator(
        self, real: Judged, fake: Judged, t: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Accumulates the discriminator's gradients; returns its logits on real frames too."""
        config = self.config
        fake = fake.detach()
        together = [real, fake]
        together += [judged.perturbed(config.perturbation, self.random) for judged in together]
        joined = Judged(
            torch.cat([judged.latents for judged in together]),
            Conditions(*map(torch.cat, zip(*(judged.conditions for judged in together)))),
            real.known,
        )
        on_real, on_fake, on_real_shaken, on_fake_shaken = self.logits(joined, t.repeat(4)).chunk(4)
        loss = discriminator_loss(on_real, on_fake)
        r1 = approximate_penalty(on_real, on_real_shaken)
        r2 = approximate_penalty(on_fake, on_fake_shaken)
        ((loss + config.penalty * (r1 + r2)) / config.segments).backward(inputs=self.judging)
        return on_real.detach(), {
            "discriminator": loss.item(),
            "r1": config.penalty * r1.item(),
            "r2": config.penalty * r2.item(),
            "accuracy": (on_real > on_fake).float().mean().item(),
        }

    def train_generator(
        self, on_real: Tensor, fake: Judged, error: Tensor, t: Tensor
    ) -> dict[str, float]:
        """Accumulates the generator's gradients. The discriminator has not moved in between."""
        loss = generator_loss(on_real, self.logits(fake, t))
        total = loss + self.config.regression * error
        (total / self.config.segments).backward(inputs=list(self.model.parameters()))
        return {"generator": loss.item(), "error": error.item()}

    def update(self, step: int, warming: bool) -> dict[str, float]:
        config = self.config
        norms = {
            "discriminator_gradient": update(
                self.discriminator_optimizer,
                config.discriminator_schedule(step),
                self.judging,
                config.max_norm,
            )
        }
        if not warming:
            norms["generator_gradient"] = update(
                self.generator_optimizer,
                config.generator_schedule(step - config.discriminator_warmup),
                self.model.parameters(),
                config.max_norm,
            )
            self.average.update(self.model)
        return norms

    def export(self) -> WorldModel:
        self.average.copy_to(self.model)
        return self.model


def add(total: dict[str, float], metrics: dict[str, float], segments: int) -> None:
    """Adds one segment's metrics to the mean over segments."""
    for name, value in metrics.items():
        total[name] = total.get(name, 0.0) + value / segments
