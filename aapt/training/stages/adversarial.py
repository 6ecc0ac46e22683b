"""Stage 3: adversarial training with student forcing, segment by segment (SPEC 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...data.clips import Clips
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.discriminator import Discriminator, Judgement, Pooling
from ...model.world_model import Conditions, WorldModel
from ...streaming.student import Segment, StudentRollout, frames_of
from ..corruption import Corruption
from ..forcing import parallel_pass, teacher_forced_logits
from ..losses import (
    approximate_penalty,
    channel_weighted_error,
    discriminator_loss,
    generator_loss,
    palette_error,
    row_error,
)
from ..optimization import MovingAverage, Schedule, Trained, frozen


@dataclass(frozen=True)
class AdversarialConfig:
    """Numbers of stage 3; the defaults are the paper's.

    Attributes:
        clips: The set that real clips come from.
        steps: Updates of the generator. The discriminator makes `discriminator_warmup` before.
        segment_frames: Frames the discriminator judges at once, from `shortest_segment` up to
            this, drawn for each update, if that is given.
        overlap_frames: So many of a later segment's are known from the one before, and carry no
            loss.
        whole_clips: Clips are as long as the rollout, and their motion is followed to the end.
            Otherwise later segments take the motion of other clips (SPEC 8, 10).
        lead_segments: Up to so many, drawn for each update, are rolled out before the first one
            that is judged: what goes wrong late is learnt from at the price of a rollout (ours).
        start, judge: The stages whose weights generator and discriminator begin with.
        penalty, perturbation: lambda and sigma of aR1 and aR2.
        alpha: Of RMSProp.
        forcing: "teacher" is the failing mode of the paper: the generator continues real frames,
            in parallel, and each of its frames is judged after the real ones.
        judgement: One logit per "frame", or per "clip" by a discriminator that is not causal.
        pooling: Tokens become a logit by a learned "query", or by their "average".
        judge_recycled: The discriminator sees the frame before each as well, as the generator does.
        corruption: Of recycled frames: the first of each segment, or all of them under teacher
            forcing.
        mismatch: Weight of real frames under another clip's motion, which the discriminator has to
            tell from those under their own: it learns to look at the controls (ours).
        regression, palette, rows: Weights of a squared error against the real clip, and of those
            between the mean colours of frames and of their rows, beside the adversarial loss (ours,
            for small models).
    """

    clips: str
    steps: int
    batch: int
    segment_frames: int
    generator_schedule: Schedule
    discriminator_schedule: Schedule
    segments: int = 1
    shortest_segment: int | None = None
    overlap_frames: int = 0
    whole_clips: bool = False
    lead_segments: int = 0
    start: str = "consistency"
    judge: str = "diffusion"
    penalty: float = 1000.0
    perturbation: float = 0.1
    alpha: float = 0.9
    discriminator_warmup: int = 0
    average: float | None = 0.995
    max_norm: float | None = None
    forcing: Literal["student", "teacher"] = "student"
    judgement: Judgement = "frame"
    pooling: Pooling = "query"
    judge_recycled: bool = True
    corruption: Corruption | None = None
    mismatch: float = 0.0
    regression: float = 0.0
    palette: float = 0.0
    rows: float = 0.0

    @property
    def needs(self) -> dict[str, int]:
        return {self.clips: self.needed(self.segment_frames)}

    def needed(self, length: int) -> int:
        """Latent frames after the first that clips must have for segments of `length`."""
        later = self.lead_segments + self.segments - 1
        followed = later * (length - self.overlap_frames) if self.whole_clips else 0
        # Real clips of later segments, and motion that does not fit, leave out latent 0: one more.
        behind_first = 1 if later or self.mismatch else 0
        return length + max(followed, behind_first)

    @property
    def copies(self) -> int:
        """Clips before the learning discriminator: real, fake, both perturbed, and the mismatch."""
        return 5 if self.mismatch else 4

    @property
    def batches(self) -> set[int]:
        return {self.batch}

    def __post_init__(self):
        if self.forcing not in ("student", "teacher"):
            raise ValueError(f"forcing: expected 'student' or 'teacher', got {self.forcing!r}")
        several = self.lead_segments + self.segments > 1
        if self.forcing == "teacher" and (several or self.judgement == "clip"):
            raise ValueError(
                "forcing: expected 'student' for several segments or one logit per clip, "
                "got 'teacher'"
            )
        if self.forcing == "teacher" and self.mismatch:
            raise ValueError(f"mismatch: expected 0 under teacher forcing, got {self.mismatch}")
        if not 0 <= self.overlap_frames < (self.shortest_segment or self.segment_frames):
            raise ValueError(
                f"overlap_frames: expected 0 to less than a segment, got {self.overlap_frames}"
            )
        if (self.regression or self.palette or self.rows) and several and not self.whole_clips:
            raise ValueError(
                "regression, palette, rows: expected whole_clips, for something to compare later "
                "segments with"
            )


@dataclass(frozen=True)
class Judged:
    """Frames before the discriminator: latents (B, C, 1 + T, H, W), the frame before the first
    and then the frames to judge, with what conditions those. The first `known` of them carry no
    loss. `real`: the clip that teacher-forced frames continue, each on its own."""

    latents: Tensor
    conditions: Conditions
    known: int = 0
    real: Tensor | None = None

    def detach(self) -> "Judged":
        return replace(self, latents=self.latents.detach())

    def perturbed(self, deviation: float, random: ClipRandom) -> "Judged":
        """N(x, sigma): both what is judged and, as the frame before the next, what it follows."""
        noise = deviation * random.normal(*self.latents.shape[1:])
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
        discriminator: Discriminator,
        pixel_deviation: Tensor,
    ):
        if config.mismatch and not model.config.condition_channels:
            raise ValueError(
                f"mismatch: expected 0 for a model that nothing controls, got {config.mismatch}"
            )
        self.config = config
        self.model = model
        self.pixel_deviation = pixel_deviation
        self.steps = config.discriminator_warmup + config.steps
        self.discriminator = discriminator
        judging = [p for p in self.discriminator.parameters() if p.requires_grad]
        average = None if config.average is None else MovingAverage(model, config.average)
        self.trained = {
            "generator": Trained(
                model, torch.optim.RMSprop(model.parameters(), alpha=config.alpha), average
            ),
            "discriminator": Trained(
                self.discriminator, torch.optim.RMSprop(judging, alpha=config.alpha)
            ),
        }

    def batch(self, step: int) -> int:
        return self.config.batch

    def warming(self, step: int) -> bool:
        """Whether only the discriminator learns."""
        return step < self.config.discriminator_warmup

    def accumulate(
        self, sets: Mapping[str, Clips], random: ClipRandom, step: int, share: float = 1.0
    ) -> dict[str, float]:
        clips = sets[self.config.clips]
        if self.config.forcing == "teacher":
            return self.teacher_forced(clips, random, step, share)
        return self.student_forced(clips, random, step, share)

    def student_forced(
        self, clips: Clips, random: ClipRandom, step: int, share: float
    ) -> dict[str, float]:
        config, model = self.config, self.model
        length = config.segment_frames
        if config.shortest_segment is not None:
            length = int(random.shared.integers(config.shortest_segment, length + 1))
        clips = clips.part(random, config.needed(length))
        further = length - config.overlap_frames  # new frames of a later segment
        lead = int(random.shared.integers(config.lead_segments + 1))
        whole = lead + config.segments if config.whole_clips else 1
        batch = clips.sample(random, length + (whole - 1) * further)
        precision = mixed_precision(random.device)
        with precision, torch.no_grad():
            channels, text, text_lens = model.conditions(batch.motion, batch.prompts, batch.size)
            rollout = StudentRollout(model.transformer, text, text_lens, batch.recycled[:, :, :1])
        history = batch.recycled[:, :, :1]
        metrics: dict[str, float] = {}
        for index in range(lead + config.segments):
            known, new = (config.overlap_frames, further) if index else (0, length)
            competes = index >= lead
            place = slice(rollout.frames, rollout.frames + new)
            if index and channels is not None and not config.whole_clips:
                walk = model.channels(clips.sample(random, new, "never").motion, batch.size)
                channels = torch.cat([channels, walk], dim=2)
            start = rollout.last
            if config.corruption and competes:
                start = config.corruption(start, index == 0, random)
            noise = random.normal(batch.latents.shape[1], new, *batch.size)
            with precision:
                segment = rollout.roll(noise, frames_of(channels, place), start)
            fake = segment.output
            if competes and not self.warming(step):
                with precision:
                    text, text_lens = model.text_encoder(batch.prompts)
                    fake = parallel_pass(model.transformer, segment, text, text_lens)
            history = torch.cat([history, fake], dim=2)
            if not competes:
                continue
            shown = slice(place.start - known, place.stop)
            fakes = self.judged(
                history[:, :, shown.start :],  # the frame before the first, too
                frames_of(channels, shown),
                batch.prompts,
                known,
            )
            history = history.detach()
            real = batch if index == 0 else clips.sample(random, known + new, "never")
            along = model.channels(real.motion, batch.size)
            reals = self.judged(
                real.latents[:, :, : known + new + 1],
                frames_of(along, slice(known + new)),
                real.prompts,
                known,
            )
            targets = batch.targets[:, :, place] if whole == lead + config.segments else None
            misled = self.misled(clips, reals, random) if config.mismatch else None
            seen = self.compete(
                reals, fakes, misled, fake, targets, random, step, share / config.segments
            )
            for name, value in seen.items():
                metrics[name] = metrics.get(name, 0.0) + value / config.segments
        return metrics

    def teacher_forced(
        self, clips: Clips, random: ClipRandom, step: int, share: float
    ) -> dict[str, float]:
        """Real frames in, in parallel; each generated frame is judged after the real ones."""
        config, model = self.config, self.model
        batch = clips.sample(random, config.segment_frames)
        recycled = batch.recycled
        if config.corruption:
            recycled = config.corruption(recycled, False, random)
        noise = random.normal(*batch.targets.shape[1:])
        with mixed_precision(random.device), torch.set_grad_enabled(not self.warming(step)):
            channels, text, text_lens = model.conditions(batch.motion, batch.prompts, batch.size)
            segment = Segment(noise, recycled, channels, start_frame=0, prefix=None)
            fake = parallel_pass(model.transformer, segment, text, text_lens)
        real = self.judged(batch.latents, channels, batch.prompts, known=0)
        real = replace(real, real=batch.latents)
        continued = torch.cat([batch.recycled[:, :, :1], fake], dim=2)
        fakes = replace(real, latents=continued)
        return self.compete(real, fakes, None, fake, batch.targets, random, step, share)

    def compete(
        self,
        real: Judged,
        fakes: Judged,
        misled: Judged | None,
        fake: Tensor,
        targets: Tensor | None,
        random: ClipRandom,
        step: int,
        share: float,
    ) -> dict[str, float]:
        """Both turns on one segment; `fake` are its new frames, `targets` the real ones there."""
        t = random.uniform()
        on_real, metrics = self.train_discriminator(real, fakes, misled, t, random, share)
        if not self.warming(step):
            errors = {}
            if targets is not None:
                compared = fake, targets, self.pixel_deviation
                errors = {
                    "error": channel_weighted_error(*compared),
                    "palette": palette_error(*compared),
                    "rows": row_error(*compared),
                }
            metrics |= self.train_generator(on_real, fakes, errors, t, share)
        return metrics

    def judged(
        self, latents: Tensor, channels: Tensor | None, prompts: Sequence[str], known: int
    ) -> Judged:
        """latents (B, C, 1 + T, H, W): the frame before the first, then the frames to judge."""
        with mixed_precision(latents.device):
            words = self.discriminator.world.text_encoder(prompts)
        return Judged(latents, Conditions(channels, *words), known)

    def misled(self, clips: Clips, real: Judged, random: ClipRandom) -> Judged:
        """The same frames under the motion of other clips."""
        frames, *size = real.latents.shape[2:]
        other = self.model.channels(clips.sample(random, frames - 1, "never").motion, size)
        return replace(real, conditions=real.conditions._replace(condition=other))

    def logits(self, judged: Judged, t: Tensor) -> Tensor:
        """One logit per frame that carries a loss, (B, T - known), or per clip (B, 1)."""
        x, previous = judged.latents[:, :, 1:], judged.latents[:, :, :-1]
        with mixed_precision(x.device):
            if judged.real is None:
                logits = self.discriminator(x, previous, *judged.conditions, t)
            else:
                given = (judged.real, judged.conditions, t)
                logits = teacher_forced_logits(self.discriminator, x, *given)
        known = judged.known if self.discriminator.judgement == "frame" else 0
        return logits[:, known:].float()

    def train_discriminator(
        self,
        real: Judged,
        fakes: Judged,
        misled: Judged | None,
        t: Tensor,
        random: ClipRandom,
        share: float,
    ) -> tuple[Tensor, dict[str, float]]:
        """Accumulates the discriminator's gradients; returns its logits on real frames too."""
        config = self.config
        together = [real, fakes.detach()]
        together += [judged.perturbed(config.perturbation, random) for judged in together]
        together += [misled] if misled else []
        latents = torch.cat([judged.latents for judged in together])
        if real.real is None:
            channels, *words = zip(*(judged.conditions for judged in together), strict=True)
            channels = None if channels[0] is None else torch.cat(channels)
            conditions = Conditions(channels, *map(torch.cat, words))
            joined, times = Judged(latents, conditions, real.known), t.repeat(len(together))
        else:  # all four continue the same clips
            joined, times = replace(real, latents=latents), t
        on_real, on_fake, near_real, near_fake, *on_misled = self.logits(joined, times).chunk(
            len(together)
        )
        losses = {
            "discriminator": discriminator_loss(on_real, on_fake),
            "r1": config.penalty * approximate_penalty(on_real, near_real),
            "r2": config.penalty * approximate_penalty(on_fake, near_fake),
        }
        if misled:
            losses["mismatch"] = config.mismatch * discriminator_loss(on_real, *on_misled)
        (share * sum(losses.values())).backward()
        accuracy = (on_real > on_fake).float().mean()
        return on_real.detach(), {
            **{name: loss.item() for name, loss in losses.items()},
            "accuracy": accuracy.item(),
        }

    def train_generator(
        self,
        on_real: Tensor,
        fakes: Judged,
        errors: Mapping[str, Tensor],
        t: Tensor,
        share: float,
    ) -> dict[str, float]:
        """Accumulates the generator's gradients. The discriminator has not moved in between."""
        # The text's graph went with the discriminator's turn.
        given = Conditions(*(x if x is None else x.detach() for x in fakes.conditions))
        with frozen(self.discriminator):
            judged = self.logits(replace(fakes, conditions=given), t)
            losses = {"generator": generator_loss(on_real, judged), **errors}
            config = self.config
            weights = {"error": config.regression, "palette": config.palette, "rows": config.rows}
            weighed = {name: weights.get(name, 1.0) for name in losses}
            total = sum(weight * losses[name] for name, weight in weighed.items() if weight)
            (share * total).backward()
        return {name: loss.item() for name, loss in losses.items()}

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.discriminator_schedule(step, self.steps)
        judge = self.trained["discriminator"]
        norms = {"discriminator_gradient": judge.update(rate, config.max_norm)}
        if not self.warming(step):
            rate = config.generator_schedule(step - config.discriminator_warmup, config.steps)
            generator = self.trained["generator"]
            norms["generator_gradient"] = generator.update(rate, config.max_norm)
        return norms

    def export(self) -> WorldModel:
        return self.trained["generator"].export()
