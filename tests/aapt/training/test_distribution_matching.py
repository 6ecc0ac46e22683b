"""Distribution matching on normal distributions, whose scores are known."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from aapt.training.losses import distribution_matching_gradient
from aapt.training.optimization import Schedule
from aapt.training.recipe_file import changed, load_recipe
from aapt.training.stages import distribution_matching
from aapt.training.stages.distribution_matching import (
    DistributionMatching,
    DistributionMatchingConfig,
)

from ..helpers import clips, draws, tiny_model
from ..runs.counting import train

MADE, REAL, EMPTY, CRITIC = 2.0, -0.5, 1.0, 1.5  # means; all deviations are 1
CONFIG = DistributionMatchingConfig(
    clips="clips",
    steps=4,
    batch=3,
    segment_frames=3,
    generator_schedule=Schedule(0.0),
    critic_schedule=Schedule(0.0),
    critic_updates=1,
)


class Normal(nn.Module):
    """The velocity of data that are N(mean, 1): that of noise and data expected from x_t.

    The expectation of data is m + (1 - t) (x_t - (1 - t) m) / ((1 - t)^2 + t^2). The mean under an
    empty prompt, of one token, differs. All arguments are recorded.
    """

    def __init__(self, mean: float, empty: float):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.empty = empty
        self.calls = []

    def forward(self, x_t: Tensor, recycled: Tensor, condition: Tensor, text, text_lens, t: Tensor):
        self.calls.append((x_t.detach(), recycled, condition, text_lens, t))
        t = t[:, None, None, None, None]
        mean = torch.where(text_lens[:, None, None, None, None] == 1, self.empty, self.mean)
        expected = mean + (1 - t) * (x_t - (1 - t) * mean) / ((1 - t) ** 2 + t**2)
        return (x_t - expected) / t


def generator(mean: float):
    """A generator of frames that are the noise plus `mean`, which alone learns."""
    net = tiny_model(depth=1).float().requires_grad_(False)
    nn.init.zeros_(net.transformer.video_out.weight)
    nn.init.constant_(net.transformer.video_out.bias.requires_grad_(True), -mean)
    return net


def normal(mean: float, empty: float | None = None):
    net = tiny_model(depth=1).float()
    net.transformer = Normal(mean, mean if empty is None else empty)
    return net


def stage(critic: float = CRITIC, **changes) -> DistributionMatching:
    config = dataclasses.replace(CONFIG, **changes)
    return DistributionMatching(config, generator(MADE), normal(critic), normal(REAL, EMPTY))


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    monkeypatch.setattr(distribution_matching, "mixed_precision", lambda device: nullcontext())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_gradient_is_that_of_the_divergence(guidance):
    """Against the derivative of KL(N(m, s^2) || N(r, s^2)) of noised data, in float64.

    Both distributions have s^2 = (1 - t)^2 + t^2 at time t, and means (1 - t) m and (1 - t) r, so
    the derivative by a sample's mean is (1 - t)^2 (m - r) / s^2. A difference of expected data is
    t^2 / (1 - t)^2 of it. The network returns -m, so its bias has the negative sum.
    """
    made = stage(guidance=guidance)
    samples = accumulated(made)[0].double()
    x_t, _, _, _, t = made.critic.transformer.calls[-1]
    x_t, t = x_t.double(), t.double()[:, None, None, None, None]
    variance = (1 - t) ** 2 + t**2
    real = EMPTY + guidance * (REAL - EMPTY)  # guidance moves the mean of a normal distribution
    divergence = (1 - t) ** 2 * (CRITIC - real) / variance
    expected_real = real + (1 - t) * (x_t - (1 - t) * real) / variance
    scale = (samples - expected_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gradient = (divergence * t**2 / (1 - t) ** 2 / scale).expand_as(samples) / samples.numel()
    bias = made.model.transformer.video_out.bias.grad.double()
    expected = -gradient.sum(dim=(0, 2, 3, 4))  # by channel; the bias is (4 pixels, channel)
    torch.testing.assert_close(bias.view(4, -1).sum(0), expected, rtol=1e-4, atol=0)
    weights = {id(p) for p in made.model.parameters()}
    others = [*made.critic.parameters(), *made.teacher.parameters()]
    assert not weights & {id(p) for p in others}
    assert all(p.grad is None for p in made.teacher.parameters())


def accumulated(made: DistributionMatching, step: int = 0) -> list[Tensor]:
    """Accumulate the gradients of an update. Returns the rollouts of the generator's turn."""
    rollouts, real = [], made.train_generator

    def recording(segment, *rest):
        rollouts.append(segment.output)
        return real(segment, *rest)

    made.train_generator = recording
    made.accumulate({"clips": clips()}, draws(3), step)
    return rollouts


def test_the_critic_learns_the_mean_of_the_rollouts():
    """Its loss is ((x - expected) / t)^2, whose derivative by the mean is in closed form."""
    made = stage()
    (samples,) = accumulated(made)
    x_t, recycled, condition, _, t = made.critic.transformer.calls[0]
    samples, x_t, t = samples.double(), x_t.double(), t.double()[:, None, None, None, None]
    variance = (1 - t) ** 2 + t**2
    expected = CRITIC + (1 - t) * (x_t - (1 - t) * CRITIC) / variance
    gradient = (2 * (expected - samples) / t**2 * (t**2 / variance)).mean()
    actual = made.critic.transformer.mean.grad.double()
    torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=0)
    # each frame stands beside the frame before it, which the generator has made
    assert torch.equal(recycled[:, :, 1:], samples[:, :, :-1].float())
    assert condition.shape[2] == 3


def test_networks_see_one_noised_rollout_under_their_prompts():
    made = stage()
    accumulated(made)
    (prompted, empty), (learnt, scored) = (
        made.teacher.transformer.calls,
        made.critic.transformer.calls,
    )
    for seen in (prompted, empty, scored):
        assert torch.equal(seen[0], scored[0]) and torch.equal(seen[4], scored[4])
        assert torch.equal(seen[1], learnt[1])
    assert not torch.equal(learnt[0], scored[0])  # noise and times of the critic's own
    assert (empty[3] == 1).all() and (prompted[3] > 1).all() and torch.equal(prompted[3], scored[3])


def test_times_are_shifted_and_clamped():
    made = stage(batch=400, shift=5.0, times=(0.02, 0.9))
    made.accumulate({"clips": clips()}, draws(400), 0)
    t = made.critic.transformer.calls[0][4]
    assert t.min() >= 0.02 and t.max() == pytest.approx(0.9)
    for quartile in (0.25, 0.5):
        shifted = 5 * quartile / (1 + 4 * quartile)
        assert (t < shifted).float().mean().item() == pytest.approx(quartile, abs=0.1)


def test_the_generator_finds_the_distribution_of_the_teacher():
    """And the critic follows the generator all the way."""
    rates = {"generator_schedule": Schedule(0.05), "critic_schedule": Schedule(0.1)}
    made = stage(critic=MADE, **rates, steps=60, critic_updates=2, guidance=1.0, average=None)
    means = -made.model.transformer.video_out.bias
    assert means.sub(MADE).abs().max() < 0.01
    train(made, made.steps)
    means = -made.model.transformer.video_out.bias
    assert means.sub(REAL).abs().max() < 0.2
    assert made.critic.transformer.mean.item() == pytest.approx(REAL, abs=0.3)


def test_the_critic_moves_at_every_update_and_the_generator_at_every_third():
    rates = {"generator_schedule": Schedule(0.01), "critic_schedule": Schedule(0.01)}
    made = stage(**rates, steps=2, critic_updates=3)
    assert made.steps == 6
    bias, mean = made.model.transformer.video_out.bias, made.critic.transformer.mean
    for step in range(made.steps):
        before = bias.detach().clone(), mean.item()
        seen = made.accumulate({"clips": clips()}, draws(3, step=step), step) | made.update(step)
        assert mean.item() != before[1]
        learns = step in (2, 5)
        assert torch.equal(bias, before[0]) != learns
        both = {"critic", "critic_gradient"}
        assert set(seen) == both | ({"distance", "generator_gradient"} if learns else set())
    assert made.trained["generator"].average.updates == 2


def test_a_clip_of_equal_frames_has_a_gradient_that_is_finite():
    x = torch.zeros(2, 1, 1, 2, 2)
    assert torch.equal(distribution_matching_gradient(x, x, x), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("critic_updates=0", "critic_updates: expected 1 or more, got 0"),
        ("guidance=-1", "guidance: expected 0 or more, got -1"),
        ("times=[0.5, 0.1]", r"times: expected a least and a greatest time in \(0, 1\], got"),
        ("teacher=consistency", "teacher: expected a diffusion stage of forcing 'teacher', got"),
        ("teacher=adversarial", "teacher: expected a stage before it"),
    ],
)
def test_numbers_that_make_no_sense_are_rejected(settings, message):
    with pytest.raises(ValueError, match=f"stages.matching.{message}"):
        load_recipe("wan-1.3b-matched", [f"stages.matching.{settings}"])


def test_the_numbers_of_the_recipe_are_published_ones():
    """configs/self_forcing_dmd.yaml of Self-Forcing, whose guidance of 3 leaves out the 1."""
    stage = load_recipe("wan-1.3b-matched").stages["matching"]
    rates = stage.generator_schedule.learning_rate, stage.critic_schedule.learning_rate
    assert rates == (2e-6, 4e-7)
    assert (stage.batch, stage.critic_updates, stage.guidance, stage.shift) == (64, 5, 1 + 3, 5.0)
    assert (stage.betas, stage.times, stage.average) == ((0.0, 0.999), (0.02, 0.98), 0.99)
    assert changed(stage, {"steps": 600}).batches == {64}
