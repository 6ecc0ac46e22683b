"""Wan 2.1's weights in our network: the same latents and pictures as diffusers' module."""

import json

import pytest
import torch

from aapt.checkpoint import CheckpointError, read_tensors, save_tensors
from aapt.vae import CausalVAE, load_wan, wan
from aapt.vae.wan_weights import WEIGHTS

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def theirs():
    """Random everywhere: at initialisation norms are one and biases small."""
    torch.manual_seed(0)
    module = diffusers.AutoencoderKLWan(base_dim=8).requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        spread = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.normal_(std=spread)
        if name.endswith("gamma"):
            parameter += 1
    return module


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return load_wan(folder).requires_grad_(False)


def statistics(theirs):
    """Mean and deviation of the latents, as broadcast over them."""
    config = theirs.config
    return (torch.tensor(x).view(1, 16, 1, 1, 1) for x in (config.latents_mean, config.latents_std))


def assert_close(actual, float32, exact):
    """Our decoder is as near to float64 as diffusers is itself, within a factor."""
    error, plain = ((x.double() - exact).abs().max() for x in (actual, float32))
    assert error <= 4 * plain + 1e-6 * exact.abs().max()
    assert plain < 1e-3 * exact.abs().max()


def in_float64(theirs, function):
    theirs.double()
    try:
        return function()
    finally:
        theirs.float()


@pytest.mark.parametrize("frames, height, width", [(1, 16, 24), (9, 24, 16), (5, 8, 40)])
def test_encoding(theirs, ours, frames, height, width):
    video = torch.randn(2, 3, frames, height, width)
    float32 = theirs.encode(video).latent_dist.mean
    exact = in_float64(theirs, lambda: theirs.encode(video.double()).latent_dist.mean)
    mean, std = statistics(theirs)
    assert_close(ours.encode(video) * std + mean, float32, exact)


@pytest.mark.parametrize("plan", [(1, 1, 1, 1), (1, 3), (2, 2), (4,)], ids=str)
def test_streaming_decoding(theirs, ours, plan):
    latent = torch.randn(2, 16, sum(plan), 3, 5)
    float32 = theirs.decode(latent).sample
    exact = in_float64(theirs, lambda: theirs.decode(latent.double()).sample)
    mean, std = statistics(theirs)
    state, video = None, []
    for chunk in latent.split(plan, dim=2):
        frames, state = ours.decode_frame((chunk - mean) / std, state)
        video.append(frames)
    assert_close(torch.cat(video, dim=2).clamp(-1, 1), float32, exact)


def test_published_shape():
    """Parameters of the published network, without its encoder's projection, folded into the last
    convolution, and without the variance that this gives beside the mean."""
    with torch.device("meta"):
        ours = CausalVAE(wan())
        theirs = diffusers.AutoencoderKLWan()
    dropped = sum(p.numel() for p in theirs.quant_conv.parameters())
    dropped += sum(p.numel() for p in theirs.encoder.conv_out.parameters()) // 2
    counts = [sum(p.numel() for p in module.parameters()) for module in (ours, theirs)]
    assert counts[0] + dropped == counts[1]


def rewritten(folder, tmp_path, change_config=None, change_tensors=None):
    config = json.loads((folder / "config.json").read_text())
    tensors = read_tensors(folder / WEIGHTS)
    if change_config:
        change_config(config)
    if change_tensors:
        change_tensors(tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_tensors(tmp_path / WEIGHTS, tensors)
    return tmp_path


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: expected a Wan VAE's configuration"):
        load_wan(tmp_path)

    def load(**changes):
        return load_wan(rewritten(folder, tmp_path, **changes))

    with pytest.raises(CheckpointError, match=r"is_residual: expected False, as in Wan 2.1"):
        load(change_config=lambda config: config.update(is_residual=True))
    with pytest.raises(
        CheckpointError, match="expected tensor post_quant_conv.bias, which is miss"
    ):
        load(change_tensors=lambda tensors: tensors.pop("post_quant_conv.bias"))
    with pytest.raises(CheckpointError, match="tensor surplus belongs to no parameter"):
        load(change_tensors=lambda tensors: tensors.update(surplus=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"conv_in.weight: expected \(32, 16, 3, 3, 3\), got"):
        load(
            change_tensors=lambda tensors: tensors.update(
                {"decoder.conv_in.weight": torch.zeros(32, 16, 3, 3, 1)}
            )
        )
    (tmp_path / WEIGHTS).write_bytes(b"\x00" * 5)
    with pytest.raises(CheckpointError, match="truncated or foreign file"):
        load_wan(tmp_path)
