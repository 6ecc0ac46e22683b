"""Stage 3: adversarial training with student forcing, segment by segment (docs/method.md#8)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.clips import Clips, FirstFrame
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.discriminator import Discriminator, Judgement, Pooling
from ...model.low_rank import LoRA
from ...model.world_model import Conditions, WorldModel
from ...streaming.student import Segment, StudentRollout, frames_of
from ..corruption import Corruption
from ..curriculum import Source, draw_source, longest
from ..forcing import parallel_pass, teacher_forced_logits
from ..later_motion import LaterMotion
from ..losses import (
    GanLoss,
    approximate_penalty,
    channel_weighted_error,
    discriminator_loss,
    frame_mean_error,
    generator_loss,
    row_mean_error,
)
from ..optimization import MovingAverage, Schedule, Trained, frozen, learning, rmsprop
from ..shown import Shown

Penalized = Literal["both", "real", "none"]
Layout = Literal["targets", "all"]
WEIGHTS = (
    "adversarial",
    "penalty",
    "perturbation",
    "mismatch",
    "regression",
    "palette",
    "rows",
)


@dataclass(frozen=True)
class AdversarialConfig:
    """Numbers of stage 3; the defaults are the paper's, or ours where docs/method.md#12 says so.

    Attributes:
        clips: Name of the set that real clips come from; or sources, of which each update draws
            one. The frames of a source are those of a segment.
        steps: Updates of the generator; 0 for a stage that only mixes (`mixed_with`). The
            discriminator makes `discriminator_warmup` updates alone before them.
        batch: Clips per update.
        segment_frames: Frames per segment, which the discriminator sees at once; None for sources,
            which say so themselves.
        segments: Segments per rollout that the networks learn from.
        shortest_segment: Least frames per segment, drawn for each update from this to
            `segment_frames`; None for always `segment_frames`, and for sources.
        overlap_frames: Frames at the start of a later segment that are known from the segment
            before.
        overlap_loss: True if the discriminator also learns from these frames, as in the paper. No
            gradient reaches the generator through them.
        first_frame: Share of rollouts that start with frame 0 of a clip, see `Clips.sample`;
            sources say so themselves.
        whole_clips: True if clips are as long as the rollout, which follows their motion to the
            end. Otherwise later segments continue it as `LaterMotion` does (docs/method.md#8).
        lead_segments: Greatest number of segments that are rolled out, without a loss, before the
            first segment with one; drawn for each update from 0 to this. Late failures can so be
            learnt from cheaply (ours).
        lead_power: Power of the uniform number in [0, 1) that the lead is drawn with: 1 draws all
            leads equally often, 2 short ones more often.
        start, discriminator_start: The stages whose weights generator and discriminator start from;
            None for the run's start.
        mixed_with: Another stage; the generator starts from the weighted mean of its weights and
            those of `start`. Stages of one descent have a mean that works (arXiv 2203.05482).
        mixed_share: The weight of `mixed_with` in this mean, 0 to 1.
        loss: "relativistic" (paper) or "non-saturating".
        adversarial: Weight of the generator's adversarial loss; with 0 the discriminator only
            watches, which shows what the errors against the real clip reach alone.
        penalty, perturbation: lambda and sigma of aR1 and aR2.
        penalized: Frames with a penalty: "both" real and fake (aR1 and aR2), "real" alone, "none".
        perturb_known: True if the noise of the penalties reaches every frame that the discriminator
            is shown (paper), False if only frames with a loss.
        noised: True if the discriminator is shown frames mixed with noise up to its time t, as
            stage 1 is, and not clean frames (One-Forcing).
        alpha: Smoothing constant of RMSProp.
        average: Decay of the generator's moving average; None for none. The average is exported,
            and a later stage starts from it.
        max_norm: Norm to which gradients are clipped; None for no clipping.
        forcing: "student", or "teacher", the failing mode of the paper: the generator continues
            real frames, in parallel, and the discriminator sees each of its frames after real ones.
        judgement: One logit per "frame", one per "clip" from a discriminator without causality, or
            "both" from a causal one, where the clip's logit counts as much as all of its frames'.
        pooling: Tokens become a logit by a learned "query" or by their "average".
        discriminator_recycled: True if the discriminator also sees the frame before each frame, as
            the generator does.
        discriminator_layout: "targets" for one token-frame per frame with a logit, "all" for one
            more: the frame before the first, itself recycled, without a condition and a logit.
        corruption: Corruption of the first recycled frame of each segment, or, under teacher
            forcing, of all recycled frames.
        mismatch: Weight of a loss by which the discriminator tells real frames under another clip's
            motion from real frames under their own, and so learns to look at the controls (ours).
        mismatched_gain: Share of these clips whose motion is their own, made faster or slower: a
            generator that turns too little is then told from one that turns elsewhere.
        regression: Weight of a squared error against the real clip, in the generator's loss (ours,
            for small models).
        regression_segments: The first segments of a rollout in which `regression` counts; None for
            all. What comes into view later cannot be foretold, and its mean is an empty frame.
        palette: Weight of the error between the mean colours of frames, in the same way.
        rows: Weight of the error between the mean colours of rows, in the same way.
        lora: Adaptation of the generator; None to train all of its weights.
        discriminator_lora: Adaptation of the discriminator's backbone, whose heads learn wholly;
            None to train all of its weights.
        frozen_trunk: True to train the discriminator's heads alone.
        state_bits: Bits per number of the optimizers' moments, 32 or 8.
        offload: True to keep parameters, gradients and moments in the CPU's memory, see `savings`.
    """

    clips: str | tuple[Source, ...]
    steps: int
    batch: int
    generator_schedule: Schedule
    discriminator_schedule: Schedule
    segment_frames: int | None = None
    segments: int = 1
    shortest_segment: int | None = None
    overlap_frames: int = 0
    overlap_loss: bool = False
    first_frame: FirstFrame = "always"
    whole_clips: bool = False
    lead_segments: int = 0
    lead_power: float = 1.0
    start: str | None = "consistency"
    discriminator_start: str | None = "diffusion"
    mixed_with: str | None = None
    mixed_share: float = 0.0
    loss: GanLoss = "relativistic"
    adversarial: float = 1.0
    penalty: float = 1000.0
    perturbation: float = 0.1
    penalized: Penalized = "both"
    perturb_known: bool = True
    noised: bool = False
    alpha: float = 0.9
    discriminator_warmup: int = 0
    average: float | None = 0.995
    max_norm: float | None = None
    forcing: Literal["student", "teacher"] = "student"
    judgement: Judgement = "frame"
    pooling: Pooling = "query"
    discriminator_recycled: bool = True
    discriminator_layout: Layout = "targets"
    corruption: Corruption | None = None
    mismatch: float = 0.0
    mismatched_gain: float = 0.0
    regression: float = 0.0
    regression_segments: int | None = None
    palette: float = 0.0
    rows: float = 0.0
    lora: LoRA | None = None
    discriminator_lora: LoRA | None = None
    frozen_trunk: bool = False
    state_bits: int = 32
    offload: bool = False

    @property
    def sources(self) -> tuple[Source, ...]:
        """Sources of real clips, with the lengths of segments."""
        if not isinstance(self.clips, str):
            return self.clips
        lengths = self.segment_frames, self.shortest_segment
        return (Source(self.clips, *lengths, first_frame=self.first_frame),)

    def regression_of(self, segment: int) -> float:
        """Weight of the regression in a segment of a rollout, counted from its start."""
        last = self.regression_segments
        return self.regression if last is None or segment < last else 0.0

    @property
    def needs(self) -> dict[str, int]:
        return longest((source.clips, self.needed(source.frames)) for source in self.sources)

    def needed(self, length: int) -> int:
        """Frames after the first that clips must have for segments of `length` frames."""
        later = self.lead_segments + self.segments - 1
        followed = later * (length - self.overlap_frames) if self.whole_clips else 0
        # Real clips of later segments, and mismatched motion, start after frame 0: one frame more.
        after_first = 1 if later or self.mismatch else 0
        return length + max(followed, after_first)

    @property
    def copies(self) -> int:
        """Copies of a clip that train the discriminator: real, fake, the penalized ones perturbed,
        mismatched."""
        return 2 + self.perturbed_copies + bool(self.mismatch)

    @property
    def perturbed_copies(self) -> int:
        return {"both": 2, "real": 1, "none": 0}[self.penalized]

    @property
    def batches(self) -> set[int]:
        return {self.batch}

    def __post_init__(self):
        if self.forcing not in ("student", "teacher"):
            raise ValueError(f"forcing: expected 'student' or 'teacher', got {self.forcing!r}")
        for name, choices in (
            ("loss", GanLoss),
            ("penalized", Penalized),
            ("discriminator_layout", Layout),
            ("first_frame", FirstFrame),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}: expected {' or '.join(map(repr, get_args(choices)))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: expected a finite number of at least 0, got {getattr(self, name)}"
                )
        if not 0 <= self.mixed_share <= 1:
            raise ValueError(f"mixed_share: expected 0 to 1, got {self.mixed_share}")
        if self.mixed_share and not self.mixed_with:
            raise ValueError(f"mixed_share: expected 0 without mixed_with, got {self.mixed_share}")
        if not 0 < self.lead_power < math.inf:
            raise ValueError(f"lead_power: expected a finite number above 0, got {self.lead_power}")
        if not 0 <= self.mismatched_gain <= bool(self.mismatch):
            raise ValueError(
                "mismatched_gain: expected 0 to 1, and 0 without mismatch, "
                f"got {self.mismatched_gain}"
            )
        for name in ("steps", "discriminator_warmup", "lead_segments", "regression_segments"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if isinstance(self.clips, str) == (self.segment_frames is None):
            raise ValueError(
                "segment_frames: expected frames per segment beside the name of a set, and none "
                f"beside sources, got {self.segment_frames}"
            )
        several = self.lead_segments + self.segments > 1
        if self.forcing == "teacher" and (several or self.judgement != "frame"):
            raise ValueError(
                "forcing: expected 'student' for several segments or one logit per clip, "
                "got 'teacher'"
            )
        if self.forcing == "teacher" and self.discriminator_layout == "all":
            raise ValueError(
                "discriminator_layout: expected 'targets' under teacher forcing, got 'all'"
            )
        if self.forcing == "teacher" and self.mismatch:
            raise ValueError(f"mismatch: expected 0 under teacher forcing, got {self.mismatch}")
        shortest = min(source.shortest or source.frames for source in self.sources)
        if not 0 <= self.overlap_frames < shortest:
            raise ValueError(
                f"overlap_frames: expected 0 to less than a segment, got {self.overlap_frames}"
            )
        if self.frozen_trunk and self.discriminator_lora:
            raise ValueError("discriminator_lora: expected None with frozen_trunk, got LoRA")
        if (self.regression or self.palette or self.rows) and several and not self.whole_clips:
            raise ValueError(
                "regression, palette, rows: expected whole_clips, because later segments have no "
                "real frames to compare with"
            )
        if not (self.adversarial or self.regression or self.palette or self.rows):
            raise ValueError(
                "adversarial: expected more than 0, or a weight of regression, palette or rows, "
                "got 0: the generator would learn nothing"
            )


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
        if config.mismatched_gain and not model.camera:
            raise ValueError(
                "mismatched_gain: expected 0 for a model that no camera controls, "
                f"got {config.mismatched_gain}"
            )
        several = config.lead_segments + config.segments > 1
        if model.camera and model.camera.relative_to_first and several:
            raise ValueError("relative_to_first: expected False for several segments, got True")
        self.config = config
        self.model = model
        self.pixel_deviation = pixel_deviation
        self.steps = config.discriminator_warmup + config.steps
        self.discriminator = discriminator
        average = None if config.average is None else MovingAverage(model, config.average)
        self.trained = {
            "generator": Trained(
                model, rmsprop(learning(model), config.alpha, config.state_bits), average
            ),
            "discriminator": Trained(
                discriminator,
                rmsprop(learning(discriminator), config.alpha, config.state_bits),
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
        sources = self.config.sources
        source = draw_source(sources, random) if len(sources) > 1 else sources[0]
        clips, length = sets[source.clips], source.length(random)
        forced = self.teacher_forced if self.config.forcing == "teacher" else self.student_forced
        return forced(clips, length, source.first_frame, random, step, share)

    def student_forced(
        self,
        clips: Clips,
        length: int,
        first_frame: FirstFrame,
        random: ClipRandom,
        step: int,
        share: float,
    ) -> dict[str, float]:
        """Roll out all segments of `length` frames, and accumulate gradients after each segment
        with a loss."""
        config, model = self.config, self.model
        clips = clips.part(random, config.needed(length))
        further = length - config.overlap_frames  # new frames of a later segment
        lead = int((config.lead_segments + 1) * random.shared.random() ** config.lead_power)
        whole = lead + config.segments if config.whole_clips else 1
        batch = clips.sample(random, length + (whole - 1) * further, first_frame)
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
            without_loss = 0 if config.overlap_loss else known
            fakes = self.shown(
                history[:, :, window.start :],  # begins with the frame before the first
                frames_of(channels, window),
                batch.prompts,
                without_loss,
            )
            history = history.detach()
            real = batch if index == 0 else clips.sample(random, known + new, "never")
            along = model.channels(real.motion, batch.size)
            reals = self.shown(
                real.latents[:, :, : known + new + 1],
                frames_of(along, slice(known + new)),
                real.prompts,
                without_loss,
            )
            targets = batch.targets[:, :, place] if whole == lead + config.segments else None
            mismatched = self.mismatched(clips, reals, random) if config.mismatch else None
            part = self.train_on_segment(
                *(reals, fakes, mismatched, fake, targets, config.regression_of(index)),
                *(random, step, share / config.segments),
            )
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + value / config.segments
        return metrics

    def teacher_forced(
        self,
        clips: Clips,
        length: int,
        first_frame: FirstFrame,
        random: ClipRandom,
        step: int,
        share: float,
    ) -> dict[str, float]:
        """Continue real frames, in parallel, and accumulate gradients of both networks."""
        config, model = self.config, self.model
        batch = clips.sample(random, length, first_frame)
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
        return self.train_on_segment(
            real, fakes, None, fake, batch.targets, config.regression, random, step, share
        )

    def train_on_segment(
        self,
        real: Shown,
        fakes: Shown,
        mismatched: Shown | None,
        fake: Tensor,
        targets: Tensor | None,
        regression: float,
        random: ClipRandom,
        step: int,
        share: float,
    ) -> dict[str, float]:
        """Accumulate the gradients of both networks on one segment.

        Args:
            fake: The new frames of the segment (B, C, T, H, W), with gradient.
            targets: Real frames to compare them with; None for no error against the clip.
            regression: Weight of the error of latents.
        """
        t = random.uniform()
        if self.config.noised:
            real, fakes = real.noised(t, random), fakes.noised(t, random)
            mismatched = mismatched and mismatched.noised(t, random)
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
            metrics |= self.train_generator(on_real, fakes, errors, regression, t, share)
        return metrics

    def shown(
        self, latents: Tensor, channels: Tensor | None, prompts: Sequence[str], known: int
    ) -> Shown:
        """Add to latents (B, C, 1 + T, H, W) the text conditions of the discriminator."""
        with mixed_precision(latents.device):
            words = self.discriminator.world.text_encoder(prompts)
        return Shown(latents, Conditions(channels, *words), known)

    def mismatched(self, clips: Clips, real: Shown, random: ClipRandom) -> Shown:
        """Real frames under the motion of other clips, or under their own at another speed."""
        frames, *size = real.latents.shape[2:]
        other = self.model.channels(clips.sample(random, frames - 1, "never").motion, size)
        if self.config.mismatched_gain:
            own = random.uniform(1, 1, 1, 1) < self.config.mismatched_gain
            faster = random.uniform(1, 1, 1, 1) < 0.5
            octaves = 0.4 + 0.6 * random.uniform(1, 1, 1, 1)
            # Rays less those at rest are about linear in a small motion.
            moved = real.conditions.condition * 2 ** torch.where(faster, octaves, -octaves)
            other = torch.where(own, moved, other)
        return replace(real, conditions=real.conditions._replace(condition=other))

    def logits(self, shown: Shown, t: Tensor) -> Tensor:
        """Logits of the frames that carry a loss, (B, T - known), or of whole clips, (B, 1); with
        both, (B, 2 (T - known)), the clip's logit repeated."""
        x, previous = shown.latents[:, :, 1:], shown.latents[:, :, :-1]
        (channels, *words), known = shown.conditions, shown.known
        if self.config.discriminator_layout == "all":
            x, previous = shown.latents, torch.cat([shown.latents[:, :, :1], previous], dim=2)
            channels = None if channels is None else F.pad(channels, (0, 0, 0, 0, 1, 0))
            known += 1
        with mixed_precision(x.device):
            if shown.real is None:
                logits = self.discriminator(x, previous, channels, *words, t)
            else:
                given = (shown.real, shown.conditions, t)
                logits = teacher_forced_logits(self.discriminator, x, *given)
        if self.config.judgement == "clip":
            return logits.float()
        frames = logits[:, known : x.shape[2]].float()
        of_clip = logits[:, x.shape[2] :].float()  # empty without a logit per clip
        return torch.cat([frames, of_clip.expand(-1, of_clip.shape[1] * frames.shape[1])], dim=1)

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
        together += [
            shown.perturbed(config.perturbation, random, spare_known=not config.perturb_known)
            for shown in together[: config.perturbed_copies]
        ]
        together += [mismatched] if mismatched else []
        latents = torch.cat([shown.latents for shown in together])
        if real.real is None:
            channels, *words = zip(*(shown.conditions for shown in together), strict=True)
            channels = None if channels[0] is None else torch.cat(channels)
            conditions = Conditions(channels, *map(torch.cat, words))
            joined, times = Shown(latents, conditions, real.known), t.repeat(len(together))
        else:  # all copies continue the same clips
            joined, times = replace(real, latents=latents), t
        on_real, on_fake, *others = self.logits(joined, times).chunk(len(together))
        losses = {"discriminator": discriminator_loss(on_real, on_fake, config.loss)}
        near = zip(("r1", "r2"), (on_real, on_fake), others[: config.perturbed_copies])
        for name, plain, perturbed in near:
            losses[name] = config.penalty * approximate_penalty(plain, perturbed)
        if mismatched:
            misled = discriminator_loss(on_real, others[-1], config.loss)
            losses["mismatch"] = config.mismatch * misled
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
        regression: float,
        t: Tensor,
        share: float,
    ) -> dict[str, float]:
        """Accumulate the generator's gradients. The discriminator has not moved since its turn."""
        # The discriminator's backward pass has freed the text encoder's graph.
        given = Conditions(*(x if x is None else x.detach() for x in fakes.conditions))
        with frozen(self.discriminator):
            on_fake = self.logits(replace(fakes, conditions=given), t)
            config = self.config
            losses = {"generator": generator_loss(on_real, on_fake, config.loss), **errors}
            weights = {
                "generator": config.adversarial,
                "error": regression,
                "palette": config.palette,
                "rows": config.rows,
            }
            weighed = [weights[name] * loss for name, loss in losses.items() if weights[name]]
            if weighed:  # none without an adversarial loss beyond `regression_segments`
                (share * sum(weighed)).backward()
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
