"""Every stage on small clips: the inputs of each network, and the weights that move."""

import copy

import pytest
import torch
from torch import nn

from aapt.data.clips import VideoClips
from aapt.training.corruption import Corruption
from aapt.training.curriculum import constant
from aapt.training.optimization import Schedule
from aapt.training.stages import consistency_distillation
from aapt.training.stages.adversarial import Adversarial
from aapt.training.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from aapt.training.stages.decoder import DecoderConfig, DecoderTraining
from aapt.training.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from aapt.training.stages.rollout_regression import RolloutRegression, RolloutRegressionConfig
from aapt.vae import CausalVAE, VAEConfig

from ..helpers import clips, draws
from ..runs.counting import (
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


def test_diffusion_learns_one_clip():
    curriculum = constant("clips", frames=4, batch=4, steps=60)
    config = DiffusionConfig(curriculum, Schedule(3e-3, 5), shift=6.0, average=0.9)
    stage = DiffusionAdaptation(config, model())
    losses = [m["loss"] for m in train(stage, 60, clips(count=1, length=5))]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    exported = stage.export()
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, stage.trained["model"].average.shadow[name])


def averaging_regression() -> RolloutRegression:
    config = RolloutRegressionConfig("clips", 4, 2, 2, 2, Schedule(1e-3), average=0.75)
    return RolloutRegression(config, model(), torch.ones(4))


@pytest.mark.parametrize(
    ("build", "learner"),
    [
        (lambda: adversarial_stage(average=0.75, discriminator_warmup=1), "generator"),
        (averaging_regression, "model"),
    ],
    ids=["adversarial", "regression"],
)
def test_the_moving_average_is_exported(build, learner):
    """The export is a_n = d a_{n-1} + (1 - d) w_n, from the start, and not the last weights w_n.

    Only updates of the generator count, without the discriminator's warm-up.
    """
    stage = build()
    average = {name: p.detach().clone() for name, p in stage.model.named_parameters()}

    def follow(*_):
        for name, parameter in stage.model.named_parameters():
            average[name] = 0.75 * average[name] + 0.25 * parameter.detach()

    stage.trained[learner].optimizer.register_step_post_hook(follow)
    train(stage, 4)
    last = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    exported = dict(stage.export().named_parameters())
    assert exported.keys() == average.keys()
    for name, parameter in exported.items():
        torch.testing.assert_close(parameter.detach(), average[name])
    moved = {n for n in last if not torch.allclose(exported[n], last[n], rtol=1e-3, atol=1e-5)}
    assert moved >= {"transformer.video_in.weight", "transformer.video_out.weight"}


def test_diffusion_shows_clean_pasts_and_noisy_targets():
    """Teacher forcing: one shifted t per clip, aligned conditions, MSE on v (docs/method.md#6)."""
    curriculum = constant("clips", frames=3, batch=256, steps=1)
    config = DiffusionConfig(curriculum, Schedule(0.0), shift=6.0, caption_dropout=0.5)
    stage = DiffusionAdaptation(config, recorded(0.5))
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
    curriculum = constant("clips", frames=2, batch=64, steps=1)
    config = DiffusionConfig(curriculum, Schedule(0.0), caption_dropout=dropout)
    stage = DiffusionAdaptation(config, recorded(0.5))
    train(stage, 1, clips())  # prompts of two or three bytes
    ((*_, text_lens, _),) = stage.model.transformer.calls
    assert (text_lens == 1).all() if dropout else (text_lens > 1).all()


def test_stages_are_reproducible():
    config = DiffusionConfig(constant("clips", frames=3, batch=2, steps=3), Schedule(1e-3))
    runs = [train(DiffusionAdaptation(config, model()), 3) for _ in range(2)]
    assert runs[0] == runs[1]


def test_consistency_leaves_the_teacher_alone():
    config = ConsistencyConfig(constant("clips", frames=3, batch=2, steps=3), Schedule(1e-3))
    stage = ConsistencyDistillation(config, model(), model())
    before = copy.deepcopy(stage.teacher)
    train(stage, 3)
    for a, b in zip(before.parameters(), stage.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    moved = (stage.model.transformer.video_in.weight - before.transformer.video_in.weight).abs()
    assert moved.max() > 0


@pytest.mark.parametrize("times", [1, 4])
def test_consistency_target_is_the_student_one_teacher_step_on(monkeypatch, times):
    """The target is f(x', t_{k-1}) with x' = x_k - (t_k - t_{k-1}) v_teacher.

    At k = 1 it is x', without the student's clamp, because f(x, 0) = x (docs/method.md#7).
    """
    compared, compare = [], consistency_distillation.pseudo_huber

    def record(prediction, target):
        compared.append((prediction, target))
        return compare(prediction, target)

    monkeypatch.setattr(consistency_distillation, "pseudo_huber", record)
    curriculum = constant("clips", frames=3, batch=16, steps=1)
    config = ConsistencyConfig(curriculum, Schedule(0.0), times=times, shift=6.0)
    teacher = recorded(0.25, output_clamp=4.0)
    stage = ConsistencyDistillation(config, recorded(0.5, output_clamp=4.0), teacher)
    train(stage, 1, counting_clips())

    (taught,) = stage.teacher.transformer.calls
    student_earlier, student = stage.model.transformer.calls
    x_t, recycled, condition, *_, t = student
    recovered_noise(x_t, recycled, t)
    assert_drives(condition, value(recycled) + 1)
    k = (stage.times[:, None] == t).float().argmax(0)
    assert set(k.tolist()) == set(range(1, times + 1))
    earlier = stage.times[k - 1]
    torch.testing.assert_close(earlier, student_earlier[-1])
    for other in (taught, student_earlier):
        for mine, theirs in zip(student[1:-1], other[1:-1], strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(taught[0], x_t)
    torch.testing.assert_close(taught[-1], t)

    step, rest, t = ((x[:, None, None, None, None]) for x in (t - earlier, earlier, t))
    one_on = x_t - step * 0.25 * x_t
    torch.testing.assert_close(student_earlier[0], one_on)
    clamped = 4 * torch.tanh((one_on - rest * 0.5 * one_on) / 4)
    ((prediction, target),) = compared
    torch.testing.assert_close(target, torch.where(rest == 0, one_on, clamped))
    torch.testing.assert_close(prediction, 4 * torch.tanh((x_t - t * 0.5 * x_t) / 4))
    assert prediction.requires_grad and not target.requires_grad


@pytest.mark.parametrize("weighted", [False, True])
def test_squared_consistency(weighted):
    """Switches of docs/method.md#12: MSE, and clips weighted by 1 / (t_k - t_{k-1})."""
    curriculum = constant("clips", frames=3, batch=16, steps=1)
    config = ConsistencyConfig(
        curriculum, Schedule(0.0), times=4, distance="squared", step_weight=weighted
    )
    stage = ConsistencyDistillation(config, recorded(0.5), recorded(0.25))
    (metrics,) = train(stage, 1, counting_clips())
    (x_earlier, *_, earlier), (x_t, *_, t) = stage.model.transformer.calls

    def gap(at):
        return at[:, None, None, None, None]

    target = torch.where(gap(earlier) == 0, x_earlier, x_earlier * (1 - 0.5 * gap(earlier)))
    squares = (x_t * (1 - 0.5 * gap(t)) - target).square().mean(dim=(1, 2, 3, 4))
    expected = (squares / (t - earlier) if weighted else squares).mean().item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(
        ValueError, match="distance: expected 'pseudo_huber' or 'squared', got 'l1'"
    ):
        ConsistencyConfig(curriculum, Schedule(0.0), distance="l1")


def regression(schedule: Schedule, steps: int = 1, batch: int = 2, **changes):
    given = {"segment_frames": 3, "segments": 2, "schedule": schedule, **changes}
    return RolloutRegressionConfig("clips", steps, batch, **given)


def test_rollout_regression_runs_segments():
    config = regression(Schedule(1e-3), steps=30)
    stage = RolloutRegression(config, model(), torch.ones(4))
    losses = [m["loss"] for m in train(stage, 30, clips(count=1, length=7))]
    assert sum(losses[-8:]) < sum(losses[:8])


def test_rollout_regression_compares_every_segment_with_its_own_frames(made_segments):
    """A generator that gains 0.25 too much on channel 0 per step has an error of 0.25 n at frame n.

    Channels are weighted by their deviation in pixels.
    """
    config = regression(Schedule(0.0), batch=4, corruption=Corruption(0.0, 0.0))
    deviation = torch.tensor([3.0, 1.0, 2.0, 2.0])
    stage = RolloutRegression(config, counting_model(1.25, 1.0, 1.0, 1.0), deviation)
    (metrics,) = train(stage, 1, counting_clips())
    squares = sum((0.25 * n) ** 2 for n in range(1, 7))
    assert metrics["loss"] == pytest.approx(1.5 / 4 * squares / 6, rel=1e-5)
    for index, segment in enumerate(made_segments):
        assert segment.start_frame == 3 * index
        assert_drives(segment.condition, value(segment.recycled[:, 1:]) + 1)


@pytest.mark.parametrize("first_frame", ["always", "never"])
def test_rollout_regression_starts_where_its_config_says(made_segments, first_frame):
    config = regression(
        Schedule(0.0), batch=16, first_frame=first_frame, corruption=Corruption(0.0, 0.0)
    )
    stage = RolloutRegression(config, counting_model(*[1.0] * 4), torch.ones(4))
    train(stage, 1, counting_clips())
    starts = value(made_segments[0].recycled)[:, 0] % 100
    assert (starts == 0).all() if first_frame == "always" else (starts > 0).all()


def test_corruption_spares_most_first_frames():
    frames = torch.zeros(1000, 4, 1, 2, 2)
    for first, share in ((True, 0.3 * 0.6), (False, 0.6)):  # first_chance, clip_chance
        touched = (Corruption()(frames, first, draws(1000)) != 0).flatten(1).any(1)
        assert touched.float().mean().item() == pytest.approx(share, abs=0.05)


def test_corruption_is_white_noise_and_an_offset():
    frames = torch.ones(64, 4, 3, 16, 16)
    corrupt = Corruption(0.4, 0.4, clip_chance=1.0)
    corrupted = corrupt(frames, False, draws(64)) - frames
    offset = corrupted.mean(dim=(3, 4), keepdim=True)
    white = corrupted - offset
    # Strengths are uniform up to 0.4, one of each kind per clip.
    strengths = white.std(dim=(1, 2, 3, 4))
    assert 0.15 < strengths.mean() < 0.25 and strengths.min() < 0.05 and strengths.max() < 0.42
    torch.testing.assert_close(white.std(dim=(3, 4)).mean(dim=(1, 2)), strengths, rtol=0.1, atol=0)
    assert offset.std().item() == pytest.approx(0.4 / 3**0.5, rel=0.25)
    spread = offset.flatten(1).std(1)  # of the channels and frames of a clip
    assert spread.mean() > 0.1 and spread.min() < 0.1


def decoder_of(stage: DecoderTraining) -> nn.Module:
    return stage.vae.decoder


def discriminator_of(stage: Adversarial) -> nn.Module:
    return stage.discriminator


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
    return DecoderTraining(DecoderConfig(ONE, steps=1, batch=2, video_frames=13), vae)


def noise_videos() -> VideoClips:
    videos = torch.randint(256, (2, 13, 16, 16, 3), dtype=torch.uint8)
    return VideoClips(videos, 2)


ONE = Schedule(1e-3)
BRIEF = constant("clips", frames=4, batch=2, steps=1)
# The text of the last block gives keys and values only.
LAST_TEXT_QUERY = "transformer.blocks.2.text.q_norm"


@pytest.mark.parametrize(
    ("build", "trained", "name", "silent"),
    [
        pytest.param(
            decoder_stage, lambda stage: stage.vae.decoder, "decoder", set(), id="decoder"
        ),
        pytest.param(
            lambda: DiffusionAdaptation(DiffusionConfig(BRIEF, ONE), model()),
            lambda stage: stage.model,
            "model",
            {LAST_TEXT_QUERY},
            id="diffusion",
        ),
        pytest.param(
            lambda: ConsistencyDistillation(ConsistencyConfig(BRIEF, ONE), model(), model()),
            lambda stage: stage.model,
            "model",
            {LAST_TEXT_QUERY},
            id="consistency",
        ),
        pytest.param(
            lambda: RolloutRegression(regression(ONE), model(), torch.ones(4)),
            lambda stage: stage.model,
            "model",
            {LAST_TEXT_QUERY},
            id="regression",
        ),
        pytest.param(
            lambda: adversarial_stage(segments=2, overlap_frames=1),
            lambda stage: stage.model,
            "generator",
            {LAST_TEXT_QUERY},
            id="generator",
        ),
        pytest.param(
            lambda: adversarial_stage(segments=2, overlap_frames=1),
            discriminator_of,
            "discriminator",
            # Parameters that shift all logits alike: only differences of logits are trained.
            {"world.transformer.blocks.2.text.q_norm", "norm.bias", "logit.bias"},
            id="discriminator",
        ),
    ],
)
def test_every_parameter_gets_a_gradient(build, trained, name, silent):
    """A weight that autocast casts without gradient first must not lose its gradient later.

    Networks run under one autocast, first without gradient and then with it.
    """
    stage = build()
    learning, found = [], {}
    for label, parameter in trained(stage).named_parameters():
        if parameter.requires_grad:
            learning.append((label, parameter))

    def look(*_):
        for label, parameter in learning:
            found[label] = 0.0 if parameter.grad is None else parameter.grad.norm().item()

    stage.trained[name].optimizer.register_step_pre_hook(look)
    train(stage, 1, noise_videos() if isinstance(stage, DecoderTraining) else clips())
    assert silent < set(found)
    assert {label for label, norm in found.items() if norm == 0} <= silent
    # Parameters that get no gradient for a reason have only rounding, or the reason is wrong.
    whole = sum(norm**2 for norm in found.values()) ** 0.5
    assert {label: found[label] for label in silent if found[label] > 1e-5 * whole} == {}
