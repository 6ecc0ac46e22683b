"""Every stage takes real steps on small clips: what each network is shown, what each loss does to
the logits and outputs it is made of, and what moves.

Latents that count frames make the wiring readable: latent i of clip c is 100 c + i everywhere.
"""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt.conditioning import control_rays
from aapt.data.clips import LatentClips
from aapt.data.procedural import VideoClips
from aapt.discriminator import Discriminator
from aapt.model import VideoTransformer
from aapt.optimization import Schedule, mixed_precision
from aapt.recipes import aapt_8b
from aapt.stages import adversarial, consistency_distillation, rollout_regression
from aapt.stages.adversarial import Adversarial, AdversarialConfig, Judged
from aapt.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from aapt.stages.decoder import DecoderConfig, DecoderTraining
from aapt.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from aapt.stages.rollout_regression import (
    Corruption,
    RolloutRegression,
    RolloutRegressionConfig,
)
from aapt.vae import CausalVAE, VAEConfig
from aapt.world_model import WorldModel

from .helpers import CAMERA, PROMPTS, SIZE, clips, controls, latents, tiny_model


def model() -> WorldModel:
    return tiny_model(sink_distance="clamped", residual_head=True, output_clamp=4.0).float()


def counting_clips(length: int = 12) -> LatentClips:
    """Clip c of four has latents 100 c + i, controls (n + 1) / 100 and a prompt of c bytes."""
    frame = 100.0 * torch.arange(4)[:, None] + torch.arange(length)
    motion = torch.arange(1, length) / 100
    return LatentClips(
        frame[:, None, :, None, None].expand(-1, 4, -1, *SIZE),
        motion[:, None].expand(4, -1, 2),
        [("x" * c,) for c in range(4)],
    )


def value(x: Tensor) -> Tensor:
    """The numbers that frames (B, C, T, H, W) are filled with, (B, T)."""
    torch.testing.assert_close(x, x[:, :1, :, :1, :1].expand_as(x), rtol=0, atol=1e-4)
    return x[:, 0, :, 0, 0].detach()


def assert_drives(condition: Tensor, rows: Tensor) -> None:
    """`condition` is made of the controls that drive latents `rows` (B, T) of counted clips. One
    row more or less moves it by 0.014; stages make it in half precision."""
    motion = (rows % 100 / 100)[..., None].expand(-1, -1, 2)
    expected = control_rays(motion, CAMERA, *SIZE)
    torch.testing.assert_close(condition, expected, rtol=0, atol=2e-3)


def prompted(frames: Tensor) -> list[str]:
    """The prompts of counted clips, from the values of their frames."""
    return ["x" * int(clip) for clip in frames[:, 0] // 100]


def counting_model(*increments: float) -> WorldModel:
    """One step adds `increments` to the recycled frame, by channel, whatever else it is given."""
    net = tiny_model(depth=1, residual_head=True).float()
    out = net.transformer.video_out
    nn.init.zeros_(out.weight)
    with torch.no_grad():
        out.bias.copy_(torch.tensor(increments).repeat(4))
    return net


class Recorder(nn.Module):
    """A transformer that remembers what it was given and answers gain x_t."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.calls = []

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        self.calls.append((x.detach(), *arguments))
        return self.gain * x


def recorded(gain: float, **changes) -> WorldModel:
    net = tiny_model(depth=1, **changes).float()
    net.transformer = Recorder(gain)
    return net


def recovered_noise(x_t: Tensor, recycled: Tensor, t: Tensor) -> Tensor:
    """The noise in x_t = (1 - t) x_0 + t e, where x_0 of counted clips is recycled + 1. Any other
    x_0 or t would leave a multiple of x_0, which is in the hundreds, in it."""
    t = t[:, None, None, None, None]
    noise = (x_t - (1 - t) * (recycled + 1)) / t
    assert noise.mean(dim=(1, 2, 3, 4)).abs().max() < 0.4
    assert (noise.std(dim=(1, 3, 4)) - 1).abs().max() < 0.4
    return noise


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


@pytest.fixture
def made_segments(monkeypatch):
    """The segments that a student-forced stage runs in parallel, as it makes them."""
    segments, pass_again = [], adversarial.parallel_pass

    def record(net, segment, *text):
        segments.append(segment)
        return pass_again(net, segment, *text)

    for stage in (adversarial, rollout_regression):
        monkeypatch.setattr(stage, "parallel_pass", record)
    return segments


def test_rollout_regression_compares_every_segment_with_its_own_frames(made_segments):
    """A generator that gains 0.25 too much on channel 0 in every step is 0.25 n off at frame n;
    channels count by their deviation in pixels."""
    config = RolloutRegressionConfig(
        Schedule(0.0, 1), batch=4, segment_frames=3, segments=2, corruption=Corruption(0.0)
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
    corrupt = Corruption(0.4, clip_chance=1.0)
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


def judged_model() -> WorldModel:
    """Stage-1 weights that nothing can take for the generator's."""
    diffusion = model()
    with torch.no_grad():
        diffusion.text_encoder.embedding.weight.add_(1)
    return diffusion


def adversarial_stage(generator: WorldModel | None = None, **changes) -> Adversarial:
    options = {
        "generator_schedule": Schedule(1e-3, 4),
        "discriminator_schedule": Schedule(1e-3, 4),
        "batch": 2,
        "segment_frames": 3,
        **changes,
    }
    return Adversarial(
        AdversarialConfig(**options),
        generator or model(),
        judged_model(),
        torch.tensor([3.0, 1.0, 2.0, 2.0]),
        seed=0,
    )


@dataclasses.dataclass
class Judgement:
    """One call of the discriminator: its arguments, its logits (B, T) and their gradient."""

    arguments: tuple[Tensor, ...]
    logits: Tensor
    gradient: Tensor | None = None


@contextmanager
def recording(stage: Adversarial) -> Iterator[list[Judgement]]:
    judgements, judge = [], stage.discriminator.forward

    def record(*arguments):
        logits = judge(*arguments)
        judgement = Judgement(arguments, logits.detach())
        if logits.requires_grad:
            logits.register_hook(lambda gradient: setattr(judgement, "gradient", gradient))
        judgements.append(judgement)
        return logits

    stage.discriminator.forward = record
    yield judgements
    stage.discriminator.forward = judge


def test_adversarial_wiring(made_segments):
    """What is judged, under which conditions, and the gradient every logit gets (SPEC 8).

    The generator adds 1.25 per step, so its frame n after latent s of a clip is s + 1.25 n.
    """
    batch, sigma, penalty = 8, 0.1, 50.0
    stage = adversarial_stage(
        counting_model(*[1.25] * 4),
        batch=batch,
        segments=2,
        overlap_frames=1,
        penalty=penalty,
        perturbation=sigma,
    )
    embed = copy.deepcopy(stage.judge_inputs.text_encoder)
    with recording(stage) as judgements:
        (metrics,) = train(stage, 1, counting_clips())

    assert len(judgements) == 4  # discriminator, generator, twice
    names = ("discriminator", "r1", "r2", "generator", "accuracy", "error")
    expected = dict.fromkeys(names, 0.0)
    starts, times = None, []
    for index in range(2):
        known, frames = index, 3 + index
        for_d, for_g = judgements[2 * index : 2 * index + 2]
        x, previous, condition, text, text_lens, t = (a.chunk(4) for a in for_d.arguments)
        real, fake, real_shaken, fake_shaken = range(4)
        steps = torch.arange(frames)

        # Fake: the overlap and the segment, each after the frame before it.
        if index == 0:
            starts = value(previous[fake])[:, :1]
        first = 0 if index == 0 else 2  # steps behind the first judged frame
        torch.testing.assert_close(value(x[fake]), starts + 1.25 * (first + 1 + steps))
        torch.testing.assert_close(value(previous[fake]), starts + 1.25 * (first + steps))
        fake_rows = starts + first + 1 + steps
        assert_drives(condition[fake], fake_rows)
        made = made_segments[index]
        assert_drives(made.condition, starts + 3 * index + 1 + torch.arange(3))
        assert made.start_frame == 3 * index

        # Real: the same clip at first, then windows of their own that leave out latent 0.
        real_rows = value(x[real])
        torch.testing.assert_close(value(previous[real]), real_rows - 1)
        torch.testing.assert_close(real_rows, real_rows[:, :1] + steps)
        assert_drives(condition[real], real_rows)
        if index == 0:
            torch.testing.assert_close(real_rows, fake_rows)
            assert (starts % 100 == 0).any() and (starts % 100 > 0).any()
        else:
            assert (real_rows % 100 >= 2).all() and (real_rows != fake_rows).any()

        for rows, which in ((real_rows, (real, real_shaken)), (fake_rows, (fake, fake_shaken))):
            expected_text, expected_lens = embed(prompted(rows))
            for i in which:
                torch.testing.assert_close(text[i], expected_text)
                assert torch.equal(text_lens[i], expected_lens)
                assert_drives(condition[i], rows)

        # The perturbed copies: sigma on what carries a loss, also where it comes before the next.
        shaken = []
        for plain, perturbed in ((real, real_shaken), (fake, fake_shaken)):
            noise = x[perturbed] - x[plain]
            assert not noise[:, :, :known].any()
            assert noise[:, :, known:].std().item() == pytest.approx(sigma, rel=0.1)
            before = previous[perturbed] - previous[plain]
            assert not before[:, :, :1].any()
            torch.testing.assert_close(before[:, :, 1:], noise[:, :, :-1])
            shaken.append(noise)
        assert not torch.equal(*shaken)

        # One t per pair, shared with the copies and with the generator's turn.
        assert t[0].shape == (batch,) and all(torch.equal(t[0], other) for other in t)
        times.append(t[0])
        fakes = (a[fake] for a in (x, previous, condition, text, text_lens, t))
        for mine, theirs in zip(for_g.arguments, fakes, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert not for_d.arguments[0].requires_grad and not for_d.arguments[1].requires_grad
        assert for_g.arguments[0].requires_grad and for_g.arguments[1].requires_grad

        # SPEC 8's losses on these logits, means over clips, judged frames and segments.
        logits = for_d.logits.clone().requires_grad_()
        on_real, on_fake, on_real_shaken, on_fake_shaken = logits[:, known:].chunk(4)
        relative = F.softplus(on_fake - on_real).mean()
        r1 = penalty * (on_real - on_real_shaken).square().mean()
        r2 = penalty * (on_fake - on_fake_shaken).square().mean()
        ((relative + r1 + r2) / 2).backward()
        torch.testing.assert_close(for_d.gradient, logits.grad)
        assert not for_d.gradient[:, :known].any()
        logits = for_g.logits.clone().requires_grad_()
        generated = F.softplus(on_real.detach() - logits[:, known:]).mean()
        (generated / 2).backward()
        torch.testing.assert_close(for_g.gradient, logits.grad)
        # The clip goes on from s in steps of 1: 0.25 n off at frame n, on all channels alike.
        error = (0.25 * (3 * index + 1 + torch.arange(3))).square().mean()
        seen = (relative, r1, r2, generated, (on_real > on_fake).float().mean(), error)
        for name, loss in zip(expected, seen, strict=True):
            expected[name] += loss.item() / 2
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(*times)
    uniform = torch.cat(times)  # not shifted
    assert 0.25 < uniform.mean() < 0.75 and 0 <= uniform.min() and uniform.max() < 1


def test_the_discriminator_knows_the_frame_that_was_corrupted(made_segments):
    """Corruption is for the generator alone: what it continues from is judged as it was."""
    stage = adversarial_stage(
        counting_model(*[1.25] * 4),
        segments=2,
        overlap_frames=1,
        corruption=Corruption(clip_chance=1.0, first_chance=0.0),
    )
    with recording(stage) as judgements:
        train(stage, 1, counting_clips())
    first, later = made_segments
    starts = value(first.recycled)[:, :1]
    assert torch.equal(starts, starts.round())
    assert (later.recycled[:, :, 0] - (starts + 3.75)[..., None, None]).std() > 0.01
    _, fake, _, _ = judgements[2].arguments[0].chunk(4)
    _, previous, _, _ = judgements[2].arguments[1].chunk(4)
    torch.testing.assert_close(value(previous[:, :, :2]), starts + torch.tensor([2.5, 3.75]))
    torch.testing.assert_close(fake[:, :, 1], later.recycled[:, :, 0] + 1.25)


@pytest.mark.parametrize(
    ("moving", "penalty"), [("generator", 0.0), ("discriminator", 0.0), ("discriminator", 1e4)]
)
def test_one_adversarial_update_goes_the_right_way(moving, penalty):
    """With the other network held, one update of the generator raises D(fake) - D(real), one of
    the discriminator lowers it, or what perturbation does to the logits under a heavy penalty."""
    still = "generator" if moving == "discriminator" else "discriminator"
    stage = adversarial_stage(batch=4, penalty=penalty, **{f"{still}_schedule": Schedule(0.0, 1)})
    before = copy.deepcopy((stage.model, stage.discriminator, stage.judge_inputs))
    draws, gaps, shaken = stage.random.get_state(), [], []
    for _ in range(2):  # the same clips, noise, t and perturbation again
        stage.random.set_state(draws)
        with recording(stage) as judgements:
            train(stage, 1)
        on_real, on_fake, *copies = judgements[0].logits.chunk(4)
        gaps.append((judgements[1].logits - on_real).mean().item())
        shaken.append(
            sum((a - b).square().mean() for a, b in zip((on_real, on_fake), copies, strict=True))
        )
        if len(gaps) == 1:
            held = stage.model if moving == "discriminator" else stage.discriminator
            was = before[0] if moving == "discriminator" else before[1]
            for a, b in zip(held.parameters(), was.parameters(), strict=True):
                assert torch.equal(a, b)
    if penalty:
        assert shaken[1] < shaken[0]
    elif moving == "generator":
        assert gaps[1] > gaps[0]
    else:
        assert gaps[1] < gaps[0]


def test_regression_pulls_the_generator_to_the_clip():
    """Beside the adversarial loss, and by as much as the configuration says: on a generator that
    overshoots in channel 0 alone, which counts 1.5 fold, it pushes that channel back."""
    gradients = []
    for weight in (0.0, 2.0):
        stage = adversarial_stage(
            counting_model(1.25, 1.0, 1.0, 1.0), batch=4, segments=2, regression=weight
        )
        bias = stage.model.transformer.video_out.bias
        stage.generator_optimizer.register_step_pre_hook(
            lambda *_, bias=bias: gradients.append(bias.grad.view(4, 4).sum(0))
        )
        train(stage, 1, counting_clips())
    # Steps are independent: recycled frames are detached. d/d increment of 1.5 (0.25 n)^2 / 4.
    expected = 2.0 * 1.5 / 4 * 2 * sum(0.25 * n for n in range(1, 7)) / 6
    difference = gradients[1] - gradients[0]
    torch.testing.assert_close(difference, torch.tensor([expected, 0, 0, 0]), rtol=0.02, atol=0.02)


def test_adversarial_gradients_do_not_leak():
    """The discriminator's turn leaves nothing on the generator, and the other way round."""
    stage = adversarial_stage(segments=2, overlap_frames=1)
    own = {"train_generator": list(stage.model.parameters()), "train_discriminator": stage.judging}
    turns = []

    def watch(name: str, other: str) -> None:
        take_turn = getattr(stage, name)

        def turn(*arguments):
            before = {key: gradients_of(parameters) for key, parameters in own.items()}
            result = take_turn(*arguments)
            after = {key: gradients_of(parameters) for key, parameters in own.items()}
            assert before[other].keys() == after[other].keys()
            for key, gradient in before[other].items():
                assert torch.equal(gradient, after[other][key])
            assert after[name] and any(
                key not in before[name] or not torch.equal(gradient, before[name][key])
                for key, gradient in after[name].items()
            )
            turns.append(name)
            return result

        setattr(stage, name, turn)

    watch("train_discriminator", "train_generator")
    watch("train_generator", "train_discriminator")
    frozen = [p for p in stage.discriminator.parameters() if not p.requires_grad]
    train(stage, 1)
    assert turns == ["train_discriminator", "train_generator"] * 2
    everything = [*stage.model.parameters(), *stage.judging, *frozen]
    assert all(p.grad is None for p in everything)
    assert not {id(p) for p in stage.model.parameters()} & {id(p) for p in stage.judging}
    assert {id(p) for p in frozen} == {
        id(p)
        for layer in (
            stage.discriminator.backbone.out_modulation,
            stage.discriminator.backbone.video_out,
        )
        for p in layer.parameters()
    }


def gradients_of(parameters: list[Tensor]) -> dict[int, Tensor]:
    return {i: p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None}


def test_perturbation_spares_what_is_known():
    latent = torch.arange(6.0)[:, None, None].expand(8, 4, 6, 5, 5)
    judged = Judged(latent, None, known=2)
    shaken = judged.perturbed(0.3, torch.Generator().manual_seed(0))
    assert torch.equal(judged.latents, latent) and shaken.known == 2
    noise = shaken.latents - latent
    assert not noise[:, :, :3].any()  # the frame before, and the two known ones
    assert noise[:, :, 3:].std().item() == pytest.approx(0.3, rel=0.05)
    assert noise[:, :, 3:].mean().item() == pytest.approx(0, abs=0.02)
    frames = noise[:, :, 3:].transpose(0, 2).flatten(1)
    assert (torch.corrcoef(frames) - torch.eye(3)).abs().max() < 0.15


def test_adversarial_moves_both_networks():
    stage = adversarial_stage(segments=2, overlap_frames=1, corruption=Corruption())
    before = copy.deepcopy((stage.model, stage.discriminator))
    metrics = train(stage, 2)
    losses = {"discriminator", "r1", "r2", "accuracy", "generator", "error"}
    assert set(metrics[0]) == losses | {"discriminator_gradient", "generator_gradient"}
    assert not torch.equal(
        before[0].transformer.video_in.weight, stage.model.transformer.video_in.weight
    )
    assert not torch.equal(before[1].logit.weight, stage.discriminator.logit.weight)
    assert torch.equal(
        before[1].backbone.video_out.weight, stage.discriminator.backbone.video_out.weight
    )


def test_warmup_freezes_the_generator():
    stage = adversarial_stage(discriminator_warmup=2)
    before = copy.deepcopy(stage.model)
    metrics = train(stage, 2)
    for a, b in zip(before.parameters(), stage.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "generator" not in metrics[0]


def test_gradients_that_are_not_finite_stop_the_stage():
    stage = adversarial_stage()
    networks = nn.ModuleList([stage.model, stage.discriminator, stage.judge_inputs])
    before = copy.deepcopy(networks.state_dict())
    data = clips()
    data.latents[:] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        train(stage, 1, data)
    for name, tensor in networks.state_dict().items():
        assert torch.equal(tensor, before[name]), name


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
    assert {name: found[name] for name in silent if found[name] > 1e-2 * whole} == {}


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


def test_logits_keep_single_precision():
    """A heavy penalty multiplies differences of logits: they must not be rounded to bfloat16."""
    net = model()
    judge = Discriminator(net.transformer)
    conditions = net.conditions(controls(5).float(), PROMPTS, SIZE)
    with torch.no_grad(), mixed_precision(torch.device("cpu")):
        logits = judge(latents(5).float(), latents(5).float(), *conditions, torch.rand(2))
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).any()


def test_taps_sit_at_the_papers_depths():
    """16, 26 and 36 of 36 blocks (SPEC 12)."""
    with torch.device("meta"):
        backbone = VideoTransformer(dataclasses.replace(aapt_8b(), width=128, heads=1))
        assert Discriminator(backbone).taps == [15, 25, 35]
