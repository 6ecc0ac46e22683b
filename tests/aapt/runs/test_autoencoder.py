"""Runs that make an autoencoder: what they export, and resuming."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from aapt.checkpoint import CheckpointError, load_config, read_tensors
from aapt.commands.app import main
from aapt.data.clips import VideoClips
from aapt.data.tiny_world.rendered_clips import sample_clip
from aapt.evaluate.decoders import compare_decoders
from aapt.runs.autoencoder import fitted, run
from aapt.runs.light_decoder import STAGE
from aapt.runs.loop import RunOptions
from aapt.runs.parallel import Parallel
from aapt.streaming.generator import StreamingGenerator
from aapt.training.losses import sharpened
from aapt.training.optimization import Schedule
from aapt.training.recipes import VAE_RECIPES, vae_fine
from aapt.vae import tiny_fine
from aapt.vae.folder import load_vae
from aapt.vae.pixels import to_video

CLIPS = 3


def small_recipe(**changes):
    recipe = vae_fine()
    return replace(
        recipe,
        vae=replace(recipe.vae, decoder_channels=(8, 8)),
        data=replace(recipe.data, height=32, width=32, latent_frames=3, video_clips=CLIPS),
        decoder=replace(recipe.decoder, **{"steps": 2, "video_frames": 5, **changes}),
    )


def make(recipe, out, **options):
    return run(recipe, out, **{"workers": 1, "report": lambda line: None, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    options = RunOptions(save_every=1, sample_every=2)
    return make(small_recipe(), tmp_path_factory.mktemp("run"), options=options)


def test_the_cells_of_the_recipe():
    vae = tiny_fine()
    assert (vae.time_factor, vae.space_factor, vae.latent_channels) == (4, 4, 16)


def test_what_a_run_leaves(made):
    """A checkpoint with an autoencoder alone, of the size of its clips."""
    config, vae = load_config(made), load_vae(made)
    assert (config["name"], config["width"], config["height"]) == ("vae-fine", 32, 32)
    assert {"vae", "model"} & set(config) == {"vae"}
    assert vae.encode(torch.zeros(1, 3, 9, 32, 32)).shape == (1, 16, 3, 8, 8)
    assert read_tensors(made / "vae.safetensors")["decoder.conv_in.weight"].dtype == torch.bfloat16
    folder = made.parent / STAGE
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1]
    assert {"psnr", "seams"} < set(lines[0]) and "imitation" not in lines[0]
    assert (folder / "samples-2.png").is_file() and not (folder / "states").exists()
    with pytest.raises(CheckpointError, match="expected a checkpoint with a generator, got an"):
        StreamingGenerator.from_pretrained(made)


def test_latents_are_the_principal_components_of_the_clips(made):
    """The best 16 numbers of a cell have the error of all others, and unit deviation."""
    size = {"latent_frames": 3, "height": 32, "width": 32}
    seeds = range(vae_fine().data.first_seed, vae_fine().data.first_seed + CLIPS)
    videos = to_video(torch.stack([sample_clip(seed, **size).video for seed in seeds]))
    vae = load_vae(made)
    latents = vae.encode(videos).transpose(0, 1).flatten(1)
    assert latents.mean(dim=1).abs().max() < 0.05
    assert (latents.std(dim=1) - 1).abs().max() < 0.05
    first = videos[:, :, :1].expand(-1, -1, 3, -1, -1)
    cells = torch.cat([first, videos], dim=2).unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4)
    rows = cells.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3).double()
    rows = rows - rows.mean(dim=0)
    best = torch.linalg.svdvals(rows)[16:].square().sum()
    z = torch.cat([latents.T.double(), torch.ones(len(rows), 1)], dim=1)
    error = (rows - z @ torch.linalg.lstsq(z, rows).solution).square().sum()
    assert best <= error * (1 + 1e-9) and error < 1.02 * best  # weights are rounded to bfloat16


def test_training_starts_from_the_map_in_closed_form(tmp_path):
    recipe = small_recipe(steps=1, schedule=Schedule(0.0))
    made = load_vae(make(recipe, tmp_path))
    size = {"latent_frames": 3, "height": 32, "width": 32}
    seeds = range(recipe.data.first_seed, recipe.data.first_seed + CLIPS)
    clips = VideoClips((sample_clip(seed, **size).video for seed in seeds), CLIPS)
    vae = fitted(recipe, clips, tmp_path / "again" / "weights.safetensors")
    videos = to_video(clips.videos)
    vae.fit_lapped(
        videos.split(1),
        recipe.decoder.fit_noise,
        partial(sharpened, amount=recipe.decoder.sharpening),
    )
    error = (made.decode(made.encode(videos)) - vae.decode(vae.encode(videos))).abs().mean()
    assert error < 0.01  # of weights rounded to bfloat16
    assert torch.equal(
        fitted(recipe, clips, tmp_path / "again" / "weights.safetensors").linear.encode.weight,
        vae.linear.encode.weight,
    )


def test_an_interrupted_run_ends_bit_for_bit_where_a_whole_one_does(tmp_path):
    recipe, options = small_recipe(steps=3), RunOptions(save_every=1, sample_every=None)
    whole = read_tensors(make(recipe, tmp_path / "whole", options=options) / "vae.safetensors")

    def stop(done):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aapt.runs.light_decoder._sampler", lambda *_: stop)
        with pytest.raises(KeyboardInterrupt):
            make(recipe, tmp_path / "parts", options=RunOptions(1, 2))
    assert (tmp_path / "parts" / STAGE / "states").is_dir()
    lines = []
    made = make(recipe, tmp_path / "parts", options=options, report=lines.append)
    assert len(lines) == 1 and lines[0].endswith("min")
    parts = read_tensors(made / "vae.safetensors")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    again = make(recipe, tmp_path / "parts", report=lines.append)
    assert lines[1] == f"encoder, {STAGE}: already done" and again == made
    assert all(
        torch.equal(x, whole[name]) for name, x in read_tensors(made / "vae.safetensors").items()
    )


def test_a_folder_and_ranks_of_another_run(made):
    with pytest.raises(ValueError, match="decoder.steps: expected 3, got 2; train another recipe"):
        make(small_recipe(steps=3), made.parent)
    with pytest.raises(ValueError, match="vae-fine: expected one rank, got 2"):
        make(small_recipe(), made.parent, parallel=Parallel(world=2))


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(VAE_RECIPES, "vae-fine", small_recipe)
    arguments = ["train", "vae-fine", "--out", str(tmp_path), "--workers", "1"]
    assert main(arguments) == 0
    made = capsys.readouterr().out.strip()
    assert made == str(tmp_path / "vae-fine")
    report = compare_decoders(made, clips=1, seconds=0.2, steps=1)
    assert report["size"] == "32x32" and list(report["decoders"]) == ["decoder"]
    for option, value in (("--stage", "decoder"), ("--vae", "tiny-world")):
        assert main([*arguments, option, value]) == 2
        message = f"{option[2:]}: expected none for the recipe vae-fine, got"
        assert message in capsys.readouterr().err
