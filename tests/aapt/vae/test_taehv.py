"""TAEHV's decoders in our network, against their published arithmetic written out here."""

import pytest
import torch
import torch.nn.functional as F

from aapt.checkpoint import CheckpointError, save_config, save_tensors
from aapt.vae import CausalVAE, DecoderStream, decoder_work, load_taehv, taehv, wan, wan22
from aapt.vae.folder import load_vae, save_vaes, with_decoder

from .test_autoencoder import make_vae

CHANNELS = (256, 128, 64, 64)
SCALES = ((3, 1), (9, 2), (15, 2))  # place of the first of three blocks, frames per frame after


def tensors_of(latent_channels: int, patch: int) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes of madebyollin/taehv, taehv.py."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def conv(name, out, inner, kernel=3, bias=True):
        shape = (out, inner, kernel, kernel)
        spread = (inner * kernel**2) ** -0.5
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * spread
        if bias:
            tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    conv("decoder.1", CHANNELS[0], latent_channels)
    for (place, time), width, narrow in zip(SCALES, CHANNELS, CHANNELS[1:]):
        for block in range(place, place + 3):
            conv(f"decoder.{block}.conv.0", width, 2 * width)
            conv(f"decoder.{block}.conv.2", width, width)
            conv(f"decoder.{block}.conv.4", width, width)
        conv(f"decoder.{place + 4}.conv", time * width, width, kernel=1, bias=False)
        conv(f"decoder.{place + 5}", narrow, width, bias=False)
    conv("decoder.22", 3 * patch**2, CHANNELS[-1])
    conv("encoder.0", 64, 3 * patch**2)  # is left alone
    return tensors


def plain_decoder(tensors, latent, patch, dtype=torch.float64):
    """Their `decode_video(parallel=True)` on (T, C, h, w), in [0, 1] without its clamp."""
    w = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def conv(name, x):
        kernel = w[f"{name}.weight"]
        return F.conv2d(x, kernel, w.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    x = torch.tanh(latent.to(dtype) / 3) * 3
    x = F.relu(conv("decoder.1", x))
    for place, time in SCALES:
        for block in range(place, place + 3):
            past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            y = torch.cat([x, past], dim=1)
            y = F.relu(conv(f"decoder.{block}.conv.0", y))
            y = F.relu(conv(f"decoder.{block}.conv.2", y))
            x = F.relu(conv(f"decoder.{block}.conv.4", y) + x)
        x = F.interpolate(x, scale_factor=2)
        x = conv(f"decoder.{place + 4}.conv", x)
        x = x.reshape(len(x) * time, -1, *x.shape[2:])
        x = conv(f"decoder.{place + 5}", x)
    x = conv("decoder.22", F.relu(x))
    return F.pixel_shuffle(x, patch)[3:]


@pytest.fixture(scope="module", params=[(16, 1), (48, 2)], ids=["taew2_1", "taew2_2"])
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(shape):
    return tensors_of(*shape)


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("taehv") / "taew.pth"
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("plan", [(4,), (1, 1, 1, 1), (1, 3), (2, 2)], ids=str)
def test_chunks_equal_the_published_decoder(shape, tensors, path, plan):
    channels, patch = shape
    vae = load_vae(path, dtype=torch.float64)
    latent = torch.randn(1, channels, 4, 3, 2)
    expected = plain_decoder(tensors, latent[0].transpose(0, 1), patch)
    state, video = None, []
    for chunk in latent.double().split(plan, dim=2):
        frames, state = vae.decode_frame(chunk, state)
        video.append(frames)
    video = (torch.cat(video, dim=2)[0].transpose(0, 1) + 1) / 2
    assert video.shape == (13, 3, 3 * 8 * patch, 2 * 8 * patch)
    # The products of two layers were rounded to float32 when they were loaded
    assert (video - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_last_frames_and_a_stream(shape, path):
    vae = load_vae(path)
    latent = torch.randn(1, shape[0], 6, 2, 3)
    whole = vae.decode(latent)
    _, state = vae.decode_frame(latent[:, :, :1])
    video, _ = vae.decode_frame(latent[:, :, 1:], state, last=1)
    torch.testing.assert_close(video, whole[:, :, -4:], atol=1e-4, rtol=1e-4)
    stream = DecoderStream(vae, (1, shape[0], 1, 2, 3))
    pixels = torch.cat([stream.decode(frame).clone() for frame in latent.split(1, dim=2)], dim=2)
    levels = ((whole + 1) * 127.5).round().clamp(0, 255)
    assert (pixels.float() - levels).abs().max() <= 1


def test_bfloat16_is_no_further_from_float64_than_the_published_decoder(shape, tensors, path):
    latent = torch.randn(1, shape[0], 3, 3, 2).bfloat16()
    given = latent[0].transpose(0, 1)
    exact = plain_decoder(tensors, given, shape[1])
    theirs = plain_decoder(tensors, given, shape[1], torch.bfloat16)
    ours = (load_vae(path, dtype=torch.bfloat16).decode(latent)[0].transpose(0, 1) + 1) / 2
    errors = [(x.double() - exact).square().mean().sqrt() for x in (ours, theirs)]
    # Our pixels are in [-1, 1], so the last bias is near -1, where bfloat16 is coarser than near 0
    assert errors[0] <= 1.25 * errors[1]


def test_with_the_encoder_of_wan(shape, path, tmp_path):
    """The encoder and the statistics of one, the decoder of the other; on the disk as one."""
    vae = make_vae(wan(6) if shape[1] == 1 else wan22(6, 8))
    decoder = load_vae(path)
    with pytest.raises(ValueError, match="encoder: expected an autoencoder, got a decoder alone"):
        decoder.encode(torch.zeros(1, 3, 1, 32, 32))
    both = with_decoder(vae, decoder)
    save_config(tmp_path, save_vaes(tmp_path, {"vae": both}))
    both = load_vae(tmp_path)
    space = both.config.space_factor
    video, latent = torch.randn(1, 3, 5, space, 2 * space), torch.randn(1, shape[0], 2, 2, 3)
    assert torch.equal(both.encode(video), vae.encode(video))
    assert torch.equal(both.decode(latent), decoder.decode(latent))
    assert both.config.time_factor == 4
    # A pruned decoder of Wan's own kind
    light = make_vae((wan(2) if shape[1] == 1 else wan22(2, 4)).without_encoder())
    mixed = with_decoder(vae, light)
    assert torch.equal(mixed.encode(video), vae.encode(video))
    mixed.latent_mean.copy_(light.latent_mean)
    mixed.latent_std.copy_(light.latent_std)
    assert torch.equal(mixed.decode(latent), light.decode(latent))


def test_decoders_for_other_latents_are_refused(shape, path):
    other = wan22(2, 4) if shape[1] == 1 else wan(4)
    with pytest.raises(ValueError, match="decoder: expected latent_channels "):
        with_decoder(make_vae(other), load_vae(path))


def test_work_of_a_decoder():
    """A convolution does 2 operations per weight and output pixel."""
    works = decoder_work(taehv(), 64, 64)
    flops = 2 * 64 * 9 * 16 * 256  # the first convolution, on 8x8
    for width, size, frames in ((256, 8, 1), (128, 16, 1), (64, 32, 2)):
        flops += 3 * 2 * 9 * 4 * width**2 * size**2 * frames
    for out, inner, size, frames in ((128, 256, 16, 1), (2 * 64, 128, 32, 1), (2 * 64, 64, 64, 2)):
        flops += 2 * 9 * out * inner * size**2 * frames
    flops += 2 * 9 * 3 * 64 * 64**2 * 4
    assert sum(work.flops for work in works) == flops


def test_published_shape():
    """9.84 M parameters of LightX2V's and madebyollin's decoders; two products are one here."""
    with torch.device("meta"):
        ours = CausalVAE(taehv())
    theirs = sum(x.numel() for name, x in tensors_of(16, 1).items() if name[:2] == "de")
    assert round(theirs / 1e6, 2) == 9.84
    folded = 256**2 + 2 * 128**2 + 2 * 64**2  # their products per frame
    again = 9 * (64 * 128 + 64 * 64)  # a convolution for each of two frames
    zeros = 128 + 2 * 64 + 2 * 64  # biases that theirs has not
    assert sum(p.numel() for p in ours.parameters()) == theirs - folded + again + zeros


def test_bad_files_are_named(tensors, tmp_path):
    path = tmp_path / "taew.safetensors"

    def load(**changes):
        given = {name: x for name, x in {**tensors, **changes}.items() if x is not None}
        save_tensors(path, given)
        return load_vae(path)

    with pytest.raises(
        CheckpointError, match="expected tensor decoder.7.conv.weight, which is mis"
    ):
        load(**{"decoder.7.conv.weight": None})
    with pytest.raises(
        CheckpointError, match=r"decoder.3.conv.0.bias: expected \(256,\), got \(2,"
    ):
        load(**{"decoder.3.conv.0.bias": torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match="tensor decoder.3.skip.weight belongs to no paramete"
    ):
        load(**{"decoder.3.skip.weight": torch.zeros(2)})
    save_tensors(path, {"a": torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match="expected TAEHV's tensor decoder.1.weight, which is "
    ):
        load_taehv(path)
