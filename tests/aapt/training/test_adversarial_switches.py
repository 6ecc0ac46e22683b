"""Switches of stage 3: what each changes in the discriminator's inputs and in the losses."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from aapt.data.clips import LatentClips
from aapt.training.curriculum import Source

from ..helpers import PROMPTS, SIZE, clips, controls, draws, latents
from ..runs.counting import (
    adversarial_stage,
    assert_drives,
    counting_clips,
    counting_model,
    train,
    value,
)
from .discriminator_calls import recording


def test_the_discriminator_is_shown_motion_that_does_not_fit():
    """Real frames are shown again under the motion of other clips, and told apart like fakes."""
    weight, batch = 0.5, 8
    stage = adversarial_stage(
        counting_model(*[1.0] * 4),
        batch=batch,
        segments=2,
        overlap_frames=1,
        penalty=0.0,
        mismatch=weight,
    )
    with recording(stage) as calls:
        (metrics,) = train(stage, 1, counting_clips())
    expected = 0.0
    for known, call in enumerate(calls[::2]):
        x, previous, condition, text, text_lens, t = (a.chunk(5) for a in call.arguments)
        for same in (x, previous, text, text_lens, t):
            assert torch.equal(same[0], same[4])
        assert_drives(condition[0], value(x[0]))
        moved = (condition[4] - condition[0]).abs().amax(dim=(1, 2, 3, 4)) > 0.005
        assert moved.float().mean() >= 0.5  # windows of short clips may coincide
        logits = call.logits.clone().requires_grad_()
        on_real, on_fake, _, _, on_misled = logits[:, known:].chunk(5)
        mismatch = weight * F.softplus(on_misled - on_real).mean()
        ((F.softplus(on_fake - on_real).mean() + mismatch) / 2).backward()
        torch.testing.assert_close(call.gradient, logits.grad)
        expected += mismatch.item() / 2
    assert metrics["mismatch"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_motion_that_does_not_fit_is_also_the_own_at_another_speed(share):
    """A share of the clips is shown under its own rays times 1/2 to 3/4, or 4/3 to 2."""
    batch = 64
    stage = adversarial_stage(
        counting_model(*[1.0] * 4),
        batch=batch,
        penalized="none",
        mismatch=1.0,
        mismatched_gain=share,
    )
    with recording(stage) as calls:
        train(stage, 1, counting_clips(length=9))
    own, _, shown = (x.flatten(1) for x in calls[0].arguments[2].float().chunk(3))
    gains = (own * shown).sum(1) / own.square().sum(1)
    scaled = ((shown - gains[:, None] * own).abs() <= 0.01 * own.abs().amax(1, True)).all(1)
    scaled &= (gains - 1).abs() > 0.01  # another window of a short clip may coincide
    of_own = gains[scaled]
    assert abs(scaled.float().mean() - share) < 0.2
    assert (of_own < 1).any() and (of_own > 1).any()
    octaves = of_own.log2().abs()
    assert octaves.min() > 0.38 and octaves.max() < 1.02


def test_motion_that_does_not_fit_needs_a_frame_more():
    """Mismatched motion starts at frame 1 or later, so `needs` counts one more frame."""
    stage = adversarial_stage(counting_model(*[1.0] * 4), mismatch=1.0)
    assert stage.config.needs == {"clips": 4}
    train(stage, 1, counting_clips(length=5))
    assert adversarial_stage().config.needs == {"clips": 3}


def test_a_logit_per_clip_sees_everything():
    stage = adversarial_stage(judgement="clip")
    net = stage.discriminator
    x = latents(5).float()
    conditions = net.world.conditions(controls(4).float(), PROMPTS, SIZE)

    def logit(frames):
        return net(frames[:, :, 1:], frames[:, :, :-1], *conditions, torch.full((2,), 0.3))

    before = logit(x)
    assert before.shape == (2, 1)
    for changed in range(5):
        other = x.clone()
        other[:, :, changed] += 1
        assert ((logit(other) - before).abs() > 1e-6).all()
    metrics = train(stage, 2)
    assert {"discriminator", "generator"} <= set(metrics[0])


def test_both_heads_give_a_clip_the_weight_of_its_frames():
    """The clip's logit follows those of its frames, which stay causal, and counts as much."""
    stage = adversarial_stage(judgement="both", segments=2, overlap_frames=1, penalized="none")
    net = stage.discriminator
    x = latents(5).float()
    conditions = net.world.conditions(controls(4).float(), PROMPTS, SIZE)

    def logits(frames):
        return net(frames[:, :, 1:], frames[:, :, :-1], *conditions, torch.full((2,), 0.3))

    before = logits(x)
    assert before.shape == (2, 5)
    for changed in range(1, 5):
        other = x.clone()
        other[:, :, changed] += 1
        moved = (logits(other) - before).abs() > 1e-6
        assert moved[:, -1].all() and not moved[:, : changed - 1].any()
        assert moved[:, changed - 1 : -1].all()
    with recording(stage) as calls:
        (metrics,) = train(stage, 1)
    expected = 0.0
    for known, call in enumerate(calls[::2]):
        on_real, on_fake = call.logits.float().chunk(2)
        relative = F.softplus(on_fake - on_real)
        expected += (relative[:, known:-1].mean() + relative[:, -1].mean()).item() / 4
    assert metrics["discriminator"] == pytest.approx(expected, rel=1e-4)


def test_non_saturating_losses(made_segments):
    stage = adversarial_stage(loss="non-saturating", penalized="none")
    with recording(stage) as calls:
        (metrics,) = train(stage, 1)
    on_real, on_fake = calls[0].logits.float().chunk(2)
    told_apart = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    assert metrics["discriminator"] == pytest.approx(told_apart.item(), rel=1e-4)
    fooled = F.softplus(-calls[1].logits.float()).mean()
    assert metrics["generator"] == pytest.approx(fooled.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("penalized", "copies", "losses"),
    [("both", 4, {"r1", "r2"}), ("real", 3, {"r1"}), ("none", 2, set())],
)
def test_frames_without_a_penalty_are_not_shown_twice(penalized, copies, losses):
    stage = adversarial_stage(penalized=penalized, penalty=50.0)
    assert stage.config.copies == copies
    assert dataclasses.replace(stage.config, mismatch=1.0).copies == copies + 1
    with recording(stage) as calls:
        (metrics,) = train(stage, 1)
    x = calls[0].arguments[0].chunk(copies)
    assert {"r1", "r2"} & set(metrics) == losses
    if losses:
        on_real, _, near, *_ = calls[0].logits.float().chunk(copies)
        assert 0.05 < (x[2] - x[0]).std() < 0.15
        penalty = 50.0 * (on_real - near).square().mean().item()
        assert metrics["r1"] == pytest.approx(penalty, rel=1e-4)


def test_the_discriminator_is_shown_noised_frames():
    """Real and fake are mixed with noise up to their time, also as frames before others."""
    plain, noised = [], []
    for calls_of, changes in ((plain, {}), (noised, {"noised": True})):
        stage = adversarial_stage(
            counting_model(*[1.25] * 4), batch=64, penalized="none", mismatch=1.0, **changes
        )
        with recording(stage) as calls:
            train(stage, 1, counting_clips())
        calls_of.extend(calls)
    t = plain[0].arguments[5]
    assert torch.equal(t, noised[0].arguments[5])
    assert noised[1].arguments[0].requires_grad  # the generator learns through the mixture
    for clean, mixed in zip(plain, noised, strict=True):
        time = clean.arguments[5][:, None, None, None, None]
        x, before = (
            (mixed.arguments[i].detach() - (1 - time) * clean.arguments[i].detach()) / time
            for i in (0, 1)
        )
        late = clean.arguments[5] > 0.5  # small times magnify the rounding of values in hundreds
        assert x[late].std().item() == pytest.approx(1, abs=0.05)
        assert x[late].mean().item() == pytest.approx(0, abs=0.05)
        torch.testing.assert_close(x[late][:, :, :-1], before[late][:, :, 1:], rtol=0, atol=2e-3)
    real, fake, misled = noised[0].arguments[0].chunk(3)
    assert not torch.equal(real, misled) and not torch.equal(real, fake)


def test_the_longest_source_says_what_a_set_needs():
    """Also if a shorter one of the same set comes after it."""
    sources = Source("clips", 6), Source("clips", 3), Source("others", 4)
    stage = adversarial_stage(clips=sources, segment_frames=None, whole_clips=False)
    assert stage.config.needs == {"clips": 6, "others": 4}


def test_all_frames_have_a_token_frame():
    """The frame before the first has a place of its own: it recycles itself, nothing drives it,
    and its logit is dropped."""
    stage = adversarial_stage(
        counting_model(*[1.25] * 4),
        batch=4,
        segments=2,
        overlap_frames=1,
        penalized="none",
        discriminator_layout="all",
    )
    with recording(stage) as calls:
        (metrics,) = train(stage, 1, counting_clips())
    expected = 0.0
    for known, call in enumerate(calls[::2]):
        x, previous, condition = (a.chunk(2) for a in call.arguments[:3])
        for frames, before, driven in zip(x, previous, condition, strict=True):
            assert frames.shape[2] == 4
            torch.testing.assert_close(before, torch.cat([frames[:, :, :1], frames[:, :, :-1]], 2))
            assert not driven[:, :, 0].any()
        assert_drives(condition[0][:, :, 1:], value(x[0])[:, 1:])
        on_real, on_fake = call.logits.float()[:, 1 + known :].chunk(2)
        assert not call.gradient[:, : 1 + known].any()
        expected += F.softplus(on_fake - on_real).mean().item() / 2
    assert metrics["discriminator"] == pytest.approx(expected, rel=1e-4)


def test_a_discriminator_that_only_watches():
    """Without a weight of its loss, the generator learns from the errors against the clip alone."""
    gradients = []
    for changes in ({"penalty": 0.0}, {"penalty": 1e4, "loss": "non-saturating"}):
        stage = adversarial_stage(adversarial=0.0, regression=1.0, rows=2.0, **changes)
        trained = stage.trained["generator"]
        trained.optimizer.register_step_pre_hook(
            lambda *_, trained=trained: gradients.append(
                [p.grad.clone() for p in trained.parameters]
            )
        )
        (metrics,) = train(stage, 1)
        assert metrics["discriminator"] > 0 and metrics["discriminator_gradient"] > 0
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_a_segment_without_any_loss_moves_nothing():
    """With regression in first segments alone, and nothing else, a later one has no loss."""
    stage = adversarial_stage(
        adversarial=0.0, regression=1.0, regression_segments=0, penalized="none"
    )
    before = [p.clone() for p in stage.model.parameters()]
    (metrics,) = train(stage, 1)
    assert all(map(torch.equal, before, stage.model.parameters()))
    assert metrics["error"] > 0


def test_an_update_draws_from_one_of_several_sources(made_segments):
    """All its segments come from that source, with the source's lengths and starts."""
    sources = Source("small", 4, shortest=3, weight=2.0), Source("large", 2, first_frame="never")
    stage = adversarial_stage(
        clips=sources, segment_frames=None, segments=2, overlap_frames=1, whole_clips=False
    )
    assert stage.config.needs == {"small": 5, "large": 3}
    large = LatentClips(torch.randn(4, 4, 9, 8, 6), torch.zeros(4, 8, 2), [("a",)] * 4)
    small = clips()
    small.latents[:, :, 0] = 99.0
    large.latents[:, :, 0] = 99.0
    seen = []
    for step in range(12):
        stage.accumulate({"small": small, "large": large}, draws(2, step=step), step)
        first, later = made_segments[-2:]
        starts = first.recycled[:, :, 0] == 99
        seen.append((first.noise.shape[2], later.noise.shape[2], tuple(first.noise.shape[-2:])))
        assert starts.all() if seen[-1][2] == SIZE else not starts.any()
    assert set(seen) == {(3, 2, SIZE), (4, 3, SIZE), (2, 1, (8, 6))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forcing": "none"}, "forcing: expected 'student' or 'teacher', got 'none'"),
        ({"forcing": "teacher", "segments": 2}, "forcing: expected 'student' for several segments"),
        (
            {"forcing": "teacher", "lead_segments": 1},
            "forcing: expected 'student' for several segments",
        ),
        ({"overlap_frames": 3}, "overlap_frames: expected 0 to less than a segment, got 3"),
        (
            {"forcing": "teacher", "mismatch": 1.0},
            "mismatch: expected 0 under teacher forcing, got 1.0",
        ),
        ({"judgement": "pixel"}, "judgement: expected 'frame', 'clip' or 'both', got 'pixel'"),
        ({"forcing": "teacher", "judgement": "both"}, "forcing: expected 'student' for several"),
        ({"loss": "hinge"}, "loss: expected 'relativistic' or 'non-saturating', got 'hinge'"),
        ({"penalized": "fake"}, "penalized: expected 'both' or 'real' or 'none', got 'fake'"),
        (
            {"first_frame": "late"},
            "first_frame: expected 'always' or 'half' or 'never', got 'late'",
        ),
        (
            {"discriminator_layout": "own"},
            "discriminator_layout: expected 'targets' or 'all', got 'own'",
        ),
        (
            {"forcing": "teacher", "discriminator_layout": "all"},
            "discriminator_layout: expected 'targets' under teacher forcing, got 'all'",
        ),
        ({"segment_frames": None}, "segment_frames: expected frames per segment beside the name"),
        ({"clips": (Source("clips", 3),)}, "and none beside sources, got 3"),
        ({"regression_segments": -1}, "regression_segments: expected at least 0, got -1"),
        ({"adversarial": 0.0}, "adversarial: expected more than 0, or a weight of regression"),
        *(
            ({name: bad}, f"{name}: expected a finite number of at least 0, got {bad}")
            for name in ("adversarial", "penalty", "perturbation", "mismatch", "regression")
            for bad in (-1.0, math.inf, math.nan)
        ),
        ({"palette": -1.0}, "palette: expected a finite number of at least 0, got -1.0"),
        ({"rows": -1.0}, "rows: expected a finite number of at least 0, got -1.0"),
        ({"mixed_share": 1.5}, "mixed_share: expected 0 to 1, got 1.5"),
        ({"mixed_share": 0.5}, "mixed_share: expected 0 without mixed_with, got 0.5"),
        ({"lead_power": 0.0}, "lead_power: expected a finite number above 0, got 0.0"),
        ({"lead_power": math.inf}, "lead_power: expected a finite number above 0, got inf"),
        ({"mismatched_gain": 0.5}, "mismatched_gain: expected 0 to 1, and 0 without mismatch"),
        (
            {"mismatch": 1.0, "mismatched_gain": 1.5},
            "mismatched_gain: expected 0 to 1, and 0 without mismatch, got 1.5",
        ),
        ({"lead_segments": -1}, "lead_segments: expected at least 0, got -1"),
        ({"steps": -1}, "steps: expected at least 0, got -1"),
        ({"discriminator_warmup": -1}, "discriminator_warmup: expected at least 0, got -1"),
        ({"pooling": "maximum"}, "pooling: expected 'query' or 'average', got 'maximum'"),
        (
            {"whole_clips": False, "lead_segments": 1, "palette": 1.0},
            "regression, palette, rows: expected whole_clips",
        ),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        adversarial_stage(**changes)
