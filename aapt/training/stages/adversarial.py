"""Stage 3: adversarial training with student forcing, segment by segment (docs/method.md#8)."""

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
from ..later_motion import LaterMotion
from ..losses import (
    approximate_penalty,
    channel_weighted_error,
    discriminator_loss,
    frame_mean_error,
    generator_loss,
    row_mean_error,
)
from ..optimization import MovingAverage, Schedule, Trained, frozen


@dataclass(frozen=True)
class AdversarialConfig:
    """Numbers of stage 3; the defaults are the paper's, or ours where docs/method.md#12 says so.

    Attributes:
        clips: Name of the set that real clips come from.
        steps: Updates of the generator. The discriminator makes `discriminator_warmup` updates
            alone before them.
        batch: Clips per update.
        segment_frames: Frames per segment, which the discriminator sees at once.
        segments: Segments per rollout that the networks learn from.
        shortest_segment: Least frames per segment, drawn for each update from this to
            `segment_frames`; None for always `segment_frames`.
        overlap_frames: Frames at the start of a later segment that are known from the segment
            before. They carry no loss.
        whole_clips: True if clips are as long as the rollout, which follows their motion to the
            end. Otherwise later segments continue it as `LaterMotion` does (docs/method.md#8).
        lead_segments: Greatest number of segments that are rolled out, without a loss, before the
            first segment with one; drawn for each update from 0 to this. Late failures can so be
            learnt from cheaply (ours).
        start, discriminator_start: The stages whose weights generator and discriminator start from.
        penalty, perturbation: lambda and sigma of aR1 and aR2.
        alpha: Smoothing constant of RMSProp.
        average: Decay of the generator's moving average; None for none. The average is exported,
            and a later stage starts from it.
        max_norm: Norm to which gradients are clipped; None for no clipping.
        forcing: "student", or "teacher", the failing mode of the paper: the generator continues
            real frames, in parallel, and the discriminator sees each of its frames after real ones.
        judgement: One logit per "frame", or one per "clip" from a discriminator without causality.
        pooling: Tokens become a logit by a learned "query" or by their "average".
        discriminator_recycled: True if the discriminator also sees the frame before each frame, as
            the generator does.
        corruption: Corruption of the first recycled frame of each segment, or, under teacher
            forcing, of all recycled frames.
        mismatch: Weight of a loss by which the discriminator tells real frames under another clip's
            motion from real frames under their own, and so learns to look at the controls (ours).
        regression: Weight of a squared error against the real clip, in the generator's loss (ours,
            for small models).
        palette: Weight of the error between the mean colours of frames, in the same way.
        rows: Weight of the error between the mean colours of rows, in the same way.
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
    discriminator_start: str = "diffusion"
    penalty: float = 1000.0
    perturbation: float = 0.1
    alpha: float = 0.9
    discriminator_warmup: int = 0
    average: float | None = 0.995
    max_norm: float | None = None
    forcing: Literal["student", "teacher"] = "student"
    judgement: Judgement = "frame"
    pooling: Pooling = "query"
    discriminator_recycled: bool = True
    corruption: Corruption | None = None
    mismatch: float = 0.0
    regression: float = 0.0
    palette: float = 0.0
    rows: float = 0.0

    @property
    def needs(self) -> dict[str, int]:
        return {self.clips: self.needed(self.segment_frames)}

    def needed(self, length: int) -> int:
        """Frames after the first that clips must have for segments of `length` frames."""
        later = self.lead_segments + self.segments - 1
        followed = later * (length - self.overlap_frames) if self.whole_clips else 0
        # Real clips of later segments, and mismatched motion, start after frame 0: one frame more.
        after_first = 1 if later or self.mismatch else 0
        return length + max(followed, after_first)

    @property
    def copies(self) -> int:
        """Copies of a clip that train the discriminator: real, fake, both perturbed, mismatched."""
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
                "regression, palette, rows: expected whole_clips, because later segments have no "
                "real frames to compare with"
            )


@dataclass(frozen=True)
class Shown:
    """Frames that the discriminator is shown.

    Attributes:
        latents: (B, C, 1 + T, H, W): the frame before the first, then the T frames that get logits.
        conditions: Conditions of the T frames.
        known: Number of frames, the first of the T, that carry no loss.
        real: Clips that teacher-forced frames continue, each frame separately; None for frames
            that follow each other.
    """

    latents: Tensor
    conditions: Conditions
    known: int = 0
    real: Tensor | None = None

    def detach(self) -> "Shown":
        return replace(self, latents=self.latents.detach())

    def perturbed(self, deviation: float, random: ClipRandom) -> "Shown":
        """Draw the frames that carry a loss from N(x, deviation), also as frames before others."""
        noise = deviation * random.normal(*self.latents.shape[1:])
        noise[:, :, : 1 + self.known] = 0
        return replace(self, latents=self.latents + noise)


class Adversarial:
    """Trains a generator on its own rollouts against a discriminator with one logit per frame.

    Each segment continues from the detached cache of the segment before. The first segment is
    compared with the real clip that it starts from, later segments with other real clips. Gradients
    accumulate segment by segment. One update of both networks follows the whole rollout.
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
        learning = [p for p in self.discriminator.parameters() if p.requires_grad]
        average = None if config.average is None else MovingAverage(model, config.average)
        self.trained = {
            "generator": Trained(
                model, torch.optim.RMSprop(model.parameters(), alpha=config.alpha), average
            ),
            "discriminator": Trained(
                self.discriminator, torch.optim.RMSprop(learning, alpha=config.alpha)
            ),
        }

    def batch(self, step: int) -> int:
        return self.config.batch

    def warming(self, step: int) -> bool:
        """True while only the discriminator learns."""
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
        """Roll out all segments, and accumulate gradients after each segment with a loss."""
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
        later = None
        if channels is not None and not config.whole_clips:
            later = LaterMotion(clips, batch, config.overlap_frames, model.camera)
        history = batch.recycled[:, :, :1]
        metrics: dict[str, float] = {}
        for index in range(lead + config.segments):
            known, new = (config.overlap_frames, further) if index else (0, length)
            learnt = index >= lead
            place = slice(rollout.frames, rollout.frames + new)
            if index and later:
                made = model.channels(later.next(new, random), batch.size)
                channels = torch.cat([channels, made], dim=2)
            start = rollout.last
            if config.corruption and learnt:
                start = config.corruption(start, index == 0, random)
            noise = random.normal(batch.latents.shape[1], new, *batch.size)
            with precision:
                segment = rollout.roll(noise, frames_of(channels, place), start)
            fake = segment.output
            if learnt and not self.warming(step):
                with precision:
                    text, text_lens = model.text_encoder(batch.prompts)
                    fake = parallel_pass(model.transformer, segment, text, text_lens)
            history = torch.cat([history, fake], dim=2)
            if not learnt:
                continue
            window = slice(place.start - known, place.stop)
            fakes = self.shown(
                history[:, :, window.start :],  # begins with the frame before the first
                frames_of(channels, window),
                batch.prompts,
                known,
            )
            history = history.detach()
            real = batch if index == 0 else clips.sample(random, known + new, "never")
            along = model.channels(real.motion, batch.size)
            reals = self.shown(
                real.latents[:, :, : known + new + 1],
                frames_of(along, slice(known + new)),
                real.prompts,
                known,
            )
            targets = batch.targets[:, :, place] if whole == lead + config.segments else None
            mismatched = self.mismatched(clips, reals, random) if config.mismatch else None
            part = self.train_on_segment(
                reals, fakes, mismatched, fake, targets, random, step, share / config.segments
            )
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + value / config.segments
        return metrics

    def teacher_forced(
        self, clips: Clips, random: ClipRandom, step: int, share: float
    ) -> dict[str, float]:
        """Continue real frames, in parallel, and accumulate gradients of both networks."""
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
        real = self.shown(batch.latents, channels, batch.prompts, known=0)
        real = replace(real, real=batch.latents)
        continued = torch.cat([batch.recycled[:, :, :1], fake], dim=2)
        fakes = replace(real, latents=continued)
        return self.train_on_segment(real, fakes, None, fake, batch.targets, random, step, share)

    def train_on_segment(
        self,
        real: Shown,
        fakes: Shown,
        mismatched: Shown | None,
        fake: Tensor,
        targets: Tensor | None,
        random: ClipRandom,
        step: int,
        share: float,
    ) -> dict[str, float]:
        """Accumulate the gradients of both networks on one segment.

        Args:
            fake: The new frames of the segment (B, C, T, H, W), with gradient.
            targets: Real frames to compare them with; None for no error against the clip.
        """
        t = random.uniform()
        on_real, metrics = self.train_discriminator(real, fakes, mismatched, t, random, share)
        if not self.warming(step):
            errors = {}
            if targets is not None:
                compared = fake, targets, self.pixel_deviation
                errors = {
                    "error": channel_weighted_error(*compared),
                    "palette": frame_mean_error(*compared),
                    "rows": row_mean_error(*compared),
                }
            metrics |= self.train_generator(on_real, fakes, errors, t, share)
        return metrics

    def shown(
        self, latents: Tensor, channels: Tensor | None, prompts: Sequence[str], known: int
    ) -> Shown:
        """Add to latents (B, C, 1 + T, H, W) the text conditions of the discriminator."""
        with mixed_precision(latents.device):
            words = self.discriminator.world.text_encoder(prompts)
        return Shown(latents, Conditions(channels, *words), known)

    def mismatched(self, clips: Clips, real: Shown, random: ClipRandom) -> Shown:
        """Real frames under the motion of other clips."""
        frames, *size = real.latents.shape[2:]
        other = self.model.channels(clips.sample(random, frames - 1, "never").motion, size)
        return replace(real, conditions=real.conditions._replace(condition=other))

    def logits(self, shown: Shown, t: Tensor) -> Tensor:
        """Logits of the frames that carry a loss, (B, T - known), or of whole clips, (B, 1)."""
        x, previous = shown.latents[:, :, 1:], shown.latents[:, :, :-1]
        with mixed_precision(x.device):
            if shown.real is None:
                logits = self.discriminator(x, previous, *shown.conditions, t)
            else:
                given = (shown.real, shown.conditions, t)
                logits = teacher_forced_logits(self.discriminator, x, *given)
        known = shown.known if self.discriminator.judgement == "frame" else 0
        return logits[:, known:].float()

    def train_discriminator(
        self,
        real: Shown,
        fakes: Shown,
        mismatched: Shown | None,
        t: Tensor,
        random: ClipRandom,
        share: float,
    ) -> tuple[Tensor, dict[str, float]]:
        """Accumulate the discriminator's gradients. Returns its logits on real frames, metrics."""
        config = self.config
        together = [real, fakes.detach()]
        together += [shown.perturbed(config.perturbation, random) for shown in together]
        together += [mismatched] if mismatched else []
        latents = torch.cat([shown.latents for shown in together])
        if real.real is None:
            channels, *words = zip(*(shown.conditions for shown in together), strict=True)
            channels = None if channels[0] is None else torch.cat(channels)
            conditions = Conditions(channels, *map(torch.cat, words))
            joined, times = Shown(latents, conditions, real.known), t.repeat(len(together))
        else:  # all four copies continue the same clips
            joined, times = replace(real, latents=latents), t
        on_real, on_fake, near_real, near_fake, *on_misled = self.logits(joined, times).chunk(
            len(together)
        )
        losses = {
            "discriminator": discriminator_loss(on_real, on_fake),
            "r1": config.penalty * approximate_penalty(on_real, near_real),
            "r2": config.penalty * approximate_penalty(on_fake, near_fake),
        }
        if mismatched:
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
        fakes: Shown,
        errors: Mapping[str, Tensor],
        t: Tensor,
        share: float,
    ) -> dict[str, float]:
        """Accumulate the generator's gradients. The discriminator has not moved since its turn."""
        # The discriminator's backward pass has freed the text encoder's graph.
        given = Conditions(*(x if x is None else x.detach() for x in fakes.conditions))
        with frozen(self.discriminator):
            on_fake = self.logits(replace(fakes, conditions=given), t)
            losses = {"generator": generator_loss(on_real, on_fake), **errors}
            config = self.config
            weights = {"error": config.regression, "palette": config.palette, "rows": config.rows}
            weighted = {name: weights.get(name, 1.0) for name in losses}
            total = sum(weight * losses[name] for name, weight in weighted.items() if weight)
            (share * total).backward()
        return {name: loss.item() for name, loss in losses.items()}

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.discriminator_schedule(step, self.steps)
        discriminator = self.trained["discriminator"]
        norms = {"discriminator_gradient": discriminator.update(rate, config.max_norm)}
        if not self.warming(step):
            rate = config.generator_schedule(step - config.discriminator_warmup, config.steps)
            generator = self.trained["generator"]
            norms["generator_gradient"] = generator.update(rate, config.max_norm)
        return norms

    def export(self) -> WorldModel:
        return self.trained["generator"].export()
