"""The light decoder stage: its losses, and the weights that move and do not move."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aapt.data.clips import VideoClips
from aapt.training.losses import flicker_loss, reconstruction_loss, sharpened
from aapt.training.optimization import Schedule
from aapt.training.stages.light_decoder import (
    LightDecoderConfig,
    LightDecoderTraining,
    PatchAdversary,
    PatchDiscriminator,
    generator_noise,
    light_vae_for,
)
from aapt.vae import CausalVAE, VAEConfig, light, lighter, original, wan

from ..helpers import draws
from ..runs.counting import train

SHAPE = VAEConfig(
    encoder_channels=(4, 8, 8),
    decoder_channels=(4, 8, 8),
    encoder_blocks=(0, 1, 0),
    decoder_blocks=(0, 2, 0),
    strides=((2, 2), (2, 1)),
    latent_channels=4,
    patch_size=4,
    time_kernels=(3, 1),
    upsample="shuffle",
)
CONFIG = LightDecoderConfig(Schedule(1e-2), steps=3, batch=2, video_frames=5, max_norm=100.0)
ADVERSARY = PatchAdversary(Schedule(1e-2), weight=0.5, width=4, depth=2)


def original_vae(shape: VAEConfig = SHAPE) -> CausalVAE:
    """Random everywhere: residual blocks start out as the identity."""
    torch.manual_seed(0)
    vae = CausalVAE(shape)
    for parameter in vae.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    vae.latent_mean.normal_()
    vae.latent_std.uniform_(0.5, 2.0)
    return vae


def stage(perceptual=None, **changes) -> LightDecoderTraining:
    vae = original_vae()
    torch.manual_seed(1)
    light_vae = light_vae_for(vae, lighter(SHAPE))
    return LightDecoderTraining(replace(CONFIG, **changes), vae, light_vae, perceptual)


def videos() -> VideoClips:
    torch.manual_seed(2)
    return VideoClips(torch.randint(256, (2, 9, 16, 16, 3), dtype=torch.uint8), 2)


def test_fewer_clips_than_there_could_be():
    """A source may end early; its clips are kept in order, as one tensor."""
    clips = torch.randint(256, (3, 5, 2, 2, 3), dtype=torch.uint8)
    made = VideoClips(iter(clips), 7).videos
    assert made.dtype == torch.uint8 and torch.equal(made, clips)


def test_reconstruction_of_a_known_error():
    error = torch.zeros(1, 1, 1, 2, 3)
    error[..., 0, 0] = 0.5
    # Six pixels; one of four differences across, one of three down.
    expected = 0.5 / 6 + 2 * 0.25 / 6 + 3 * (0.5 / 4 + 0.5 / 3)
    loss = reconstruction_loss(error, squares=2.0, edges=3.0)
    assert loss.item() == pytest.approx(expected)


def test_flicker_is_how_the_error_changes():
    error = torch.zeros(1, 1, 3, 1, 2)
    error[0, 0, :, 0, 0] = torch.tensor([0.0, 0.5, 0.25])
    assert flicker_loss(error).item() == pytest.approx((0.5 + 0.25) / 4)


def test_sharpening_adds_the_difference_to_the_blurred_images():
    video = torch.rand(2, 3, 4, 5, 6)
    made = sharpened(video, 0.5)
    for x, y in ((0, 0), (2, 3), (4, 5)):
        blurred = 0.0
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                share = (2 - abs(i)) * (2 - abs(j)) / 16
                inside = video[..., min(max(x + i, 0), 4), min(max(y + j, 0), 5)]
                blurred = blurred + share * inside
        here = video[..., x, y]
        assert torch.allclose(made[..., x, y], here + 0.5 * (here - blurred), atol=1e-6)
    assert torch.equal(sharpened(video, 0.0), video)


def test_a_decoder_learns_sharpened_clips(monkeypatch):
    """Its PSNR is still that of the clips themselves."""
    made, shown = stage(sharpening=0.7, latent_noise=0.0), []
    losses = made.losses

    def record(decoded, video, target):
        shown.append((decoded.detach(), video))
        return losses(decoded, video, target)

    monkeypatch.setattr(made, "losses", record)
    metrics = made.accumulate({"clips": videos()}, draws(2), 0)
    clips = videos().sample(draws(2), made.config.video_frames)
    ((decoded, wanted),) = shown
    assert torch.equal(wanted, sharpened(clips, 0.7))
    error = (decoded - clips).square().mean().item()
    assert metrics["psnr"] == pytest.approx(-10 * math.log10(error / 4), rel=1e-5)


def test_equal_motion_does_not_flicker():
    """Whatever the images look like."""
    video = torch.randn(2, 3, 5, 4, 4)
    other = video + torch.randn(2, 3, 1, 4, 4)
    assert flicker_loss(other - video).item() == pytest.approx(0, abs=1e-6)
    assert flicker_loss(other.flip(2) - video).item() > 0.1


def test_the_paper_s_light_decoder():
    expected = replace(
        original(), decoder_channels=(64, 128, 256, 512), decoder_blocks=(2, 2, 2, 2)
    )
    assert light() == expected
    assert lighter(wan()).decoder_channels == (48, 96, 192, 384)
    assert lighter(SHAPE).decoder_blocks == (0, 1, 0)


def test_light_has_the_original_s_encoder_and_what_fits_of_its_decoder():
    vae = original_vae()
    made = light_vae_for(vae, lighter(SHAPE)).state_dict()
    theirs = vae.state_dict()
    kept = {name for name in made if name.startswith(("encoder", "latent_"))}
    for name in kept | {"decoder.conv_in.weight"}:
        assert torch.equal(made[name], theirs[name]), name
    assert made["decoder.conv_out.weight"].shape != theirs["decoder.conv_out.weight"].shape
    assert made["latent_mean"].data_ptr() != theirs["latent_mean"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 8}, "latent_channels: expected 4, as the original has, got 8"),
        ({"encoder_blocks": (0, 0, 0)}, r"encoder_blocks: expected \(0, 1, 0\), as the original"),
        ({"strides": ((1, 2), (2, 1))}, r"strides: expected \(\(2, 2\), \(2, 1\)\)"),
        ({"padding": "replicate"}, "padding: expected zeros, as the original has"),
        ({"norm_eps": 1e-3}, "norm_eps: expected 1e-06, as the original has, got 0.001"),
    ],
)
def test_a_shape_of_another_encoder(change, message):
    with pytest.raises(ValueError, match=message):
        light_vae_for(original_vae(), replace(SHAPE, **change))


def test_losses_have_the_weights_of_the_recipe():
    """The reference sums the definitions in float64, for videos with known errors."""
    made = stage(lambda video, target: (video - target).square().sum(), imitation=3.0, flicker=5.0)
    made.config = replace(made.config, perceptual=7.0, squares=0.5, edges=0.25, seams=11.0)
    torch.manual_seed(3)
    decoded, video, target = torch.randn(3, 2, 3, 5, 16, 16)

    def reconstruction(error):
        across = (error[..., 1:] - error[..., :-1]).abs().mean()
        down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        return error.abs().mean() + 0.5 * (error**2).mean() + 0.25 * (across + down)

    error = decoded.double() - video.double()
    moved = (decoded[:, :, 1:] - decoded[:, :, :-1]) - (video[:, :, 1:] - video[:, :, :-1])
    cell = made.light.config.space_factor
    borders = range(cell, 16, cell)
    steps = sum(
        torch.stack([(error[..., x] - error[..., x - 1]).abs().mean() for x in borders]).mean()
        for error in (error, error.transpose(3, 4))
    )
    expected = {
        "reconstruction": reconstruction(error),
        "imitation": 3 * reconstruction(decoded.double() - target.double()),
        "seams": 11 * steps,
        "flicker": 5 * moved.double().abs().mean(),
        "perceptual": 7 * (error**2).sum(),
    }
    losses = made.losses(decoded, video, target)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_terms_of_no_weight_are_not_there():
    losses = stage(imitation=0.0, flicker=0.0).losses(*torch.zeros(3, 1, 3, 5, 8, 8))
    assert set(losses) == {"reconstruction"}


@pytest.mark.parametrize("adversary", [None, ADVERSARY])
def test_only_the_light_decoder_moves(adversary):
    made = stage(adversary=adversary)
    frozen = {name: x.clone() for name, x in made.original.state_dict().items()}
    before = {name: x.clone() for name, x in made.light.state_dict().items()}
    train(made, 2, videos())
    for name, tensor in made.original.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    exported = made.export().state_dict()
    moved = {name for name, tensor in exported.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in exported if name.startswith("decoder.")}


def test_it_learns_one_clip():
    made = stage(latent_noise=0.0, steps=40)
    seen = train(made, 40, videos())
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
    assert seen[-1]["psnr"] > seen[0]["psnr"]


def test_a_light_decoder_equal_to_the_original_imitates_it():
    """Both decode the same noisy latents."""
    vae = original_vae()
    same = light_vae_for(vae, SHAPE)
    made = LightDecoderTraining(replace(CONFIG, latent_noise=2.0), vae, same)
    seen = made.accumulate({"clips": videos()}, draws(2), 0)
    assert seen["imitation"] == 0
    assert seen["psnr"] == seen["original_psnr"]


def test_latents_are_as_noisy_as_asked(monkeypatch):
    made = stage(latent_noise=0.5)
    data, shown, decode = videos(), [], made.light.decode
    monkeypatch.setattr(made.light, "decode", lambda latent: shown.append(latent) or decode(latent))
    made.accumulate({"clips": data}, draws(2), 0)
    with torch.no_grad():
        clean = made.original.encode(data.sample(draws(2), CONFIG.video_frames))
    strengths = (shown[0].float() - clean).std(dim=(1, 2, 3, 4))
    # Rounding of bfloat16 networks is below the least noise that is drawn here.
    assert (strengths < 0.55).all() and strengths.max() > 0.05


def test_noise_by_token_is_one_for_its_latent_pixels():
    shape = (16, 5, 7, 9)  # tokens at the end are cut
    white = generator_noise(draws(4), shape, 0.0)
    assert torch.equal(white, draws(4).normal(*shape))
    tokens = generator_noise(draws(4), shape, 0.5) - white
    assert tokens.std().item() == pytest.approx(0.5, abs=0.02)
    whole = tokens[..., :6, :8].unflatten(-1, (4, 2)).unflatten(-3, (3, 2))
    torch.testing.assert_close(whole, whole[..., :1, :, :1].expand_as(whole), rtol=0, atol=1e-6)
    assert (tokens[..., 2:, :] - tokens[..., :-2, :]).std() > 0.5


def test_the_discriminator_learns_what_is_real():
    made = stage(adversary=replace(ADVERSARY, weight=0.0, penalty=0.0), steps=60)
    seen = train(made, 60, videos())
    assert seen[0]["discriminator"] == pytest.approx(0.693, abs=0.05)  # log 2
    assert seen[-1]["discriminator"] < 0.3
    assert seen[-1]["accuracy"] == 1
    assert all("discriminator_gradient" in update for update in seen)


def test_the_decoder_hears_the_discriminator_after_its_warmup():
    made = stage(adversary=replace(ADVERSARY, warmup=1))
    first, second = train(made, 2, videos())
    assert "adversarial" not in first and "adversarial" in second
    terms = ("reconstruction", "imitation", "flicker", "adversarial")
    assert second["loss"] == pytest.approx(sum(second[term] for term in terms))


def test_the_adversarial_loss_is_relativistic_and_reaches_the_decoder_alone():
    made = stage(adversary=ADVERSARY)
    torch.manual_seed(4)
    video, decoded = torch.randn(2, 1, 3, 5, 8, 8)
    decoded.requires_grad_(True)
    loss = made.realism(video, decoded)
    with torch.no_grad():
        expected = F.softplus(made.logits(video) - made.logits(decoded)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert decoded.grad.any()
    assert all(parameter.grad is None for parameter in made.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in made.discriminator.parameters())


def test_the_penalty_is_on_the_discriminator_s_slope():
    """The penalty of a discriminator that sums its input is sigma^2 times the summands."""
    made = stage(adversary=replace(ADVERSARY, penalty=3.0, perturbation=0.1))
    made.discriminator = nn.Module()
    made.discriminator.scale = nn.Parameter(torch.ones(()))
    made.discriminator.forward = lambda video: (
        made.discriminator.scale * video.sum(dim=(1, 2, 3, 4))
    )
    video = torch.zeros(64, 3, 5, 8, 8)
    metrics = made.train_discriminator(video, video, draws(64), 1.0)
    count = 3 * 5 * 8 * 8
    assert metrics["penalty"] == pytest.approx(2 * 3.0 * 0.1**2 * count, rel=0.25)
    assert made.discriminator.scale.grad.item() == pytest.approx(2 * metrics["penalty"], rel=0.05)


def test_patches():
    discriminator = PatchDiscriminator(width=4, depth=2)
    video = torch.randn(2, 3, 5, 16, 24)
    logits = discriminator(video)
    assert logits.shape == (2, 5, 4, 6)
    other = video.clone()
    other[..., :8, :8] += 1
    assert torch.equal(discriminator(other)[..., 3:, 4:], logits[..., 3:, 4:])
    assert not torch.allclose(discriminator(other)[..., :1, :1], logits[..., :1, :1])
