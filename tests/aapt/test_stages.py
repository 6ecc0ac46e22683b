"""Every stage takes real steps on small clips: what each network is shown, and what moves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aapt.data.procedural import VideoClips
from aapt.optimization import Schedule
from aapt.stages import consistency_distillation
from aapt.stages.adversarial import Adversarial
from aapt.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from aapt.stages.decoder import DecoderConfig, DecoderTraining
from aapt.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from aapt.stages.rollout_regression import (
    Corruption,
    RolloutRegression,
    RolloutRegressionConfig,
)
from aapt.vae import CausalVAE, VAEConfig

from .counting import (
    adversarial_stage,
    assert_drives,
    counting_clips,
    counting_model,
    model,
    prompted,
    recorded,
    recovered_noise,
    train,
    value,
)
from .helpers import clips


def test_diffusion_learns_one_clip():
    config = DiffusionConfig(Schedule(3e-3, 60, 5), batch=4, frames=4, shift=6.0, average=0.9)
    stage = DiffusionAdaptation(config, model(), seed=0)
    losses = [m["loss"] for m in train(stage, 60, clips(count=1, length=5))]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    exported = stage.export()
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, stage.average.shadow[name])


def test_diffusion_shows_clean_pasts_and_noisy_targets():
    """Teacher forcing with one shifted t per clip, conditions in place, and MSE on v (SPEC 6)."""
    config = DiffusionConfig(Schedule(0.0, 1), batch=256, frames=3, shift=6.0, caption_dropout=0.5)
    stage = DiffusionAdaptation(config, recorded(0.5), seed=0)
    embed = copy.deepcopy(stage.model.text_encoder)
    (metrics,) = train(stage, 1, counting_clips())
    ((x_t, recycled, condition, text, text_lens, t),) = stage.model.transformer.calls
    assert t.shape == (256,)
    noise = recovered_noise(x_t, recycled, t)
    loss = (0.5 * x_t - (noise - (recycled + 1))).square().mean()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)

    assert_drives(condition, value(recycled) + 1)
    uniform = t / (6 - 5 * t)  # the shift undone
    assert ((uniform >= 0) & (uniform <= 1)).all()
    for quartile in (0.25, 0.5, 0.75):
        assert (uniform < quartile).float().mean().item() == pytest.approx(quartile, abs=0.1)

    prompts = prompted(value(recycled))
    has_caption = [bool(prompt) for prompt in prompts]
    dropped = (text_lens == 1)[has_caption].float()
    assert 0.35 < dropped.mean() < 0.65
    kept = ["" if drop else prompt for drop, prompt in zip(text_lens == 1, prompts, strict=True)]
    for actual, expected in zip((text, text_lens), embed(kept), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_captions_are_dropped_as_often_as_asked(dropout):
    config = DiffusionConfig(Schedule(0.0, 1), batch=64, frames=2, caption_dropout=dropout)
    stage = DiffusionAdaptation(config, recorded(0.5), seed=0)
    train(stage, 1, clips())  # prompts of two or three bytes
    ((*_, text_lens, _),) = stage.model.transformer.calls
    assert (text_lens == 1).all() if dropout else (text_lens > 1).all()


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


@pytest.mark.parametrize("times", [1, 4])
def test_consistency_target_is_the_student_one_teacher_step_on(monkeypatch, times):
    """f(x', t_{k-1}) with x' = x_k - (t_k - t_{k-1}) v_teacher; at k = 1 x' itself, without the
    student's clamp: f(x, 0) = x (SPEC 7)."""
    compared, compare = [], consistency_distillation.pseudo_huber

    def record(prediction, target):
        compared.append((prediction, target))
        return compare(prediction, target)

    monkeypatch.setattr(consistency_distillation, "pseudo_huber", record)
    config = ConsistencyConfig(Schedule(0.0, 1), batch=16, frames=3, times=times, shift=6.0)
    stage = ConsistencyDistillation(config, recorded(0.5, output_clamp=4.0), seed=0)
    with torch.no_grad():
        stage.teacher.transformer.gain.fill_(0.25)
    train(stage, 1, counting_clips())

    (teacher,) = stage.teacher.transformer.calls
    student_earlier, student = stage.model.transformer.calls
    x_t, recycled, condition, *_, t = student
    recovered_noise(x_t, recycled, t)
    assert_drives(condition, value(recycled) + 1)
    k = (stage.times[:, None] == t).float().argmax(0)
    assert set(k.tolist()) == set(range(1, times + 1))
    earlier = stage.times[k - 1]
    torch.testing.assert_close(earlier, student_earlier[-1])
    for other in (teacher, student_earlier):
        for mine, theirs in zip(student[1:-1], other[1:-1], strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(teacher[0], x_t)
    torch.testing.assert_close(teacher[-1], t)

    step, rest, t = ((x[:, None, None, None, None]) for x in (t - earlier, earlier, t))
    one_on = x_t - step * 0.25 * x_t
    torch.testing.assert_close(student_earlier[0], one_on)
    clamped = 4 * torch.tanh((one_on - rest * 0.5 * one_on) / 4)
    ((prediction, target),) = compared
    torch.testing.assert_close(target, torch.where(rest == 0, one_on, clamped))
    torch.testing.assert_close(prediction, 4 * torch.tanh((x_t - t * 0.5 * x_t) / 4))
    assert prediction.requires_grad and not target.requires_grad


def test_rollout_regression_runs_segments():
    config = RolloutRegressionConfig(Schedule(1e-3, 30), batch=2, segment_frames=3, segments=2)
    stage = RolloutRegression(config, model(), torch.ones(4), seed=0)
    losses = [m["loss"] for m in train(stage, 30, clips(count=1, length=7))]
    assert sum(losses[-8:]) < sum(losses[:8])


def test_rollout_regression_compares_every_segment_with_its_own_frames(made_segments):
    """A generator that gains 0.25 too much on channel 0 in every step is 0.25 n off at frame n;
    channels count by their deviation in pixels."""
    config = RolloutRegressionConfig(
        Schedule(0.0, 1), batch=4, segment_frames=3, segments=2, corruption=Corruption(0.0, 0.0)
    )
    deviation = torch.tensor([3.0, 1.0, 2.0, 2.0])
    stage = RolloutRegression(config, counting_model(1.25, 1.0, 1.0, 1.0), deviation, seed=0)
    (metrics,) = train(stage, 1, counting_clips())
    squares = sum((0.25 * n) ** 2 for n in range(1, 7))
    assert metrics["loss"] == pytest.approx(1.5 / 4 * squares / 6, rel=1e-5)
    for index, segment in enumerate(made_segments):
        assert segment.start_frame == 3 * index
        assert_drives(segment.condition, value(segment.recycled[:, 1:]) + 1)


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


def test_corruption_is_white_noise_and_an_offset():
    frame = torch.ones(64, 4, 1, 16, 16)
    corrupt = Corruption(0.4, 0.4, clip_chance=1.0)
    corrupted = corrupt(frame, first=False, random=torch.Generator().manual_seed(0)) - frame
    offset = corrupted.mean(dim=(3, 4), keepdim=True)
    white = corrupted - offset
    # Strengths are uniform up to 0.4, one of each kind per clip.
    strengths = white.std(dim=(1, 2, 3, 4))
    assert 0.15 < strengths.mean() < 0.25 and strengths.min() < 0.05 and strengths.max() < 0.42
    torch.testing.assert_close(white.std(dim=(3, 4)).mean(dim=(1, 2)), strengths, rtol=0.1, atol=0)
    assert offset.std().item() == pytest.approx(0.4 / 3**0.5, rel=0.25)
    spread = offset.flatten(1).std(1)  # of the channels of a clip
    assert spread.mean() > 0.1 and spread.min() < 0.1


def judging(stage: Adversarial) -> nn.Module:
    return nn.ModuleDict({"judge": stage.discriminator, "text": stage.judge_inputs.text_encoder})


def decoder_stage() -> DecoderTraining:
    vae = CausalVAE(
        VAEConfig(
            encoder_channels=(4, 8, 8),
            decoder_channels=(4, 8, 8),
            encoder_blocks=(0, 1, 0),
            decoder_blocks=(0, 1, 0),
            strides=((2, 2), (2, 1)),
            latent_channels=4,
            patch_size=4,
            time_kernels=(3, 1),
            upsample="shuffle",
        )
    )
    for parameter in vae.decoder.parameters():
        if not parameter.any():  # residual blocks start out as the identity
            nn.init.normal_(parameter, std=0.1)
    return DecoderTraining(DecoderConfig(ONE, batch=2, video_frames=13), vae, seed=0)


def noise_videos() -> VideoClips:
    videos = torch.randint(256, (2, 13, 16, 16, 3), dtype=torch.uint8)
    return VideoClips([SimpleNamespace(video=video) for video in videos])


ONE = Schedule(1e-3, 1)
# The text of the last block gives keys and values only.
LAST_TEXT_QUERY = "transformer.blocks.2.text.q_norm"


@pytest.mark.parametrize(
    ("build", "trained", "optimizer", "silent"),
    [
        pytest.param(decoder_stage, lambda stage: stage.decoder, "optimizer", set(), id="decoder"),
        pytest.param(
            lambda: DiffusionAdaptation(DiffusionConfig(ONE, batch=2, frames=4), model(), seed=0),
            lambda stage: stage.model,
            "optimizer",
            {LAST_TEXT_QUERY},
            id="diffusion",
        ),
        pytest.param(
            lambda: ConsistencyDistillation(
                ConsistencyConfig(ONE, batch=2, frames=4), model(), seed=0
            ),
            lambda stage: stage.model,
            "optimizer",
            {LAST_TEXT_QUERY},
            id="consistency",
        ),
        pytest.param(
            lambda: RolloutRegression(
                RolloutRegressionConfig(ONE, batch=2, segment_frames=3, segments=2),
                model(),
                torch.ones(4),
                seed=0,
            ),
            lambda stage: stage.model,
            "optimizer",
            {LAST_TEXT_QUERY},
            id="regression",
        ),
        pytest.param(
            lambda: adversarial_stage(segments=2, overlap_frames=1),
            lambda stage: stage.model,
            "generator_optimizer",
            {LAST_TEXT_QUERY},
            id="generator",
        ),
        pytest.param(
            lambda: adversarial_stage(segments=2, overlap_frames=1),
            judging,
            "discriminator_optimizer",
            # What all logits share: only their differences are trained.
            {"judge.backbone.blocks.2.text.q_norm", "judge.norm.bias", "judge.logit.bias"},
            id="discriminator",
        ),
    ],
)
def test_every_parameter_gets_a_gradient(build, trained, optimizer, silent):
    """Networks run without gradient first and with it afterwards, under one autocast: a weight cast
    in the first run must not lose its gradient in the second."""
    stage = build()
    learning, found = [], {}
    for name, parameter in trained(stage).named_parameters():
        if parameter.requires_grad:
            learning.append((name, parameter))

    def look(*_):
        for name, parameter in learning:
            found[name] = 0.0 if parameter.grad is None else parameter.grad.norm().item()

    getattr(stage, optimizer).register_step_pre_hook(look)
    train(stage, 1, noise_videos() if isinstance(stage, DecoderTraining) else clips())
    assert silent < set(found)
    assert {name for name, norm in found.items() if norm == 0} <= silent
    # Those that have a reason have nothing but rounding, or the reason is wrong.
    whole = sum(norm**2 for norm in found.values()) ** 0.5
    assert {name: found[name] for name in silent if found[name] > 1e-5 * whole} == {}
