"""One-step diffusion forcing, the baseline of the paper's Figure 2: a time for each frame."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from aapt.data.randomness import ClipRandom
from aapt.model.config import FewStepConfig
from aapt.model.flow import schedule, shift
from aapt.model.world_model import WorldModel
from aapt.streaming.few_step import FewStepRollout
from aapt.streaming.rollout import roll_out
from aapt.training.curriculum import constant
from aapt.training.forcing import DenoisingForcing
from aapt.training.optimization import Schedule
from aapt.training.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from aapt.training.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig

from ..helpers import CAMERA, PROMPTS, SIZE, WAN, clips, controls, wan_transformer
from ..runs.counting import counting_clips, train, value

FRAMES = 4
CURRICULUM = constant("clips", frames=FRAMES, batch=3, steps=2)
DRIVEN = replace(WAN, condition_channels=CAMERA.channels)


def world(**changes) -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(replace(DRIVEN, **changes), CAMERA)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "table" in name or "video_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def text(frames: int):
    torch.manual_seed(1)
    words = torch.randn(2, WAN.text_tokens, WAN.text_width, dtype=torch.float64)
    x = torch.randn(2, WAN.latent_channels, frames, *SIZE, dtype=torch.float64)
    return x, words, torch.tensor([WAN.text_tokens, 3])


@torch.no_grad()
def test_a_time_per_frame_equals_steps_at_these_times():
    """In parallel, and frame after frame against a cache, past the end of the window."""
    model, frames = wan_transformer(), 7
    x, words, lens = text(frames)
    times = torch.rand(2, frames, dtype=torch.float64)
    parallel = model(x, None, None, words, lens, times)
    cache = model.new_cache(2, SIZE, dtype=torch.float64)
    for layer, pair in enumerate(model.encode_text(words, lens, times[:, 0])):
        cache.write_text(layer, *pair)
    for frame in range(frames):
        made = model.step(x[:, :, frame : frame + 1], None, None, times[:, frame], cache)
        torch.testing.assert_close(parallel[:, :, frame : frame + 1], made)


@torch.no_grad()
def test_equal_times_of_frames_are_the_time_of_a_clip():
    model = wan_transformer()
    x, words, lens = text(5)
    times = torch.tensor([0.3, 0.8], dtype=torch.float64)
    whole = model(x, None, None, words, lens, times)
    torch.testing.assert_close(
        model(x, None, None, words, lens, times[:, None].expand(2, 5)), whole
    )


class Recorder(torch.nn.Module):
    """A transformer that records its arguments and returns x_t."""

    def __init__(self, config):
        super().__init__()
        self.config, self.gain, self.calls = config, torch.nn.Parameter(torch.ones(())), []

    def forward(self, x, *arguments):
        self.calls.append((x.detach(), *arguments))
        return self.gain * x


def recorded() -> WorldModel:
    model = world()
    model.transformer = Recorder(model.config)
    return model


def test_stage_one_noises_every_frame_to_a_time_of_its_own():
    """Frame 0 is clean, nothing drives it, and it carries no loss."""
    curriculum = constant("clips", frames=FRAMES, batch=64, steps=1)
    config = DiffusionConfig(curriculum, Schedule(0.0), forcing="diffusion", shift=6.0)
    stage = DiffusionAdaptation(config, recorded())
    (metrics,) = train(stage, 1, counting_clips())
    ((x_t, recycled, condition, _, _, t),) = stage.model.transformer.calls
    assert recycled is None and t.shape == (64, 1 + FRAMES)
    assert not t[:, 0].any() and not condition[:, :, 0].any()
    starts = value(x_t[:, :, :1])
    clean = (starts + torch.arange(1 + FRAMES))[:, None, :, None, None]
    time = t[:, None, :, None, None]
    noise = ((x_t - (1 - time) * clean) / time)[:, :, 1:]
    late = (t[:, 1:] > 0.5)[:, None, :, None, None].expand_as(noise)
    assert noise[late].std().item() == pytest.approx(1, abs=0.05)
    error = (x_t[:, :, 1:] - (noise - clean[:, :, 1:])).square().mean()
    assert metrics["loss"] == pytest.approx(error.item(), rel=1e-3)
    uniform = (t / (6 - 5 * t))[:, 1:]  # the shift undone
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.1)
    assert abs(torch.corrcoef(uniform.T)[0, 1]) < 0.4


def test_stage_two_compares_neighbouring_times_frame_by_frame():
    config = ConsistencyConfig(CURRICULUM, Schedule(0.0), forcing="diffusion", times=8)
    student, teacher = recorded(), recorded()
    stage = ConsistencyDistillation(config, student, teacher)
    (metrics,) = train(stage, 1, counting_clips())
    ((noisy, recycled, _, _, _, t),) = teacher.transformer.calls
    (earlier_x, _, condition, _, _, earlier), (again, *_, later) = student.transformer.calls
    assert recycled is None and torch.equal(noisy, again) and torch.equal(t, later)
    assert not condition[:, :, 0].any() and not t[:, 0].any() and not earlier[:, 0].any()
    known = schedule(8, config.shift)
    k = torch.tensor([[(known - time).abs().argmin() for time in row] for row in t])
    torch.testing.assert_close(known[k], t)
    torch.testing.assert_close(known[(k - 1).clamp_min(0)], earlier)
    assert len(set(k[:, 1:].flatten().tolist())) > 3
    step = (t - earlier)[:, None, :, None, None]
    torch.testing.assert_close(earlier_x, noisy - step * noisy)  # the teacher's v is x_t
    assert metrics["loss"] > 0


def test_both_stages_learn_and_their_model_streams():
    """A step makes a frame in two passes: the new frame, and the frame as it has become."""
    model, data = world(), clips(count=1, length=1 + FRAMES)
    curriculum = constant("clips", frames=FRAMES, batch=4, steps=60)
    config = DiffusionConfig(curriculum, Schedule(3e-3, 5), forcing="diffusion", sampling_steps=4)
    losses = [m["loss"] for m in train(DiffusionAdaptation(config, model), 60, data)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert isinstance(config.sampling, FewStepConfig)
    assert config.sampling.times == tuple(reversed(schedule(4, 24.0)[1:].tolist()))
    second = ConsistencyConfig(CURRICULUM, Schedule(1e-3), forcing="diffusion")
    stage = ConsistencyDistillation(second, model, world())
    assert train(stage, 2, data)[1]["gradient"] > 0
    assert second.sampling == FewStepConfig((1.0,)) and second.sampling.passes == 2

    first = torch.randn(2, WAN.latent_channels, 1, *SIZE)
    channels, *words = model.conditions(controls(6).float(), PROMPTS, SIZE)
    made = roll_out(model, first, words, lambda n: channels[:, :, n - 1 : n], 6, 0, second.sampling)
    frames = torch.cat(list(made), dim=2)
    assert frames.shape[2] == 7 and torch.equal(frames[:, :, :1], first)

    rollout = FewStepRollout(model.transformer, *words, SIZE, second.sampling)
    rollout.give(first, torch.zeros_like(channels[:, :, :1]))
    noise = torch.randn(1, 2, WAN.latent_channels, 1, *SIZE)
    new = rollout.step(noise, channels[:, :, :1])
    # The second step sees frame 0 and frame 1 clean, which one parallel pass shows too.
    x = torch.cat([first, new, noise[0]], dim=2)
    driven = torch.cat([torch.zeros_like(channels[:, :, :1]), channels[:, :, :2]], dim=2)
    times = torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3)
    with torch.no_grad():
        v = model.transformer(x, None, driven, *words, times)
    expected = (x - v)[:, :, 2:]
    torch.testing.assert_close(
        rollout.step(noise, channels[:, :, 1:2]), expected, rtol=1e-3, atol=1e-4
    )


def test_models_that_cannot_be_forced_so():
    for changes in ({"recycle": True}, {"block": "mmdit", "mlp_width": None}):
        config = dataclasses.replace(WAN, **changes)
        with pytest.raises(ValueError, match="forcing: expected 'teacher' unless the model is of"):
            DenoisingForcing("diffusion", config)
    with pytest.raises(ValueError, match="forcing: expected 'teacher' or 'diffusion', got 'self'"):
        DenoisingForcing("self", WAN)
    drawn = DenoisingForcing("teacher", WAN).draw(5, ClipRandom(0, 0, range(3)).uniform)
    assert drawn.shape == (3,) and torch.equal(shift(drawn, 1.0), drawn)
