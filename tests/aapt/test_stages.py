"""Every stage takes real steps on small random clips, and moves what it should."""

import copy
import dataclasses

import pytest
import torch

from aapt.discriminator import Discriminator
from aapt.optimization import Schedule
from aapt.stages.adversarial import Adversarial, AdversarialConfig
from aapt.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from aapt.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from aapt.stages.rollout_regression import (
    Corruption,
    RolloutRegression,
    RolloutRegressionConfig,
)

from .helpers import PROMPTS, SIZE, clips, controls, latents, tiny_model


def model():
    return tiny_model(sink_distance="clamped", residual_head=True, output_clamp=4.0).float()


def train(stage, steps, data=None):
    data = data or clips()
    return [stage.step(data, step) for step in range(steps)]


def test_diffusion_learns_one_clip():
    config = DiffusionConfig(Schedule(3e-3, 60, 5), batch=4, frames=4, shift=6.0, average=0.9)
    stage = DiffusionAdaptation(config, model(), seed=0)
    losses = [m["loss"] for m in train(stage, 60, clips(count=1, length=5))]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    exported = stage.export()
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, stage.average.shadow[name])


def test_stages_are_reproducible():
    config = DiffusionConfig(Schedule(1e-3, 3), batch=2, frames=3)
    runs = [train(DiffusionAdaptation(config, model(), seed=5), 3) for _ in range(2)]
    assert runs[0] == runs[1]


def test_consistency_leaves_the_teacher_alone():
    config = ConsistencyConfig(Schedule(1e-3, 3), batch=2, frames=3)
    stage = ConsistencyDistillation(config, model(), seed=0)
    before = copy.deepcopy(stage.teacher)
    train(stage, 3)
    for a, b in zip(before.parameters(), stage.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    moved = (stage.model.transformer.video_in.weight - before.transformer.video_in.weight).abs()
    assert moved.max() > 0


def test_consistency_target_at_zero_is_the_teachers_step():
    """At k = 1 the target is x' itself: f(x, 0) = x (SPEC 7). A student that already maps there
    has no loss."""
    config = ConsistencyConfig(Schedule(0.0, 3), batch=2, frames=3, times=1)
    stage = ConsistencyDistillation(config, tiny_model().float(), seed=0)
    # One time: t = 1 -> 0. Teacher = student, no clamp, so x' = f(x, 1) exactly.
    assert train(stage, 1)[0]["loss"] == pytest.approx(0, abs=1e-4)


def test_rollout_regression_runs_segments():
    config = RolloutRegressionConfig(Schedule(1e-3, 40), batch=2, segment_frames=3, segments=2)
    stage = RolloutRegression(config, model(), torch.ones(4), seed=0)
    losses = [m["loss"] for m in train(stage, 40, clips(count=1, length=7))]
    assert sum(losses[-8:]) < sum(losses[:8])


def test_corruption_spares_most_first_frames():
    random = torch.Generator().manual_seed(0)
    frame = torch.zeros(64, 4, 1, 2, 2)
    touched = [
        (Corruption()(frame, first=True, random=random) != 0).any().item() for _ in range(100)
    ]
    assert 15 < sum(touched) < 45  # first_chance 0.3
    later = Corruption()(frame, first=False, random=random)
    share = (later != 0).flatten(1).any(1).float().mean().item()
    assert 0.4 < share < 0.8  # clip_chance 0.6
    # A white part and an offset per channel, each up to 0.35 standard deviations.
    assert later.abs().max() < 0.35 * 2 * 6


def adversarial(**changes):
    config = AdversarialConfig(
        Schedule(1e-3, 4), Schedule(1e-3, 4), batch=2, segment_frames=3, **changes
    )
    return Adversarial(config, model(), model(), seed=0)


def test_adversarial_moves_both_networks():
    stage = adversarial(segments=2, overlap_frames=1, corruption=Corruption())
    before = copy.deepcopy((stage.model, stage.discriminator))
    metrics = train(stage, 2)
    losses = {"discriminator", "r1", "r2", "accuracy", "generator"}
    assert set(metrics[0]) == losses | {"discriminator_gradient", "generator_gradient"}
    assert not torch.equal(
        before[0].transformer.video_in.weight, stage.model.transformer.video_in.weight
    )
    assert not torch.equal(before[1].logit.weight, stage.discriminator.logit.weight)
    assert torch.equal(
        before[1].backbone.video_out.weight, stage.discriminator.backbone.video_out.weight
    )


def test_warmup_freezes_the_generator():
    stage = adversarial(discriminator_warmup=2)
    before = copy.deepcopy(stage.model)
    metrics = train(stage, 2)
    for a, b in zip(before.parameters(), stage.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "generator" not in metrics[0]


def test_discriminator_gives_a_causal_logit_per_frame():
    net = tiny_model()
    judge = Discriminator(net.transformer).double()
    conditions = net.conditions(controls(5), PROMPTS, SIZE)
    x, previous, t = latents(5), latents(5), torch.full((2,), 0.3).double()
    before = judge(x, previous, *conditions, t)
    assert before.shape == (2, 5)
    x = x.clone()
    x[:, :, 3] += 1
    after = judge(x, previous, *conditions, t)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert (before[:, 3:] - after[:, 3:]).abs().min() > 0
    assert judge.taps == [0, 1, 2]


def test_taps_sit_at_the_papers_depths():
    """16, 26 and 36 of 36 blocks (SPEC 12)."""
    from aapt.model import VideoTransformer
    from aapt.recipes import aapt_8b

    with torch.device("meta"):
        backbone = VideoTransformer(dataclasses.replace(aapt_8b(), width=128, heads=1))
        assert Discriminator(backbone).taps == [15, 25, 35]


def test_windows_start_where_they_should():
    data = clips(count=2, length=9)
    data.latents[:, :, 0] = 99.0
    random = torch.Generator().manual_seed(0)
    starts = [data.sample(1, 4, random).latents[0, 0, 0, 0, 0].item() == 99 for _ in range(200)]
    assert 90 < sum(starts) < 150  # half, and a fifth of the rest
    for _ in range(50):
        assert data.sample(1, 4, random, first_frame="never").latents.max() < 50
    with pytest.raises(ValueError, match="frames: expected at most 8, got 9"):
        data.sample(1, 9, random)
