"""The decoder in bfloat16 through the sm_90a kernels, simulated: every chunk plan gives the same
bits, streams stay apart, and the pictures are those of float32."""

from dataclasses import replace

import pytest
import torch

from aapt.vae import CausalVAE, DecoderStream, layers, light, wan
from aapt_kernels import backend, causal_conv3d, use_backend

pytestmark = pytest.mark.skipif(bool(backend.no_sim()), reason=str(backend.no_sim()))

SMALL = dict(encoder_channels=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
CONFIGS = {
    "nearest": replace(light(), decoder_channels=(8, 16), strides=((2, 2),), **SMALL),
    "separate": replace(wan(8), decoder_channels=(8, 16), strides=((2, 2),), **SMALL),
    "light": replace(light(), decoder_channels=(8, 16, 32, 64)),
    "wan": wan(8),
}
NAMES = ["nearest", "separate"]
NAMES += [pytest.param(name, marks=pytest.mark.slow) for name in ("light", "wan")]


def make_vae(name):
    """Random everywhere; only the decoder is needed."""
    torch.manual_seed(0)
    vae = CausalVAE(CONFIGS[name]).requires_grad_(False)
    for parameter in vae.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.copy_(spread * torch.randn(parameter.shape) + (parameter.mean() == 1))
    return vae


def decode(vae, latent, plan, pixels=False):
    video, state = [], None
    for chunk in latent.split(list(plan), dim=2):
        frames, state = vae.decode_frame(chunk, state, pixels=pixels)
        video.append(frames)
    return torch.cat(video, dim=2)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_any_length_give_the_same_bits(name):
    vae = make_vae(name).bfloat16()
    latent = torch.randn(1, 16, 4, 2, 2).bfloat16()
    with use_backend("sim"):
        whole = decode(vae, latent, (4,))
        for plan in ((1, 1, 1, 1), (1, 3), (1, 2, 1)):
            assert torch.equal(decode(vae, latent, plan), whole)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_float32(name):
    vae = make_vae(name)
    latent = torch.randn(1, 16, 2, 3, 2).bfloat16()
    wanted = decode(vae, latent.float(), (2,))
    vae = vae.bfloat16()
    with torch.no_grad(), use_backend("sim"):
        video = decode(vae, latent, (2,))
        pixels = decode(vae, latent, (1, 1), pixels=True)
    with use_backend("reference"):
        plain = decode(vae, latent, (2,))
    error, usual = (v.float().sub(wanted).square().mean().sqrt() for v in (video, plain))
    assert error <= 1.5 * usual
    levels = (video.float() * 127.5 + 127.5).clamp(0, 255)
    spacing = 127.5 * torch.finfo(torch.bfloat16).eps * video.abs().max().float()
    assert (pixels - levels).abs().max() <= 0.5 + spacing  # the video has been rounded


@pytest.mark.parametrize("name", ["nearest", "separate"])
def test_norms_run_behind_the_convolution_before(monkeypatch, name):
    """All but the first of them."""
    vae = make_vae(name).bfloat16()
    convs = [m for m in vae.decoder.modules() if isinstance(m, layers.CausalConv3d)]
    normed = [m for m in convs if m.norm_weight is not None and m.silu]
    in_front, behind = [], []

    def spy(x, *args, **options):
        in_front.append(options.get("norm_weight") is not None and options["silu"])
        behind.append(options.get("next_norm_weight") is not None)
        return causal_conv3d(x, *args, **options)

    monkeypatch.setattr(layers, "causal_conv3d", spy)
    latent = torch.randn(1, 16, 1, 2, 1).bfloat16()
    with use_backend("sim"):
        decode(vae, latent, (1,))
    assert sum(in_front) + sum(behind) == len(normed)
    assert sum(in_front) == 1
    behind.clear()
    with use_backend("cpu"):
        decode(vae, latent, (1,))
    assert not any(behind)


def test_interleaved_streams_equal_each_alone():
    vae = make_vae("nearest").bfloat16()
    latents = torch.randn(2, 1, 16, 2, 2, 2).bfloat16()
    with use_backend("sim"):
        alone = [decode(vae, latent, (1, 1)) for latent in latents]
        states, videos = [None, None], ([], [])
        for frame in range(2):
            for stream in (0, 1):
                chunk = latents[stream][:, :, frame : frame + 1]
                video, states[stream] = vae.decode_frame(chunk, states[stream])
                videos[stream].append(video)
    for stream in (0, 1):
        assert torch.equal(torch.cat(videos[stream], dim=2), alone[stream])


@pytest.mark.parametrize("name", ["nearest", "separate"])
def test_a_stream_in_fixed_memory_gives_the_same_bits(name):
    vae = make_vae(name).bfloat16()
    latent = torch.randn(1, 16, 3, 2, 2).bfloat16()
    with use_backend("sim"):
        stream = DecoderStream(vae, latent[:, :, :1].shape)
        pixels = torch.cat([stream.decode(frame) for frame in latent.split(1, dim=2)], dim=2)
        assert torch.equal(pixels, decode(vae, latent, (1, 1, 1), pixels=True))
