"""Runs that train a light decoder for an existing autoencoder, and the comparison of both."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aapt import Control, StreamingGenerator
from aapt.checkpoint import CheckpointError, load_config, read_tensors, save_config, save_module
from aapt.commands.app import main
from aapt.data.clips import VideoClips
from aapt.data.tiny_world.rendered_clips import sample_clip
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.pixel_clips import video_clips
from aapt.evaluate.decoders import compare_decoders, flicker, ssim
from aapt.lock import FolderInUse, folder_lock
from aapt.runs.light_decoder import STAGE, new_light, run, train_light
from aapt.runs.loop import RunOptions, TrainingError
from aapt.runs.parallel import Parallel
from aapt.training.optimization import Schedule
from aapt.training.perceptual import PerceptualDistance
from aapt.training.recipes import LIGHT_RECIPES, vae_light, wan_light
from aapt.training.stages.light_decoder import light_vae_for
from aapt.vae import lighter, tiny, tiny_light
from aapt.vae.folder import LIGHT, ORIGINAL, load_vae
from aapt.vae.pixels import to_video

from ..data.videos.videos import grey, numbers, video
from ..training.test_light_decoder import SHAPE, original_vae


def small_recipe(**changes):
    recipe = vae_light()
    small = {"steps": 2, "video_frames": 5, "shape": None, "imitation": 1.0, **changes}
    return replace(
        recipe,
        data=replace(recipe.data, height=16, width=16, latent_frames=3, video_clips=2),
        decoder=replace(recipe.decoder, **small),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An autoencoder alone, whose weights bfloat16 would round."""
    path, vae = tmp_path_factory.mktemp("vae"), original_vae()
    save_module(path / "vae.safetensors", vae)
    save_config(path, {"name": "mine", "vae": asdict(vae.config)})
    return path


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    path = tmp_path_factory.mktemp("movies")
    for name, count in (("a.mkv", 30), ("b.mkv", 14), ("c.mkv", 3)):
        (path / name).write_bytes(video(grey(count, 16, 16)))
    (path / "d.mkv").write_bytes(b"no video")
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Features (N, 2): means of an image's halves, zero unless called with LPIPS's arguments."""

    class Halves(nn.Module):
        def forward(self, x, resize_images: bool = True, return_lpips: bool = False):
            if resize_images or not return_lpips:
                x = x * 0
            return x.mean(dim=(1, 3)).unflatten(1, (2, -1)).mean(dim=2)

    path = tmp_path_factory.mktemp("network") / "halves.pt"
    torch.jit.script(Halves()).save(str(path))
    return path


def make(folder, movies, out, recipe=None, **options):
    given = {"vae": folder, "videos": movies, "report": lambda line: None, **options}
    return run(recipe or small_recipe(), out, **given)


def weights(path, part=LIGHT):
    return read_tensors(path / f"{part}.safetensors")


@pytest.fixture(scope="module")
def made(folder, movies, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "light"
    return make(folder, movies, out, options=RunOptions(save_every=1, sample_every=2))


def test_both_decoders_are_exported(made, folder):
    """The original does not change, and the light decoder has its encoder, bit for bit."""
    config = load_config(made)
    assert config["name"] == "mine"
    assert config["vae"] == json.loads(json.dumps(asdict(lighter(SHAPE))))
    given, light = weights(folder), weights(made)
    for name, tensor in weights(made, ORIGINAL).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, given[name]), name
        if not name.startswith("decoder."):
            assert torch.equal(tensor, light[name]), name
    assert load_vae(made).config == lighter(SHAPE)
    assert load_vae(made, ORIGINAL).config == SHAPE


def test_what_training_leaves(made):
    folder = made.parent / STAGE
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1]
    assert {"loss", "psnr", "original_psnr", "flicker", "imitation"} <= set(lines[0])
    assert (folder / "samples-2.png").is_file() and not (folder / "states").exists()


def test_a_finished_run_is_only_exported(made, folder, movies):
    lines = []
    assert make(folder, movies, made.parent, report=lines.append) == made
    assert lines == [f"{STAGE}: already done"]


def test_a_checkpoint_with_a_light_decoder_also_has_its_original(made, movies):
    """A run accepts it instead of the original's folder, even as its own export."""
    before = weights(made)
    assert make(made, movies, made.parent) == made
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made).items())
    assert load_vae(made, ORIGINAL).config == SHAPE


def test_an_interrupted_run_ends_bit_for_bit_where_a_whole_one_does(folder, movies, tmp_path):
    recipe = small_recipe(steps=3)
    options = RunOptions(save_every=1, sample_every=None)
    whole = make(folder, movies, tmp_path / "whole", recipe, options=options)

    def stop(done):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aapt.runs.light_decoder._sampler", lambda *_: stop)
        with pytest.raises(KeyboardInterrupt):
            make(folder, movies, tmp_path / "parts", recipe, options=RunOptions(1, 2))
    assert (tmp_path / "parts" / STAGE / "states").is_dir()
    assert not (tmp_path / "parts" / STAGE / "weights.safetensors").exists()
    parts = make(folder, movies, tmp_path / "parts", recipe, options=options)
    lines = (tmp_path / "parts" / STAGE / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    ours, theirs = weights(parts), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_video_that_changed_is_noticed(folder, movies, tmp_path, monkeypatch):
    """Name and size may be equal. A run with a result does not compare its videos."""
    videos, out = shutil.copytree(movies, tmp_path / "videos"), tmp_path / "run"
    monkeypatch.setattr("aapt.data.videos.pixel_clips.source_digest", lambda path: "names")
    make(folder, videos, out)
    (videos / "a.mkv").write_bytes(video(255 - grey(30, 16, 16)))
    make(folder, videos, out)
    (out / STAGE / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="inputs.json: videos: .* got others; train with changed"):
        make(folder, videos, out)


def test_two_runs_never_share_a_folder(folder, movies, tmp_path):
    with folder_lock(tmp_path), pytest.raises(FolderInUse, match="in use by process"):
        make(folder, movies, tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_bundled_world_keeps_its_model_and_its_latents(tmp_path):
    recipe = small_recipe(steps=1, video_frames=9)
    given = {"workers": 1, "report": lambda line: None}
    made = run(recipe, tmp_path, **given)
    bundled = StreamingGenerator.from_pretrained("tiny-world")
    generator = StreamingGenerator.from_pretrained(made)
    assert load_vae(made, ORIGINAL).config == tiny()
    assert generator.vae.config == lighter(tiny())
    for name, tensor in bundled.model.state_dict().items():
        assert torch.equal(tensor, generator.model.state_dict()[name]), name
    clip = torch.randn(1, 3, 5, 80, 128)
    assert torch.equal(generator.vae.encode(clip), bundled.vae.encode(clip))
    assert weights(made)["decoder.conv_in.weight"].dtype == torch.bfloat16
    stream = generator.open(np.zeros((80, 128, 3), np.uint8), generator.sample_prompt)
    assert stream.step(Control(forward=1.0)).shape == (4, 80, 128, 3)
    assert generator.sample_image().is_file()
    assert run(recipe, tmp_path, vae=made, **given) == made


def test_the_bundled_decoder_starts_from_its_lapped_map(tmp_path):
    """Without updates of its network it decodes as the map in closed form does, which stays."""
    recipe = small_recipe(steps=1, shape=tiny_light(), schedule=Schedule(0.0))
    recipe = replace(recipe, data=replace(recipe.data, height=32, width=32, video_clips=10))
    made = load_vae(run(recipe, tmp_path, workers=1, report=lambda line: None))
    assert made.config == tiny_light()
    fitted = light_vae_for(load_vae("tiny-world", ORIGINAL), tiny_light())
    size = {"latent_frames": 3, "height": 32, "width": 32}
    seeds = range(recipe.data.first_seed, recipe.data.first_seed + 10)
    clips = torch.stack([sample_clip(seed, **size).video for seed in seeds])
    fitted.fit_lapped(to_video(clips).split(1), recipe.decoder.fit_noise)
    latent = fitted.encode(to_video(clips[:1]))
    difference = made.decode(latent) - fitted.decode(latent)
    assert difference.abs().max() < 0.05  # of weights rounded to bfloat16
    error = made.decode(latent) - to_video(clips[:1])
    rounded = made.decoder.lapped.weight - fitted.decoder.lapped.weight
    assert error.abs().mean() < 0.1 and rounded.abs().max() < 0.01


def test_a_lapped_decoder_resumes_bit_for_bit(tmp_path, monkeypatch):
    original = load_vae("tiny-world", ORIGINAL)
    config = replace(vae_light().decoder, steps=3, video_frames=9)
    clips = [sample_clip(seed, latent_frames=3, height=32, width=32).video for seed in range(10)]

    def train(folder, options):
        torch.manual_seed(0)
        networks, data = (original, new_light(config, original)), VideoClips(clips, 10)
        made = train_light(config, networks, data, folder, 0, Parallel.single(), options)
        return made.state_dict()

    whole = train(tmp_path / "whole" / STAGE, RunOptions(save_every=1, sample_every=None))

    def stop(done):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("aapt.runs.light_decoder._sampler", lambda *_: stop)
        train(tmp_path / "parts" / STAGE, RunOptions(save_every=1, sample_every=2))
    parts = train(tmp_path / "parts" / STAGE, RunOptions(save_every=1, sample_every=None))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert len((tmp_path / "parts" / STAGE / "metrics.jsonl").read_text().splitlines()) == 3


def test_wan(movies, tmp_path):
    """A folder with an autoencoder only gives a folder with an autoencoder only."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=8).save_pretrained(tmp_path / "wan")
    recipe = wan_light()
    small = {"steps": 1, "batch": 1, "video_frames": 5, "adversary": None}
    recipe = replace(
        recipe,
        data=replace(recipe.data, height=16, width=16, latent_frames=2, video_clips=2),
        decoder=replace(recipe.decoder, **small),
    )
    made = make(tmp_path / "wan", movies, tmp_path / "out", recipe)
    theirs, light = load_vae(tmp_path / "wan"), load_vae(made)
    assert light.config.decoder_channels == (4, 8, 16, 32)
    clip = torch.randn(1, 3, 5, 16, 16)
    assert torch.equal(light.encode(clip), theirs.encode(clip))
    latent = theirs.encode(clip)
    assert torch.equal(load_vae(made, ORIGINAL).decode(latent), theirs.decode(latent))
    with pytest.raises(ValueError, match="size: expected WIDTHxHEIGHT"):
        compare_decoders(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vae": "nowhere"},
            "nowhere: expected a checkpoint folder or one of sharp-world, tiny-puppet, tiny-world",
        ),
        ({"videos": "nowhere"}, "videos: expected a folder, a .tar or a video, got nowhere"),
        ({"perceptual": "nowhere"}, "perceptual: expected a TorchScript file, got nowhere"),
        ({"recipe": small_recipe(shape=tiny())}, r"encoder_channels: expected \(4, 8, 8\)"),
        (
            {"recipe": small_recipe(shape=replace(SHAPE, latent_channels=16))},
            "latent_channels: expected 4, as the original has, got 16",
        ),
        ({"recipe": small_recipe(video_frames=13)}, "frames: expected at most 9, got 13"),
        ({"parallel": Parallel(world=2)}, "vae-light: expected one rank, got 2"),
    ],
)
def test_bad_input(folder, movies, tmp_path, change, message):
    options = {"vae": folder, "videos": movies, "report": lambda line: None}
    options |= {name: Path(x) if isinstance(x, str) else x for name, x in change.items()}
    recipe = options.pop("recipe", small_recipe())
    with pytest.raises((ValueError, TrainingError), match=message):
        run(recipe, tmp_path / "out", **options)
    assert not (tmp_path / "out" / STAGE / "weights.safetensors").exists()


def test_recipes_for_any_autoencoder_name_none(tmp_path, folder):
    with pytest.raises(ValueError, match="vae: expected the original autoencoder's folder"):
        run(wan_light(), tmp_path)
    with pytest.raises(ValueError, match="videos: expected a folder of videos, got none"):
        run(wan_light(), tmp_path, vae=folder)


def test_weights_that_do_not_fit(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    stored = broken / "vae.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"vae.safetensors: .*expected \d+ bytes"):
        load_vae(broken)
    stored.write_bytes(whole)
    save_config(broken, {"vae": asdict(replace(SHAPE, decoder_channels=(8, 8, 8)))})
    with pytest.raises(CheckpointError, match=r"decoder\S*: expected \(.*\), got \("):
        load_vae(broken)
    save_config(broken, {"name": "nothing"})
    with pytest.raises(CheckpointError, match="broken: expected a checkpoint with an autoencoder"):
        load_vae(broken)
    (broken / "config.json").unlink()
    for of in (load_vae, StreamingGenerator.from_pretrained):
        with pytest.raises(CheckpointError, match="broken: expected a checkpoint folder or one of"):
            of(broken)


def test_a_folder_from_before_lapped_decoders_loads(folder, tmp_path):
    older = shutil.copytree(folder, tmp_path / "older")
    config = load_config(older)
    del config["vae"]["lapped"]
    save_config(older, config)
    assert load_vae(older).config == load_vae(folder).config


def test_another_part_is_refused(folder):
    with pytest.raises(ValueError, match="part: expected vae or original_vae, got original"):
        load_vae(folder, "original")


def test_a_run_is_of_one_autoencoder(made, folder, movies, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    vae = original_vae()
    vae.latent_mean.add_(1)
    save_module(other / "vae.safetensors", vae)
    with pytest.raises(ValueError, match=r"recipe.json: original: expected .*; train another"):
        make(other, movies, made.parent)
    with pytest.raises(ValueError, match="recipe.json: videos: expected None, got"):
        make(folder, None, made.parent)


def test_a_mistyped_path_claims_no_folder(folder, movies, network, tmp_path):
    """Inputs may move to other paths; other inputs of the same name are refused."""
    out, recipe = tmp_path / "run", small_recipe(steps=1)
    for given in ({"movies": tmp_path / "none"}, {"perceptual": tmp_path / "none"}):
        with pytest.raises(ValueError, match="got .*none"):
            make(**{"folder": folder, "movies": movies, "out": out, "recipe": recipe, **given})
        assert not out.exists()
    make(folder, movies, out, recipe, perceptual=network)
    moved = shutil.copytree(movies, tmp_path / "moved")
    shutil.copyfile(network, tmp_path / "halves.pt")
    make(folder, moved, out, recipe, perceptual=tmp_path / "halves.pt")
    (moved / "b.mkv").unlink()
    with pytest.raises(ValueError, match="recipe.json: videos: expected .*; train another recipe"):
        make(folder, moved, out, recipe, perceptual=network)


def test_a_loss_that_is_not_finite_stops(folder, movies, tmp_path):
    recipe = small_recipe(schedule=Schedule(1e30), max_norm=1e38, steps=4)
    with pytest.raises(TrainingError, match=rf"{STAGE}: step \d: .*finite.* inputs are in"):
        make(folder, movies, tmp_path, recipe)
    assert not (tmp_path / STAGE / "weights.safetensors").exists()


def test_clips_of_videos(movies):
    """Each video gives as few clips as possible; c is too short and d is not a video."""
    lines = []
    clips = list(video_clips(movies, Bucket(16, 16), 5, 8, report=lines.append))
    assert [numbers(clip) for clip in clips] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]
    assert clips[0].shape == (5, 16, 16, 3) and clips[0].dtype == torch.uint8
    assert len(lines) == 1 and lines[0].startswith("d.mkv: cannot be decoded")
    one = list(video_clips(movies, Bucket(8, 16), 5, 1, report=lines.append))
    assert len(one) == 1 and one[0].shape == (5, 16, 8, 3)
    with pytest.raises(ValueError, match="videos: expected videos of 31 frames or more at 24 fps"):
        list(video_clips(movies, Bucket(16, 16), 31, 8, report=lines.append))


def test_no_clip_of_a_video_spans_a_gap(tmp_path):
    """Video frames 0 to 6 and 7 to 19, a minute apart; clips of five."""
    times = [1000 * n // 24 + (60_000 if n > 6 else 0) for n in range(20)]
    (tmp_path / "a.mkv").write_bytes(video(grey(20), times=times))
    clips = list(video_clips(tmp_path, Bucket(16, 16), 5, 9))
    assert [numbers(clip) for clip in clips] == [
        [0, 1, 2, 3, 4],
        [7, 8, 9, 10, 11],
        [12, 13, 14, 15, 16],
    ]


def test_perceptual_distance(network):
    """Networks get the range and the arguments of LPIPS files; the mean is over frames."""
    distance = PerceptualDistance(network)
    a, b = torch.full((2, 3, 4, 8, 8), -1.0), torch.full((2, 3, 4, 8, 8), -1.0)
    b[:, :, 0, :4] = 1.0  # one half of one frame of four, by the full range
    a.requires_grad_(True)
    value = distance(a, b)
    assert value.item() == pytest.approx(255**2 / 4)
    value.backward()
    assert a.grad[:, :, 0, :4].all() and not a.grad[:, :, 1:].any()


def test_a_perceptual_network_counts(folder, movies, network, tmp_path):
    recipe = small_recipe(steps=1, perceptual=1e-4)
    make(folder, movies, tmp_path, recipe, perceptual=network)
    line = json.loads((tmp_path / STAGE / "metrics.jsonl").read_text())
    assert line["perceptual"] > 0
    parts = ("reconstruction", "imitation", "seams", "flicker", "perceptual")
    assert line["loss"] == pytest.approx(sum(line[part] for part in parts))


def test_flicker_and_ssim_by_hand():
    truth = torch.full((2, 3, 16, 16, 3), 100, dtype=torch.uint8)
    video = truth + 50
    assert flicker(video, truth) == 0
    video[0, 1] = 101  # 49 down and up again, in one clip of two
    assert flicker(video, truth) == pytest.approx(49 / 255 / 2)
    # SSIM of constant images is its luminance term.
    c1 = (0.01 * 255) ** 2
    equal = (2 * 150 * 100 + c1) / (150**2 + 100**2 + c1)
    dark = (2 * 101 * 100 + c1) / (101**2 + 100**2 + c1)
    assert ssim(video, truth) == pytest.approx((5 * equal + dark) / 6, rel=1e-3)


def test_report(made, movies):
    given = {"videos": movies, "size": Bucket(16, 16), "seconds": 0.2, "steps": 2}
    report = compare_decoders(made, **given, log=lambda line: None)
    assert report["clips"] == 8 and report["frames"] == 5
    both = report["decoders"]
    assert both["light"]["parameters"] < both["original"]["parameters"]
    for decoder in both.values():
        assert decoder.pop("edge_sharpness") is None  # the truth is grey
        assert all(math.isfinite(value) for value in decoder.values())
    assert report["speedup"] > 0 and math.isfinite(report["agreement"])


def test_report_of_one_decoder(folder, made, movies):
    """Its figures are those of the original beside a light decoder; nothing is compared."""
    given = {"videos": movies, "size": Bucket(16, 16), "seconds": 0.2, "steps": 2}
    report = compare_decoders(folder, **given, log=lambda line: None)
    assert list(report["decoders"]) == ["decoder"]
    assert report["agreement"] is None and report["speedup"] is None
    both = compare_decoders(made, **given, log=lambda line: None)["decoders"]
    for name in ("psnr", "ssim", "flicker", "sharpness", "seam", "parameters"):
        assert report["decoders"]["decoder"][name] == both["original"][name], name


def test_commands(folder, movies, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LIGHT_RECIPES, "vae-light", small_recipe)
    out = tmp_path / "run"
    given = ["train", "vae-light", "--vae", str(folder), "--videos", str(movies)]
    assert main([*given, "--out", str(out)]) == 0
    made = capsys.readouterr().out.strip()
    assert made == str(out / "vae-light")
    report = ["eval-vae", made, "--videos", str(movies), "--size", "16x16", "--seconds", "0.2"]
    assert main([*report, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["decoders"]) == {"original", "light"}
    assert main(report) == 0
    assert "SSIM" in capsys.readouterr().out
    assert main(["eval-vae", str(folder), *report[2:]]) == 0
    printed = capsys.readouterr().out
    assert "decoder" in printed and "agreement" not in printed
    for bad, message in (
        (
            ["train", "tiny-world", "--videos", str(movies)],
            "videos: expected none for the recipe tiny-world",
        ),
        (["train", "vae-light", "--plan"], "plan: expected none for the recipe vae-light"),
        (
            ["train", "vae-light", "--stage", "decoder"],
            "stage: expected none for the recipe vae-light",
        ),
        (["train", "wan-light", "--out", str(tmp_path / "wan")], "vae: expected the original"),
        (["eval-vae", str(folder)], "size: expected WIDTHxHEIGHT, got none"),
        ([*report[:-1], "nan"], "seconds: expected a finite number above 0, got nan"),
    ):
        assert main(bad) == 2
        assert message in capsys.readouterr().err
