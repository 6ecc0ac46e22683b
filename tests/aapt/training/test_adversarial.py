"""Stage 3: the frames that the discriminator is shown, the effect of each loss, and no leaks."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt.data.randomness import ClipRandom
from aapt.device import mixed_precision
from aapt.model.discriminator import Discriminator
from aapt.model.world_model import WorldModel
from aapt.training.corruption import Corruption
from aapt.training.optimization import Schedule
from aapt.training.shown import Shown
from aapt.training.stages.adversarial import Adversarial, AdversarialConfig

from ..helpers import CAMERA, CONFIG, clips, draws
from ..runs.counting import (
    adversarial_stage,
    assert_drives,
    counting_clips,
    counting_model,
    prompted,
    train,
    value,
)
from .discriminator_calls import recording


@pytest.mark.parametrize(
    ("perturb_known", "overlap_loss"), [(True, False), (False, False), (False, True)]
)
def test_adversarial_wiring(made_segments, perturb_known, overlap_loss):
    """Frames and conditions of the discriminator, and the gradient of every logit.

    The reference is docs/method.md#8. The generator adds 1.25 per step, so its frame n after frame
    s of a clip is s + 1.25 n.
    """
    batch, sigma, penalty = 8, 0.1, 50.0
    stage = adversarial_stage(
        counting_model(*[1.25] * 4),
        batch=batch,
        segments=2,
        overlap_frames=1,
        overlap_loss=overlap_loss,
        penalty=penalty,
        perturbation=sigma,
        perturb_known=perturb_known,
    )
    embed = copy.deepcopy(stage.discriminator.world.text_encoder)
    with recording(stage) as calls:
        (metrics,) = train(stage, 1, counting_clips())

    assert len(calls) == 4  # discriminator, generator, twice
    names = ("discriminator", "r1", "r2", "generator", "accuracy", "error", "palette", "rows")
    expected = dict.fromkeys(names, 0.0)
    starts, times = None, []
    for index in range(2):
        known, new, frames = index, 3 - index, 3
        unjudged = 0 if overlap_loss else known
        clean = 0 if perturb_known else unjudged + 1  # frames without noise, with the one before
        for_d, for_g = calls[2 * index : 2 * index + 2]
        x, previous, condition, text, text_lens, t = (a.chunk(4) for a in for_d.arguments)
        real, fake, real_shaken, fake_shaken = range(4)
        steps = torch.arange(frames)

        # Fake: overlap and segment, each frame with the frame before it.
        if index == 0:
            starts = value(previous[fake])[:, :1]
        first = 0 if index == 0 else 2  # steps of the generator before the first shown frame
        torch.testing.assert_close(value(x[fake]), starts + 1.25 * (first + 1 + steps))
        torch.testing.assert_close(value(previous[fake]), starts + 1.25 * (first + steps))
        fake_rows = starts + first + 1 + steps
        assert_drives(condition[fake], fake_rows)
        made = made_segments[index]
        assert_drives(made.condition, starts + 3 * index + 1 + torch.arange(new))
        assert made.start_frame == 3 * index

        # Real: first the clip that the fake starts from, then other windows without frame 0.
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

        # Perturbed copies: sigma on frames, or on those with a loss, also where they precede one.
        shaken = []
        for plain, perturbed in ((real, real_shaken), (fake, fake_shaken)):
            noise = x[perturbed] - x[plain]
            before = previous[perturbed] - previous[plain]
            torch.testing.assert_close(before[:, :, 1:], noise[:, :, :-1])
            noise = torch.cat([before[:, :, :1], noise], dim=2)
            assert not noise[:, :, :clean].any()
            assert noise[:, :, clean:].std().item() == pytest.approx(sigma, rel=0.1)
            shaken.append(noise)
        assert not torch.equal(*shaken)

        # One t per pair of real and fake, also for the copies and in the generator's turn.
        assert t[0].shape == (batch,) and all(torch.equal(t[0], other) for other in t)
        times.append(t[0])
        fakes = (a[fake] for a in (x, previous, condition, text, text_lens, t))
        for mine, theirs in zip(for_g.arguments, fakes, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert not for_d.arguments[0].requires_grad and not for_d.arguments[1].requires_grad
        assert for_g.arguments[0].requires_grad and for_g.arguments[1].requires_grad

        # The losses of docs/method.md#8, means over clips, frames with a loss, and segments.
        logits = for_d.logits.clone().requires_grad_()
        on_real, on_fake, on_real_shaken, on_fake_shaken = logits[:, unjudged:].chunk(4)
        relative = F.softplus(on_fake - on_real).mean()
        r1 = penalty * (on_real - on_real_shaken).square().mean()
        r2 = penalty * (on_fake - on_fake_shaken).square().mean()
        ((relative + r1 + r2) / 2).backward()
        torch.testing.assert_close(for_d.gradient, logits.grad)
        assert not for_d.gradient[:, :unjudged].any()
        logits = for_g.logits.clone().requires_grad_()
        generated = F.softplus(on_real.detach() - logits[:, unjudged:]).mean()
        (generated / 2).backward()
        torch.testing.assert_close(for_g.gradient, logits.grad)
        # The clip continues from s in steps of 1: an error of 0.25 n at frame n, on all channels.
        error = (0.25 * (3 * index + 1 + torch.arange(new))).square().mean()
        accuracy = (on_real > on_fake).float().mean()
        seen = (relative, r1, r2, generated, accuracy, error, error, error)
        for name, loss in zip(expected, seen, strict=True):
            expected[name] += loss.item() / 2
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(*times)
    uniform = torch.cat(times)  # not shifted
    assert 0.25 < uniform.mean() < 0.75 and 0 <= uniform.min() and uniform.max() < 1


def test_the_discriminator_knows_the_frame_that_was_corrupted(made_segments):
    """Only the generator sees corruption; the discriminator is shown the frame as it was."""
    stage = adversarial_stage(
        counting_model(*[1.25] * 4),
        segments=2,
        overlap_frames=1,
        corruption=Corruption(clip_chance=1.0, first_chance=0.0),
    )
    with recording(stage) as calls:
        train(stage, 1, counting_clips())
    first, later = made_segments
    starts = value(first.recycled)[:, :1]
    assert torch.equal(starts, starts.round())
    assert (later.recycled[:, :, 0] - (starts + 3.75)[..., None, None]).std() > 0.01
    _, fake, _, _ = calls[2].arguments[0].chunk(4)
    _, previous, _, _ = calls[2].arguments[1].chunk(4)
    torch.testing.assert_close(value(previous[:, :, :2]), starts + torch.tensor([2.5, 3.75]))
    torch.testing.assert_close(fake[:, :, 1], later.recycled[:, :, 0] + 1.25)


@pytest.mark.parametrize(
    ("moving", "penalty"), [("generator", 0.0), ("discriminator", 0.0), ("discriminator", 1e4)]
)
def test_one_adversarial_update_goes_the_right_way(moving, penalty):
    """One update moves D(fake) - D(real), while the other network does not change.

    The generator raises it and the discriminator lowers it. Under a heavy penalty the discriminator
    lowers the effect of perturbation on its logits instead.
    """
    still = "generator" if moving == "discriminator" else "discriminator"
    stage = adversarial_stage(batch=4, penalty=penalty, **{f"{still}_schedule": Schedule(0.0)})
    before = copy.deepcopy((stage.model, stage.discriminator))
    gaps, shaken = [], []
    for _ in range(2):  # with equal clips, noise, t and perturbation
        with recording(stage) as calls:
            train(stage, 1)
        on_real, on_fake, *copies = calls[0].logits.chunk(4)
        gaps.append((calls[1].logits - on_real).mean().item())
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


@pytest.mark.parametrize("regression_segments, frames", [(None, 6), (1, 3), (0, 0)])
def test_regression_pulls_the_generator_to_the_clip(regression_segments, frames):
    """Regression adds its weighted gradient to that of the adversarial loss, in the first segments
    alone if so configured.

    The generator overshoots in channel 0 alone, whose weight is 1.5, and is pushed back there.
    """
    gradients = []
    for weight in (0.0, 2.0):
        stage = adversarial_stage(
            counting_model(1.25, 1.0, 1.0, 1.0),
            batch=4,
            segments=2,
            regression=weight,
            regression_segments=regression_segments,
        )
        bias = stage.model.transformer.video_out.bias
        stage.trained["generator"].optimizer.register_step_pre_hook(
            lambda *_, bias=bias: gradients.append(bias.grad.view(4, 4).sum(0))
        )
        train(stage, 1, counting_clips())
    # Recycled frames are detached, so steps are independent: the derivative of 1.5 (0.25 n)^2 / 4.
    expected = 2.0 * 1.5 / 4 * 2 * sum(0.25 * n for n in range(1, frames + 1)) / 6
    difference = gradients[1] - gradients[0]
    torch.testing.assert_close(difference, torch.tensor([expected, 0, 0, 0]), rtol=0.02, atol=0.02)


def test_mean_colours_alone_pull_too():
    """Errors of frame means and of row means push as much as the error of every pixel.

    This holds because the generator gains too much on channel 0 at all pixels alike.
    """
    gradients = []
    for weights in ({"regression": 2.0}, {"palette": 2.0}, {"rows": 2.0}):
        stage = adversarial_stage(counting_model(1.25, 1.0, 1.0, 1.0), penalty=0.0, **weights)
        bias = stage.model.transformer.video_out.bias
        stage.trained["generator"].optimizer.register_step_pre_hook(
            lambda *_, bias=bias: gradients.append(bias.grad.clone())
        )
        train(stage, 1, counting_clips())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5)


def test_later_segments_of_short_clips_have_motion_of_their_own(made_segments):
    """If clips end with the first segment, later motion continues it (docs/method.md#8)."""
    stage = adversarial_stage(
        counting_model(*[1.0] * 4), batch=8, segments=2, overlap_frames=1, whole_clips=False
    )
    with recording(stage) as calls:
        (metrics,) = train(stage, 1, counting_clips(length=6))
    assert not {"error", "palette", "rows"} & set(metrics)  # nothing to compare the rest with
    first, later = made_segments
    borrowed = later.condition
    assert borrowed.shape[2] == 2 and not torch.equal(borrowed[:, :, 0], first.condition[:, :, 0])
    _, fake, _, _ = calls[2].arguments[2].chunk(4)  # what drives the second segment
    torch.testing.assert_close(fake[:, :, 1:], borrowed, rtol=0, atol=2e-3)
    torch.testing.assert_close(fake[:, :, 0], first.condition[:, :, 2], rtol=0, atol=2e-3)


def test_a_model_without_conditions(made_segments):
    """The paper's first model has an image and a prompt, and no other condition."""
    worlds = [WorldModel(dataclasses.replace(CONFIG, condition_channels=0), None) for _ in "gd"]
    given = {"generator_schedule": Schedule(1e-3), "discriminator_schedule": Schedule(1e-3)}
    config = AdversarialConfig("clips", 1, 2, segment_frames=3, segments=2, **given)
    stage = Adversarial(config, worlds[0], Discriminator(worlds[1]), torch.ones(4))
    metrics = train(stage, 1)
    assert metrics[0]["generator_gradient"] > 0
    assert [segment.condition for segment in made_segments] == [None, None]
    with pytest.raises(ValueError, match="mismatch: expected 0 for a model that nothing controls"):
        Adversarial(
            dataclasses.replace(config, mismatch=1.0), worlds[0], stage.discriminator, torch.ones(4)
        )


def test_motion_at_another_speed_needs_rays():
    """Other channels, such as a drawn pose, have no speed to scale."""
    worlds = [WorldModel(CONFIG, None) for _ in "gd"]
    given = {"generator_schedule": Schedule(1e-3), "discriminator_schedule": Schedule(1e-3)}
    config = AdversarialConfig(
        "clips", 1, 2, segment_frames=3, mismatch=1.0, mismatched_gain=0.5, **given
    )
    with pytest.raises(ValueError, match="mismatched_gain: expected 0 for a model that no camera"):
        Adversarial(config, worlds[0], Discriminator(worlds[1]), torch.ones(4))


def test_rays_relative_to_the_first_frame_need_rollouts_of_one_segment():
    camera = dataclasses.replace(CAMERA, relative_to_first=True)
    worlds = [WorldModel(CONFIG, camera) for _ in "gd"]
    given = {"generator_schedule": Schedule(1e-3), "discriminator_schedule": Schedule(1e-3)}
    config = AdversarialConfig("clips", 1, 2, segment_frames=3, **given)
    judge = Discriminator(worlds[1])
    assert train(Adversarial(config, worlds[0], judge, torch.ones(4)), 1)
    for several in ({"segments": 2}, {"lead_segments": 1}):
        with pytest.raises(ValueError, match="relative_to_first: expected False for several"):
            changed = dataclasses.replace(config, **several)
            Adversarial(changed, worlds[0], judge, torch.ones(4))


def test_segments_of_drawn_lengths(made_segments):
    stage = adversarial_stage(segment_frames=5, shortest_segment=2, segments=2, overlap_frames=1)
    train(stage, 12, counting_clips())
    lengths = [segment.noise.shape[2] for segment in made_segments]
    assert set(lengths[::2]) == {2, 3, 4, 5}
    assert lengths[1::2] == [length - 1 for length in lengths[::2]]


def test_lead_segments_are_rolled_out_without_a_loss(made_segments):
    """Segments with a loss continue the lead, in the model's past and in the clip's motion.

    They are compared with the clip at their own place. The generator adds 1.25 per step, so its
    frame n after frame s of a clip is s + 1.25 n.
    """
    leads = set()
    for seed in range(8):
        made_segments.clear()
        stage = adversarial_stage(
            counting_model(*[1.25] * 4), segments=2, overlap_frames=1, lead_segments=2
        )
        assert stage.config.needs == {"clips": 3 + 3 * 2}
        with recording(stage) as calls:
            (metrics,) = train(stage, 1, counting_clips(), seed=seed)
        lead = (0, 3, 5).index(made_segments[0].start_frame)
        leads.add(lead)
        frames, errors = [3, 2, 2, 2][lead : lead + 2], []
        assert [segment.noise.shape[2] for segment in made_segments] == frames
        assert len(calls) == 4
        place = made_segments[0].start_frame
        start = made_segments[0].recycled[:, 0, 0, 0, 0] - 1.25 * place
        for index, segment in enumerate(made_segments):
            steps = place + torch.arange(frames[index])
            assert segment.start_frame == place
            torch.testing.assert_close(value(segment.recycled), start[:, None] + 1.25 * steps)
            assert_drives(segment.condition, start[:, None] + 1 + steps)
            x, _, condition, *_ = calls[2 * index + 1].arguments
            new = frames[index]
            torch.testing.assert_close(value(x)[:, -new:], start[:, None] + 1.25 * (1 + steps))
            assert_drives(condition[:, :, -new:], start[:, None] + 1 + steps)
            errors.append((0.25 * (1 + steps)).square().mean().item())
            place += new
        assert metrics["error"] == pytest.approx(sum(errors) / 2, rel=1e-3)
    assert leads == {0, 1, 2}


@pytest.mark.parametrize(("power", "shares"), [(1.0, (1 / 3,) * 3), (2.0, (0.58, 0.24, 0.18))])
def test_short_leads_are_drawn_more_often(made_segments, power, shares):
    stage = adversarial_stage(
        counting_model(*[1.25] * 4), batch=1, lead_segments=2, lead_power=power
    )
    counts = [0, 0, 0]
    for seed in range(100):
        made_segments.clear()
        train(stage, 1, counting_clips(), seed=seed)
        counts[made_segments[0].start_frame // 3] += 1
    assert counts == pytest.approx([100 * share for share in shares], abs=15)


def test_a_lead_is_not_corrupted(monkeypatch):
    """Only segments with a loss are: the lead shows the generator's own errors."""
    calls, corrupt = [], Corruption.__call__

    def record(corruption, frames, first, random):
        calls.append(first)
        return corrupt(corruption, frames, first, random)

    monkeypatch.setattr(Corruption, "__call__", record)
    stage = adversarial_stage(lead_segments=2, segments=1, corruption=Corruption())
    train(stage, 8, counting_clips())
    assert len(calls) == 8 and set(calls) == {True, False}


def test_teacher_forced_frames_get_their_logits_one_by_one():
    """A logit is that of the real clip with a single frame replaced (docs/method.md#8).

    Frame n of the generator comes from the real frame before it.
    """
    stage = adversarial_stage(
        counting_model(*[1.25] * 4), batch=2, segment_frames=4, forcing="teacher", penalty=0.0
    )
    turns, compute = [], stage.logits

    def record(frames, t):
        logits = compute(frames, t)
        turns.append((frames, t, logits.detach()))
        return logits

    stage.logits = record
    discriminator = copy.deepcopy(stage.discriminator)  # as it was before its update
    train(stage, 1, counting_clips())
    (joined, t, logits), (for_g, _, on_fake) = turns
    real, fake = joined.latents.chunk(4)[:2]
    torch.testing.assert_close(real, joined.real)
    torch.testing.assert_close(fake[:, :, 1:], real[:, :, :-1] + 1.25)
    torch.testing.assert_close(for_g.latents, fake)
    condition, text, text_lens = joined.conditions
    parallel = functools.partial(discriminator, condition=condition)
    with torch.no_grad(), mixed_precision(t.device):
        given = {"text": text, "text_lens": text_lens, "t": t}
        whole = parallel(real[:, :, 1:], real[:, :, :-1], **given)
        torch.testing.assert_close(logits.chunk(4)[0], whole.float(), rtol=0.02, atol=0.02)
        for index in range(4):
            mixed = real[:, :, 1:].clone()
            mixed[:, :, index] = fake[:, :, 1 + index]
            alone = parallel(mixed, real[:, :, :-1], **given)[:, index]
            for seen in (logits.chunk(4)[1], on_fake):
                torch.testing.assert_close(seen[:, index], alone.float(), rtol=0.02, atol=0.02)


def test_halves_of_a_batch_add_up():
    """Accumulated in parts, the gradients of an update equal those of the whole batch."""
    gradients, sets = [], {"clips": clips()}
    for parts in ([range(4)], [range(2), range(2, 4)]):
        stage = adversarial_stage(batch=4, segments=2, overlap_frames=1, corruption=Corruption())
        for part in parts:
            share = 1 / len(parts)
            stage.accumulate(sets, ClipRandom(0, 0, part), 0, share)
        gradients.append([p.grad for one in stage.trained.values() for p in one.parameters])
    for whole, halves in zip(*gradients, strict=True):
        if whole is not None:
            assert (halves - whole).norm() < 1e-4 + 0.02 * whole.norm()


def test_adversarial_gradients_do_not_leak():
    """Each network's turn leaves no gradient on the other network."""
    stage = adversarial_stage(segments=2, overlap_frames=1)
    own = {"train_generator": stage.trained["generator"].parameters}
    own["train_discriminator"] = stage.trained["discriminator"].parameters
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
    learning = own["train_discriminator"]
    everything = [*stage.model.parameters(), *learning, *frozen]
    assert all(p.grad is None for p in everything)
    assert not {id(p) for p in stage.model.parameters()} & {id(p) for p in learning}
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
    shown = Shown(latent, None, known=2)
    everywhere = shown.perturbed(0.3, draws(8), spare_known=False).latents - latent
    shaken = shown.perturbed(0.3, draws(8), spare_known=True)
    assert torch.equal(shown.latents, latent) and shaken.known == 2
    noise = shaken.latents - latent
    assert not noise[:, :, :3].any()  # the frame before, and the two known ones
    assert everywhere[:, :, :3].std().item() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(everywhere[:, :, 3:], noise[:, :, 3:])
    assert noise[:, :, 3:].std().item() == pytest.approx(0.3, rel=0.05)
    assert noise[:, :, 3:].mean().item() == pytest.approx(0, abs=0.02)
    frames = noise[:, :, 3:].transpose(0, 2).flatten(1)
    assert (torch.corrcoef(frames) - torch.eye(3)).abs().max() < 0.15


def test_adversarial_moves_both_networks():
    stage = adversarial_stage(segments=2, overlap_frames=1, corruption=Corruption())
    before = copy.deepcopy((stage.model, stage.discriminator))
    metrics = train(stage, 2)
    losses = {"discriminator", "r1", "r2", "accuracy", "generator", "error", "palette", "rows"}
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
    networks = nn.ModuleList([stage.model, stage.discriminator])
    before = copy.deepcopy(networks.state_dict())
    data = clips()
    data.latents[:] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        train(stage, 1, data)
    for name, tensor in networks.state_dict().items():
        assert torch.equal(tensor, before[name]), name
