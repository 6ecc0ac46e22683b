"""Tokens that are not square, and models that grow from one with larger tokens."""

from dataclasses import asdict, replace

import pytest
import torch

from aapt.checkpoint import CheckpointError, save_config, save_module
from aapt.model.config import ModelConfig
from aapt.model.world_model import WorldModel

CONFIG = ModelConfig(
    width=16,
    heads=1,
    head_dim=16,
    depth=1,
    text_width=8,
    text_tokens=4,
    window_frames=2,
    reference_grid=(2, 2),
    rope_axes=(4, 6, 6),
    latent_channels=3,
    patch=(2, 4),
)
PATCHES = [(2, 4), (1, 2), (2, 1), 1]


def world(config, seed=0):
    """A model with every weight drawn."""
    torch.manual_seed(seed)
    model = WorldModel(config, None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    save_module(folder / "model.safetensors", world(CONFIG))
    save_config(folder, {"model": asdict(CONFIG)})
    return folder


def grown(large, patch, **changes):
    model = world(replace(CONFIG, patch=patch, **changes), seed=1)
    model.load_grown(large)
    return model


def tokens(model, latents):
    """Embedded tokens on their grid, (B, T, rows, columns, width)."""
    flat = model.transformer.patchify(latents, latents, None, torch.arange(latents.shape[2]))
    grid = model.config.token_grid(*latents.shape[-2:])
    return flat.unflatten(1, (latents.shape[2], *grid))


@pytest.mark.parametrize("patch", PATCHES)
def test_a_token_reads_its_pixels(large, patch):
    """Each token is the linear map of its rows and columns, row by row, channels last."""
    model = grown(large, patch)
    p, q = model.config.patch_shape
    latents = torch.randn(2, 3, 2, 4, 8)
    made = tokens(model, latents)
    assert made.shape[2:4] == (4 // p, 8 // q)
    for row, column in ((0, 0), (4 // p - 1, 8 // q - 2)):
        part = latents[1, :, 1, p * row : p * (row + 1), q * column : q * (column + 1)]
        pixels = torch.cat([part, part]).permute(1, 2, 0).flatten()
        expected = model.transformer.video_in(pixels)
        assert torch.allclose(made[1, 1, row, column], expected, atol=1e-5)


@pytest.mark.parametrize("patch", PATCHES)
def test_constant_patches_are_embedded_as_before(large, patch):
    model, before = grown(large, patch), world(CONFIG)
    latents = torch.randn(1, 3, 2, 2, 2).repeat_interleave(2, 3).repeat_interleave(4, 4)
    p, q = model.config.patch_shape
    expected = tokens(before, latents).repeat_interleave(2 // p, 2).repeat_interleave(4 // q, 3)
    assert torch.allclose(tokens(model, latents), expected, atol=1e-5)


@pytest.mark.parametrize("patch", PATCHES)
def test_an_output_is_the_mean_of_the_larger_token_s(large, patch):
    model, before = grown(large, patch), world(CONFIG)
    p, q = model.config.patch_shape
    features = torch.randn(5, 16)
    whole = before.transformer.video_out(features).view(5, 2 // p, p, 4 // q, q, 3)
    expected = whole.mean(dim=(1, 3)).flatten(1)
    assert torch.allclose(model.transformer.video_out(features), expected, atol=1e-5)


def test_a_model_of_equal_tokens_is_the_former_one(large):
    state, former = grown(large, (2, 4)).state_dict(), world(CONFIG).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in former.items())


def test_what_cannot_grow(large):
    with pytest.raises(CheckpointError, match="expected tokens of multiples of 3 x 1 latent"):
        grown(large, (3, 1))
    with pytest.raises(CheckpointError, match="expected"):
        grown(large, (1, 1), depth=2)


def test_sizes_and_errors():
    config = replace(CONFIG, patch=(1, 2))
    assert (config.patch_area, config.token_grid(5, 8)) == (2, (5, 4))
    with pytest.raises(ValueError, match="latent size: expected multiples of 1 and 2, got 5 x 7"):
        config.token_grid(5, 7)
    for patch in (0, (1, 0), (1, 2, 1)):
        with pytest.raises(ValueError, match=r"patch: expected 1 or more, or two such, \(rows, co"):
            replace(CONFIG, patch=patch)
