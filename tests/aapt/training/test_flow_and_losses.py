"""Pure functions against values worked out by hand."""

import math

import pytest
import torch

from aapt.model.flow import interpolate, schedule, shift, to_clean
from aapt.training.losses import (
    approximate_penalty,
    channel_weighted_error,
    discriminator_loss,
    frame_error,
    frame_mean_error,
    generator_loss,
    pseudo_huber,
    reconstruction_psnr,
    row_mean_error,
    sharpness_loss,
)


def test_shift_and_schedule():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift(t, 24), torch.tensor([0, 12 / 12.5, 1]).double())
    times = schedule(32, 24)
    assert len(times) == 33 and times[0] == 0 and times[-1] == 1
    assert times[1].item() == pytest.approx(24 / (32 + 23))
    assert (times.diff() > 0).all()


def test_one_step_inverts_the_path():
    x, e = torch.randn(2, 4, 3, 2, 2).double(), torch.randn(2, 4, 3, 2, 2).double()
    t = torch.tensor([0.3, 1.0]).double()
    torch.testing.assert_close(to_clean(interpolate(x, e, t), e - x, t), x)


def test_relativistic_losses():
    real, fake = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert generator_loss(real, fake).item() == pytest.approx(expected)


def test_generator_and_discriminator_pull_apart():
    logit = torch.zeros(1, requires_grad=True)
    generator_loss(torch.zeros(1), logit).backward()
    assert logit.grad.item() == pytest.approx(-0.5)  # descending raises D(fake)
    logit.grad = None
    discriminator_loss(torch.zeros(1), logit).backward()
    assert logit.grad.item() == pytest.approx(0.5)


def test_approximate_penalty():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 0.0]])
    assert approximate_penalty(a, b).item() == pytest.approx((0.25 + 4) / 2)


def test_pseudo_huber_is_per_frame():
    a = torch.zeros(1, 2, 3, 4, 5)
    b = a.clone()
    b[0, 0, 1] = 2
    c = 0.00054 * math.sqrt(2 * 4 * 5)
    expected = [0, math.sqrt(20 * 4 + c * c) - c, 0]
    torch.testing.assert_close(pseudo_huber(a, b), torch.tensor([expected]), atol=1e-5, rtol=0)


def test_sharpness_loss_sees_edges_only():
    assert sharpness_loss(torch.full((1, 3, 2, 4, 4), 0.7)).item() == 0
    error = torch.zeros(1, 1, 1, 2, 2)
    error[..., 1] = 1.0  # one step across in both rows, none down
    assert sharpness_loss(error).item() == pytest.approx(1.0)


def test_errors_of_frames_and_of_mean_colours():
    a, b = torch.zeros(1, 2, 3, 2, 2), torch.zeros(1, 2, 3, 2, 2)
    a[0, 0, 1] = torch.tensor([[3.0, 1.0], [-1.0, 1.0]])  # mean 1, of rows 2 and 0, of squares 3
    torch.testing.assert_close(frame_error(a, b), torch.tensor([[0.0, 1.5, 0.0]]))
    weights = torch.tensor([3.0, 1.0])  # 1.5 and 0.5 of the mean
    assert frame_mean_error(a, b, weights).item() == pytest.approx(1.5 * 1 / 6)
    assert row_mean_error(a, b, weights).item() == pytest.approx(1.5 * (2**2 / 2) / 6)
    assert channel_weighted_error(a, b, weights).item() == pytest.approx(1.5 * 3 / 6)


def test_psnr():
    """The full range is 2: an error of a tenth of it is 20 dB."""
    truth = torch.zeros(1, 3, 2, 4, 4)
    assert reconstruction_psnr(truth + 0.2, truth) == pytest.approx(20, abs=1e-5)
    assert reconstruction_psnr(truth, truth) == math.inf
