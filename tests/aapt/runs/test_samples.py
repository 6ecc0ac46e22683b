"""Rollouts and sheets of a model in training."""

import dataclasses

import numpy as np
import pytest
import torch

from aapt.data.clips import ClipBatch
from aapt.media.contact_sheet import contact_sheet
from aapt.model.config import SamplingConfig
from aapt.model.world_model import WorldModel
from aapt.runs.samples import sample_sheet
from aapt.streaming.diffusion import DiffusionRollout
from aapt.streaming.noise import Noise
from aapt.streaming.rollout import decode_frames, roll_out
from aapt.streaming.student import StudentRollout
from aapt.vae import CausalVAE, VAEConfig
from aapt.vae.pixels import to_pixels

from ..helpers import CONFIG, PROMPTS, SIZE, controls, latents, tiny_model

HEIGHT, WIDTH = 4 * SIZE[0], 4 * SIZE[1]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = VAEConfig((8, 8, 8), (8, 8, 8), (1, 1, 1), (1, 1, 1), ((2, 2), (2, 2)), 4)
    return CausalVAE(config).requires_grad_(False)


def batch(frames=3, **changes):
    parts = {"latents": latents(1 + frames).float(), "motion": controls(frames).float()}
    return ClipBatch(**parts | {"prompts": PROMPTS, "windows": [(0, 0), (1, 0)]} | changes)


def model(**changes):
    return tiny_model(**changes).float().requires_grad_(False)


def frames_of(sheet, columns, rows):
    """The frames of a sheet, (rows, columns, H, W, 3), at their own size."""
    pixels, scale = np.asarray(sheet), 160 // HEIGHT
    height, width = scale * HEIGHT, scale * WIDTH
    left = pixels.shape[1] - columns * (width + 1)
    top = pixels.shape[0] - rows * (height + 1) - (rows // 2 - 1) * 4
    return np.stack(
        [
            [
                pixels[y : y + height : scale, x : x + width : scale]
                for x in (left + column * (width + 1) for column in range(columns))
            ]
            for y in (top + row * (height + 1) + row // 2 * 4 for row in range(rows))
        ]
    )


def test_a_rollout_is_the_streaming_path_with_noise_per_stream():
    net, given = model(), batch()
    condition, *text = net.conditions(given.motion, given.prompts, SIZE)
    first = given.latents[:, :, :1]
    made = list(roll_out(net, first, text, lambda n: condition[:, :, n - 1 : n], 3, seed=5))
    assert len(made) == 4 and made[0] is first

    rollout = StudentRollout(net.transformer, *text, first)
    noises = [Noise((5 << 20) + i, first[:1].shape) for i in range(2)]
    noise = torch.stack([torch.cat([noise(step) for noise in noises]) for step in range(3)])
    expected = rollout.roll(torch.cat(list(noise), dim=2), condition).output
    assert torch.allclose(torch.cat(made[1:], dim=2), expected, atol=1e-6)

    alone = [part[:1] for part in text]
    single = roll_out(net, first[:1], alone, lambda n: condition[:1, :, n - 1 : n], 3, seed=5)
    assert torch.allclose(list(single)[3], made[3][:1], atol=1e-5)


def test_a_diffusion_model_is_rolled_out_with_the_same_noise():
    """The reference is its sampler, step by step. One pass per frame gives another video."""
    net, given, sampling = model(), batch(), SamplingConfig(steps=2, shift=6.0, guidance=3.0)
    condition, *text = net.conditions(given.motion, given.prompts, SIZE)
    first, rays = given.latents[:, :, :1], condition.split(1, dim=2)
    made = list(roll_out(net, first, text, lambda n: rays[n - 1], 3, 5, sampling))

    empty = net.text_encoder([""] * 2)
    rollout = DiffusionRollout(net.transformer, *text, empty, first, sampling)
    noises = [Noise((5 << 20) + i, first[:1].shape) for i in range(2)]
    latent = first
    for frame in range(3):
        noise = torch.cat([noise(frame) for noise in noises])
        latent = rollout.step(noise, latent, rays[frame])
        torch.testing.assert_close(made[frame + 1], latent)
    one_pass = list(roll_out(net, first, text, lambda n: rays[n - 1], 3, seed=5))
    assert (made[1] - one_pass[1]).abs().max() > 0.1


def test_decoding_frame_by_frame_is_decoding_the_clip(vae):
    clip = latents(4).float()
    whole = to_pixels(vae.decode(clip))
    parts = [pixels for _, pixels in decode_frames(vae, clip.split(1, dim=2), range(4))]
    assert [part.shape[1] for part in parts] == [1, 4, 4, 4]
    assert (torch.cat(parts, dim=1).int() - whole.int()).abs().max() <= 1


def test_wanted_frames_are_those_of_the_whole_stream(vae):
    clip = latents(14).float()
    whole = dict(decode_frames(vae, clip.split(1, dim=2), range(14)))
    for wanted in ({0, 3, 4, 11}, {13}):
        parts = dict(decode_frames(vae, clip.split(1, dim=2), wanted))
        assert set(parts) == wanted
        for number, pixels in parts.items():
            assert (pixels.int() - whole[number].int()).abs().max() <= 1


def test_the_sheet_shows_the_truth_over_the_model(vae):
    given, columns = batch(), (0, 1, 3)
    sheet = sample_sheet(model(), vae, given, columns, seed=0)
    shown = frames_of(sheet, columns=3, rows=4)
    truth = to_pixels(vae.decode(given.latents))[:, [0, 4, 12]].numpy()
    assert np.abs(shown[0::2].astype(int) - truth).max() <= 1
    assert np.array_equal(shown[1::2, 0], shown[0::2, 0])  # both begin with the user's frame
    assert (shown[1::2, 1:] != shown[0::2, 1:]).any()


def test_the_same_seed_gives_the_same_sheet(vae):
    given = batch()
    first, again = (sample_sheet(model(), vae, given, (0, 3), seed=1) for _ in range(2))
    other = sample_sheet(model(), vae, given, (0, 3), seed=2)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_past_the_clip_the_motion_starts_over_and_the_truth_is_blank(vae):
    given = batch(frames=2)
    repeated = batch(frames=4, motion=given.motion.repeat(1, 2, 1))
    repeated.latents[:, :, :3] = given.latents
    short, long = (
        frames_of(sample_sheet(model(), vae, b, (0, 4)), 2, 4) for b in (given, repeated)
    )
    assert np.array_equal(short[1::2], long[1::2])
    assert short[0::2, 1].max() == 0 and long[0::2, 1].max() > 0


def test_the_sheet_of_a_diffusion_model_is_sampled(vae):
    """Its frames come from a rollout of many passes per frame."""
    net, given, sampling = model(), batch(), SamplingConfig(steps=3, shift=6.0, guidance=3.0)
    shown = frames_of(sample_sheet(net, vae, given, (0, 1, 3), seed=5, sampling=sampling), 3, 4)
    condition, *text = net.conditions(given.motion, given.prompts, SIZE)
    rays = condition.split(1, dim=2)
    first = given.latents[:, :, :1]
    made = list(roll_out(net, first, text, lambda n: rays[n - 1], 3, 5, sampling))
    expected = to_pixels(vae.decode(torch.cat(made, dim=2)))[:, [0, 4, 12]].numpy()
    assert np.abs(shown[1::2].astype(int) - expected).max() <= 1
    one_pass = frames_of(sample_sheet(net, vae, given, (0, 1, 3), seed=5), 3, 4)
    assert np.array_equal(one_pass[0::2], shown[0::2])
    assert np.abs(one_pass[1::2, 1:].astype(int) - shown[1::2, 1:]).max() > 10


def test_a_model_without_motion_is_shown_too(vae):
    net = WorldModel(dataclasses.replace(CONFIG, condition_channels=0), None).requires_grad_(False)
    sheet = sample_sheet(net, vae, batch(motion=None), (0, 2))
    assert frames_of(sheet, 2, 4).std() > 1


def test_training_continues_after_a_sheet(vae):
    net = tiny_model().float()
    sample_sheet(net, vae, batch(), (0, 2))
    given = batch()
    condition, text, lens = net.conditions(given.motion, given.prompts, SIZE)
    t = torch.ones(2)
    net.transformer(given.targets, given.recycled, condition, text, lens, t).sum().backward()
    assert net.transformer.video_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("columns", [(), (-1, 3)])
def test_wrong_frames_are_refused(vae, columns):
    with pytest.raises(ValueError, match=r"frames: expected latent frames from 0 on, got \["):
        sample_sheet(model(), vae, batch(), columns)


def test_labels_of_a_sheet_have_room():
    frames = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    short, long = (contact_sheet([[(label, frames)]], ["0 s"]) for label in ("a", "a" * 40))
    assert long.width > short.width + 100
