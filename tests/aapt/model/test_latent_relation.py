"""Relations of two autoencoders' latents, and generators that grow through them."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from aapt.checkpoint import save_config, save_module
from aapt.model.config import ModelConfig
from aapt.model.latent_relation import NOISE, LatentRelation, fit_relation

from .test_growth import world

COARSE = ModelConfig(
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
    condition_channels=2,
    patch=2,
    residual_head=True,
)
FINE = replace(
    COARSE, latent_channels=2, patch=(2, 3), residual_map=True
)  # blocks of 2 x 3 pixels of 2 channels
NUMBERS = 12  # of a block


def planted(seed=0, frames=6):
    """Fine latents whose blocks give coarse latents exactly: both, the map and its offset."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(NUMBERS, NUMBERS))
    down, offset = random.normal(size=(3, NUMBERS)), random.normal(size=3)
    clips, rows, columns = 2, 3, 4
    fine = np.empty((clips, 2, frames, 2 * rows, 3 * columns))
    coarse = np.empty((clips, 3, frames, rows, columns))
    for clip, frame, row, column in np.ndindex(clips, frames, rows, columns):
        block = mixing @ random.normal(size=NUMBERS)
        coarse[clip, :, frame, row, column] = down @ block + offset
        for place, value in enumerate(block):
            (pixel_row, rest), channel = divmod(place // 2, 3), place % 2
            fine[clip, channel, frame, 2 * row + pixel_row, 3 * column + rest] = value
    return torch.tensor(coarse), torch.tensor(fine), torch.tensor(down), torch.tensor(offset)


def test_the_planted_map_is_found():
    coarse, fine, down, offset = planted()
    relation = fit_relation(coarse, fine)
    assert torch.allclose(relation.down.double(), down, atol=1e-5)
    assert torch.allclose(relation.offset.double(), offset, atol=1e-5)
    # A change of the coarse latents comes back through the map, and nothing else changes them.
    assert torch.allclose(relation.down @ relation.up, torch.eye(3), atol=0.02)
    assert (relation.down @ relation.stay).abs().max() < 0.02


def test_changes_are_estimated_with_the_least_error():
    """Noise on the blocks is drawn here; the fit knows its deviation alone."""
    coarse, fine, _, _ = planted(frames=60)
    relation = fit_relation(coarse, fine)
    pairs = []
    for row, column in np.ndindex(3, 4):
        block = fine[:, :, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        block = block.permute(0, 2, 3, 4, 1).flatten(2)
        change = coarse[..., row, column].transpose(1, 2).diff(dim=1)
        pairs.append((change, block[:, :-1], block.diff(dim=1)))
    change, block, wanted = (torch.cat(part).flatten(0, 1) for part in zip(*pairs))
    random = torch.Generator().manual_seed(0)
    repeats = 40
    noise = NOISE * torch.randn(repeats, *block.shape, generator=random, dtype=block.dtype)

    def error(up, stay):
        estimate = change @ up.double().T + (block + noise) @ stay.double().T
        return (estimate - wanted).square().mean()

    least = error(relation.up, relation.stay)
    for _ in range(20):
        moves = (torch.randn(x.shape, generator=random) for x in (relation.up, relation.stay))
        up, stay = (
            x + 0.1 * move for x, move in zip((relation.up, relation.stay), moves, strict=True)
        )
        assert least < error(up, stay)
    assert least < 0.9 * error(relation.up, torch.zeros(NUMBERS, NUMBERS))


def test_noise_stays_white():
    relation = fit_relation(*planted()[:2])
    assert torch.allclose(relation.noise @ relation.noise.T, torch.eye(3), atol=1e-5)
    distance = (relation.noise - relation.down).norm()
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        other, _ = torch.linalg.qr(torch.randn(NUMBERS, 3, generator=random))
        assert distance < (other.T - relation.down).norm()


def test_latents_that_do_not_fit():
    coarse, fine, _, _ = planted()
    message = "fine: expected clips, frames and multiples of rows and columns of coarse latents"
    for wrong in (fine[:1], fine[:, :, 1:], fine[..., 1:], fine[..., 1:, :]):
        with pytest.raises(ValueError, match=message):
            fit_relation(coarse, wrong)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The grown model, and the one on coarse latents with a token per latent pixel."""
    folder = tmp_path_factory.mktemp("coarse")
    save_module(folder / "model.safetensors", world(COARSE, 0))
    save_config(folder, {"model": asdict(COARSE)})
    torch.manual_seed(2)
    relation = LatentRelation(
        torch.randn(3, NUMBERS),
        torch.randn(3),
        torch.randn(NUMBERS, 3),
        torch.randn(NUMBERS, NUMBERS),
    )
    fine, coarse = world(FINE, 1), world(replace(COARSE, patch=1), 1)
    fine.load_grown(folder, relation)
    coarse.load_grown(folder)
    return fine, coarse, relation


def blocks(latents):
    """Numbers of 2 x 3 blocks (B, T, rows, columns, numbers), by slices."""
    parts = [latents[..., row::2, column::3] for row in range(2) for column in range(3)]
    return torch.stack(parts, dim=1).movedim((1, 2), (-2, -1)).flatten(-2)


def test_a_block_is_embedded_as_its_coarse_pixel(grown):
    fine, coarse, relation = grown
    torch.manual_seed(3)
    noise, recycled = torch.randn(2, 2, 2, 3, 4, 6)
    condition = torch.randn(2, 2, 3, 4, 6)
    frames = torch.arange(3)
    given = [
        blocks(noise) @ relation.noise.T,
        blocks(recycled) @ relation.down.T + relation.offset,
        blocks(condition).unflatten(-1, (6, 2)).mean(dim=-2),
    ]
    given = [x.movedim(-1, 1) for x in given]
    expected = coarse.transformer.patchify(*given, frames)
    made = fine.transformer.patchify(noise, recycled, condition, frames)
    assert torch.allclose(made, expected, atol=1e-5)


def test_a_block_changes_as_its_coarse_pixel_tells(grown):
    fine, coarse, relation = grown
    features = torch.randn(5, 16)
    expected = coarse.transformer.video_out(features) @ relation.up.T
    assert torch.allclose(fine.transformer.video_out(features), expected, atol=1e-5)
    kept = {
        name
        for name in fine.state_dict()
        if not any(part in name for part in ("video_in", "video_out", "residual_map"))
    }
    assert kept
    for name in kept:
        assert torch.equal(fine.state_dict()[name], coarse.state_dict()[name]), name


def test_what_stays_of_a_block_is_added_to_its_change(grown):
    """The network's output with the map, in one pass and in steps, and without it."""
    fine, _, relation = grown
    plain = world(replace(FINE, residual_map=False), 1)
    plain.load_state_dict({k: x for k, x in fine.state_dict().items() if "residual_map" not in k})
    torch.manual_seed(4)
    x, recycled, condition = torch.randn(3, 2, 2, 3, 4, 6)
    text, lens = fine.text_encoder(["a", "b"])
    t = torch.ones(2)
    outputs = [model.transformer(x, recycled, condition, text, lens, t) for model in (fine, plain)]
    added = blocks(outputs[0] - outputs[1])
    assert torch.allclose(added, blocks(recycled) @ relation.stay.T, atol=1e-4)
    cache = fine.transformer.new_cache(2, (4, 6), dtype=torch.float32)
    for layer, (k, v) in enumerate(fine.transformer.encode_text(text, lens, t)):
        cache.write_text(layer, k, v, lens)
    for frame in range(3):
        now = (part[:, :, frame : frame + 1] for part in (x, recycled, condition))
        made = fine.transformer.step(*now, t, cache)
        assert torch.allclose(made, outputs[0][:, :, frame : frame + 1], atol=1e-4)


def test_a_model_on_other_latents_needs_the_map(grown, tmp_path):
    _, _, relation = grown
    model = world(replace(FINE, residual_map=False), 1)
    with pytest.raises(
        ValueError, match="residual_map: expected True for a model on other latents"
    ):
        model.load_grown(tmp_path, relation)
    with pytest.raises(ValueError, match="residual_map: expected False without a residual head"):
        replace(FINE, residual_head=False)
