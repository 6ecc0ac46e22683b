"""Metrics on videos with known answers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aapt.data.tiny_world.rendered_clips import sample_clip
from aapt.data.tiny_world.themes import THEMES
from aapt.evaluate.metrics import (
    correlation,
    edge_energy,
    flicker,
    gain,
    palette,
    palette_distance,
    palette_error,
    psnr,
    response_steps,
    seam,
    sharpness,
    slope,
    theme_kept,
)
from aapt.evaluate.world_scenes import theme_frames

HEIGHT, WIDTH = 32, 64


def plain(sky, ground, starts=1, frames=2):
    """Make videos of two colours, the sky above the middle."""
    video = torch.empty(starts, frames, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    video[:, :, : HEIGHT // 2] = torch.tensor(sky, dtype=torch.uint8)
    video[:, :, HEIGHT // 2 :] = torch.tensor(ground, dtype=torch.uint8)
    return video


def noise(starts=2, frames=3):
    random = torch.Generator().manual_seed(0)
    shape = (starts, frames, HEIGHT, WIDTH, 3)
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def test_sharpness_of_stripes_is_their_mean_step():
    video = torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)
    video[..., 2:, :] = 51  # one step of 0.2 between five columns
    assert sharpness(video) == pytest.approx(0.2 / 4)


def test_blur_lowers_sharpness_and_a_shift_does_not():
    video = noise()
    flat = video.flatten(0, 1).permute(0, 3, 1, 2).float()
    blurred = F.avg_pool2d(flat, 3, 1, 1).permute(0, 2, 3, 1).to(torch.uint8).view_as(video)
    assert sharpness(blurred) < 0.5 * sharpness(video)
    assert sharpness(video.roll(1, dims=2)) == pytest.approx(sharpness(video))


def test_seam_of_cells_of_known_steps():
    """Columns step by 2 inside cells of four and by 6 across their borders, in one clip of two."""
    steps = torch.tensor([0, 2, 2, 2, 6, 2, 2, 2, 6, 2, 2, 2])
    rising = steps.cumsum(0).to(torch.uint8)[:, None].expand(12, 3)
    video = torch.stack([rising, 2 * rising])[:, None, None].expand(2, 3, 5, 12, 3)
    assert seam(video, 4) == pytest.approx(3)
    assert seam(video, 3) == pytest.approx(2 / 3)  # both steps of 6 are inside
    even = torch.arange(12, dtype=torch.uint8)[:, None].expand(1, 1, 5, 12, 3)
    assert seam(even, 4) == 1
    for cell, flat in ((12, even), (1, even), (4, torch.zeros_like(even))):
        assert seam(flat, cell) is None


def test_edge_energy_of_known_steps():
    """A step between two of 41 columns is alone in its row's band of two pixels."""
    video = torch.zeros(1, 2, 41, 41, 3, dtype=torch.uint8)
    video[..., 20:, :] = 102
    sharp = edge_energy(video)
    assert sharp == pytest.approx(3 * 0.4**2 / 2)
    video[..., 20, :] = 51  # now two steps of half the height
    assert edge_energy(video) == pytest.approx(sharp / 2)
    assert edge_energy(video.transpose(2, 3)) == pytest.approx(sharp / 2)
    assert edge_energy(torch.full_like(video, 9)) == 0


def test_psnr_of_a_known_error():
    video = torch.full((2, 3, 4, 4, 3), 100, dtype=torch.uint8)
    assert psnr(video, video) == math.inf
    assert psnr(video + 51, video) == pytest.approx(20 * math.log10(5))
    assert psnr(noise(), noise().roll(1, dims=3)) < 10  # as bad as independent noise
    with pytest.raises(ValueError, match="one shape, got .* and "):
        psnr(video, video[:1])


def test_swapping_sky_and_ground_gives_their_difference_as_palette_error():
    day = palette(plain((0, 51, 102), (255, 204, 153)))
    swapped = palette(plain((255, 204, 153), (0, 51, 102)))
    assert day[0].tolist() == pytest.approx([0, 0.2, 0.4, 1, 0.8, 0.6])
    assert palette_error(day, day) == 0
    assert palette_error(day, swapped) == pytest.approx((1 + 0.6 + 0.2) / 3)


def test_chance_palette_errors_come_from_pairs_of_starts():
    palettes = torch.tensor([0.0, 0.1, 0.5])[:, None].expand(3, 6)
    themes = torch.tensor([0, 0, 1])
    assert palette_distance(palettes, themes, same_theme=True) == pytest.approx(0.1)
    assert palette_distance(palettes, themes, same_theme=False) == pytest.approx(0.45)
    assert palette_distance(palettes[1:], themes[1:], same_theme=True) is None


def test_theme_kept_counts_the_nearest_references():
    references = torch.tensor([0.0, 0.5, 1.0])[:, None].expand(3, 6)
    palettes = torch.tensor([0.1, 0.6, 0.4, 0.9])[:, None].expand(4, 6)
    assert theme_kept(palettes, references, torch.tensor([0, 1, 2, 2])) == 0.75


def test_real_clips_keep_their_theme():
    themes = torch.arange(len(THEMES))
    clips = [sample_clip(40 + t, 3, theme=t, height=HEIGHT, width=WIDTH).video for t in range(6)]
    references = palette(theme_frames(HEIGHT, WIDTH))
    assert theme_kept(palette(torch.stack(clips)), references, themes) == 1.0


def test_correlation_and_gain_against_numpy():
    commanded = torch.linspace(-1, 1, 40).view(2, 20)
    realised = 0.5 * commanded + 0.3 + 0.1 * torch.sin(37 * commanded)
    expected = np.corrcoef(realised.flatten(), commanded.flatten())[0, 1]
    slope = np.polyfit(commanded.flatten().double(), realised.flatten().double(), 1)[0]
    assert correlation(realised, commanded) == pytest.approx(expected, abs=1e-6)
    assert gain(realised, commanded) == pytest.approx(slope, abs=1e-6)
    assert correlation(-realised, commanded) == pytest.approx(-expected, abs=1e-6)
    still = torch.zeros(2, 20)
    assert correlation(realised, still) is None and gain(realised, still) is None
    assert correlation(still, commanded) is None and gain(still, commanded) == 0


def test_flicker_of_known_changes():
    """Video frames change by 2 inside steps of four and by 6 from step to step, in one of two."""
    change = torch.tensor([0, 2, 2, 2, 6, 2, 2, 2, 6, 2, 2, 2]).cumsum(0).to(torch.uint8)
    jumping = change[:, None, None, None].expand(12, 4, 5, 3)
    smooth = (2 * torch.arange(12, dtype=torch.uint8))[:, None, None, None].expand(12, 4, 5, 3)
    assert flicker(smooth[None], 4) == 1.0
    assert flicker(jumping[None], 4) == 3.0
    assert flicker(torch.stack([jumping, smooth]), 4) == 2.0
    assert flicker(smooth[None, :4], 4) is None  # one step
    assert flicker(smooth[None], 1) is None
    assert flicker(torch.zeros(1, 8, 4, 5, 3, dtype=torch.uint8), 4) is None


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_response_is_the_delay_of_the_motion(lag):
    random = torch.Generator().manual_seed(0)
    commanded = torch.randn(6, 20, generator=random)
    realised = 0.5 * commanded.roll(lag, dims=1) + 0.1 * torch.randn(6, 20, generator=random)
    assert response_steps(realised, commanded) == lag


def test_a_response_that_nothing_tells():
    still, moving = torch.zeros(2, 12), torch.randn(2, 12)
    assert response_steps(still, moving) is None and response_steps(moving, still) is None
    assert response_steps(moving[:, :7], moving[:, :7]) is None


def test_slope_is_per_minute():
    assert slope([1, 2, 4], [1.0, 2.0, 4.0]) == pytest.approx(60)
    assert slope([1, 2, 3, 9], [1.0, 0.5, None, None]) == pytest.approx(-30)
    assert slope([1, 2], [1.0, None]) is None
