"""Runs on encoded clips: from videos to a checkpoint that streams, and inputs that changed."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from aapt import StreamingGenerator
from aapt.checkpoint import (
    CheckpointError,
    file_digest,
    read_tensors,
    save_module,
    write_json,
)
from aapt.commands.app import main
from aapt.data.latent_shards import LatentShards, Mixture
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.clip_reader import CutConfig
from aapt.data.videos.encode import encode
from aapt.lock import folder_lock
from aapt.model.conditioning import camera_rays
from aapt.model.config import CameraConfig, ModelConfig
from aapt.model.world_model import WorldModel
from aapt.runs.inputs import ANY_SET, Inputs
from aapt.runs.loop import RunOptions
from aapt.runs.run import Run, run
from aapt.training.curriculum import Curriculum, Phase, Source
from aapt.training.optimization import Schedule
from aapt.training.recipe import Recipe
from aapt.training.recipes import RECIPES, tiny_world
from aapt.training.stages.adversarial import AdversarialConfig
from aapt.training.stages.diffusion_adaptation import DiffusionConfig
from aapt.vae import CausalVAE, tiny

from ..data.videos.test_trajectories import trajectory, yawed
from ..data.videos.videos import video

MODEL = ModelConfig(
    width=32,
    heads=2,
    head_dim=16,
    depth=3,
    text_width=8,
    text_tokens=12,
    window_frames=2,
    reference_grid=(2, 3),
    rope_axes=(4, 6, 6),
)
RATE = Schedule(1e-3)
SIZES = (Bucket(48, 32), Bucket(96, 64), Bucket(32, 16))


def recipe(**changes) -> Recipe:
    """A recipe like `paper-8b`: encoded latents, no camera, sets named by their size.

    One set serves the last stage only.
    """
    both = (Source("48x32", frames=2), Source("96x64", frames=1))
    curriculum = Curriculum((Phase(1, 2, both[:1]), Phase(1, 2, both)))
    stages = {
        "diffusion": DiffusionConfig(curriculum, RATE),
        "adversarial": AdversarialConfig(
            clips="32x16",
            steps=1,
            batch=2,
            segment_frames=2,
            start="diffusion",
            generator_schedule=RATE,
            discriminator_schedule=RATE,
        ),
    }
    given = {"name": "small", "seed": 0, "model": MODEL, "camera": None, "data": {}}
    return Recipe(**{**given, "stages": stages, **changes})


def vae(seed: int = 0) -> CausalVAE:
    torch.manual_seed(seed)
    return CausalVAE(tiny()).eval()


def encoded(folder, seed: int = 0, weights: int = 0, latent_frames: int = 2):
    """Encode three clips of every size, or one clip of 4 frames after the first."""
    noise = np.random.default_rng(seed).integers(0, 255, (27, 64, 96, 3), dtype=np.uint8)
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for name, frames in (("a", noise[:18]), ("b", noise[18:])):
        (videos / f"{name}.mkv").write_bytes(video(frames))
        (videos / f"{name}.txt").write_text(f"this is {name}")
    encode(videos, vae(weights), folder / "latents", CutConfig((SIZES,), latent_frames, stride=9))
    return folder / "latents"


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("data"))


def train(out, latents, weights=None, options=None, stages=None, made=None):
    folders = latents if isinstance(latents, dict) else {ANY_SET: [latents]}
    inputs = Inputs(folders, weights)
    quiet = {"report": lambda line: None, "options": options}
    return run(made or recipe(), out, stages, inputs=inputs, **quiet)


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aapt.runs.run.SHEET_SECONDS", (0, 1))
        return train(out, latents, options=RunOptions(sample_every=1))


def test_one_call_makes_every_set(latents):
    index = json.loads((latents / "index.json").read_text())
    assert {name: bucket["clips"] for name, bucket in index["buckets"].items()} == {
        "32x16": 3,
        "48x32": 3,
        "96x64": 3,
    }
    (line, _) = (latents / "videos.jsonl").read_text().splitlines()
    assert json.loads(line)["clips"] == {str(size): [0, 2] for size in sorted(SIZES)}


def test_captions_that_are_cut_are_counted_once(tmp_path):
    """MODEL reads 11 bytes. The caption of two clips has 9; that of the third gets more."""
    latents = encoded(tmp_path)
    (tmp_path / "videos" / "b.txt").write_text("this is B, é")
    encode(tmp_path / "videos", vae(), tmp_path / "again", CutConfig((SIZES,), 2, stride=9))
    again, lines = Inputs({ANY_SET: [tmp_path / "again"]}), []
    for _ in range(2):
        run(recipe(), tmp_path / "out", ["diffusion"], inputs=again, report=lines.append)
    assert [line for line in lines if "caption" in line] == [
        "48x32: 1 of 3 clips have captions cut at 11 bytes",
        "96x64: 1 of 3 clips have captions cut at 11 bytes",
    ]
    whole = Run(recipe(), tmp_path, inputs=Inputs({ANY_SET: [latents]}))
    assert whole.cut_captions(["diffusion", "adversarial"]) == []
    both = Inputs({"48x32": [latents, tmp_path / "again"]})
    assert [both.long_captions("48x32", limit) for limit in (8, 9, 13)] == [(6, 6), (1, 6), (0, 6)]
    index = json.loads((latents / "index.json").read_text())
    for bucket in index["buckets"].values():  # as in older folders
        del bucket["caption_bytes"]
    write_json(latents / "index.json", index)
    assert both.long_captions("48x32", 8) == (1 + 2, 6)


def test_the_checkpoint_streams_from_its_prompt_alone(trained):
    generator = StreamingGenerator.from_pretrained(trained)
    assert (generator.height, generator.width) == (32, 48) and generator.driven_by == "prompt"
    picture = np.asarray(Image.open(generator.sample_image()))
    assert generator.sample_prompt.startswith("this is ")
    stream = generator.open(picture, generator.sample_prompt)
    assert stream.step().shape == (4, 32, 48, 3) and stream.steps == 1
    with pytest.raises(ValueError, match="control: expected None, the prompt alone drives"):
        stream.step(torch.zeros(1))
    for stage in ("diffusion", "adversarial"):
        assert (trained.parent / stage / "samples-1.png").is_file()


def test_the_checkpoint_has_the_autoencoder_of_its_latents(trained):
    """Bit for bit: bfloat16 would round this one."""
    kept = read_tensors(trained / "vae.safetensors")
    for name, tensor in vae().state_dict().items():
        assert kept[name].dtype == torch.float32 and torch.equal(kept[name], tensor), name


def test_the_checkpoint_is_played_by_the_command(trained, tmp_path, capsys):
    given = ["generate", "--model", str(trained), "--seconds", "0.3", "--out"]
    assert main([*given, str(tmp_path / "f")]) == 0
    assert len(list((tmp_path / "f").glob("*.png"))) == 9
    capsys.readouterr()
    assert main([*given, str(tmp_path / "g"), "--controls", "walk"]) == 2
    assert "controls: expected none for a model without camera" in capsys.readouterr().err
    assert main(["eval", str(trained), "--out", str(tmp_path / "e")]) == 2
    assert "expected a model with a camera" in capsys.readouterr().err
    assert main(["bench", "stream", "--model", str(trained), "--steps", "1"]) == 0


def test_a_model_that_skeletons_drive(latents, tmp_path):
    posed = recipe(model=dataclasses.replace(MODEL, condition_channels=16))
    with pytest.raises(ValueError, match="expected clips with pose motion, got none"):
        train(tmp_path / "run", latents, made=posed)
    generator = StreamingGenerator(WorldModel(posed.model, None), vae(), height=32, width=48)
    drawn = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    channels = generator.encode(drawn)
    with torch.no_grad():
        expected = vae().encode(torch.from_numpy(drawn).permute(3, 0, 1, 2)[None] / 127.5 - 1)
    torch.testing.assert_close(channels, expected[0])
    stream = generator.open(drawn[0], "a")
    for step in (1, 2):
        assert stream.step(channels[:, step]).shape == (4, 32, 48, 3)
    assert stream.step(generator.still()).shape == (4, 32, 48, 3)
    with pytest.raises(ValueError, match=r"control: expected condition channels \(16, 4, 6\), got"):
        stream.step(channels)
    with pytest.raises(ValueError, match="control: expected condition channels .*, got None"):
        stream.step()


def test_inputs_are_recorded(trained, latents):
    kept = json.loads((trained.parent / "inputs.json").read_text())
    assert kept["weights"] is None
    assert set(kept["latents"]) == {"48x32", "96x64", "32x16"}
    (part,) = kept["latents"]["96x64"]
    assert part["folder"] == str(latents) and part["bucket"] == "96x64"


def test_a_run_keeps_its_inputs(latents, tmp_path):
    """Other inputs are refused while a stage needs them; unchanged inputs may move."""
    out, weights = tmp_path / "run", tmp_path / "start.safetensors"
    torch.manual_seed(0)
    save_module(weights, WorldModel(MODEL, None))
    other = encoded(tmp_path / "other", seed=1)
    train(out, latents, weights, stages=["diffusion"])
    (out / "diffusion" / "weights.safetensors").rename(tmp_path / "made")
    with pytest.raises(ValueError, match=r"inputs.json: weights: expected .*start.* got none"):
        train(out, latents)
    with pytest.raises(ValueError, match=r"latents 48x32: expected .*latents \(.*, got .*other"):
        train(out, other, weights)
    (tmp_path / "made").rename(out / "diffusion" / "weights.safetensors")
    moved = shutil.copytree(latents, tmp_path / "moved")
    train(out, {"32x16": [moved]}, stages=["adversarial"])  # no stage needs the other sets now
    kept = json.loads((out / "inputs.json").read_text())
    assert kept["weights"]["file"] == str(weights) and len(kept["latents"]) == 3


def test_a_finished_run_needs_no_inputs(trained, latents):
    """It needs them if its checkpoint is older than a result, or not whole."""
    out, config = trained.parent, trained / "config.json"
    assert train(out, {}) == trained
    os.utime(config, (0, 0))
    with pytest.raises(ValueError, match="latents: expected the folder with clips of 32x16"):
        train(out, {})
    config.unlink()
    with pytest.raises(ValueError, match="latents: expected the folder with clips of 32x16"):
        train(out, {})
    assert train(out, latents) == trained and config.is_file()


def test_sets_in_several_folders(latents, tmp_path):
    other = encoded(tmp_path, seed=1)
    inputs = Inputs({ANY_SET: [latents, other], "96x64": [other]})
    mixture = inputs.clips("48x32", None)
    assert isinstance(mixture, Mixture) and list(map(len, mixture.parts)) == [3, 3]
    assert isinstance(inputs.clips("96x64", None), LatentShards)
    with pytest.raises(ValueError, match="latents: expected the folder with clips of 64x64, got "):
        inputs.clips("64x64", None)
    with pytest.raises(
        ValueError, match="latents: expected a bucket 64x64, or a single bucket, in .*, "
    ):
        Inputs({"64x64": [latents]}).clips("64x64", None)


def test_a_set_of_short_clips_and_long_ones(latents, tmp_path):
    """Long clips suffice for the longest windows; without long clips an error names the set."""
    curriculum = Curriculum((Phase(4, 2, (Source("48x32", frames=4, shortest=2),)),))
    made = recipe(stages={"diffusion": DiffusionConfig(curriculum, RATE)})
    with pytest.raises(
        ValueError, match="48x32: expected clips of 4 latent .* stage diffusion, got at most 2"
    ):
        train(tmp_path / "run", {"48x32": [latents]}, made=made)
    assert not (tmp_path / "run").exists()
    longer = encoded(tmp_path, seed=1, latent_frames=4)
    checkpoint = train(tmp_path / "run", {"48x32": [latents, longer]}, made=made)
    assert StreamingGenerator.from_pretrained(checkpoint).sampling is not None
    lines = (tmp_path / "run" / "diffusion" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_latents_of_two_autoencoders_never_mix(latents, tmp_path):
    other = encoded(tmp_path, weights=1)
    with pytest.raises(ValueError, match="48x32: expected latents of one autoencoder, got 2"):
        train(tmp_path / "run", {"48x32": [latents, other], ANY_SET: [latents]})
    with pytest.raises(ValueError, match="latents: expected those of one autoencoder for 48x32, "):
        train(tmp_path / "run", {"48x32": [other], ANY_SET: [latents]})
    assert not (tmp_path / "run").exists()


def test_latents_that_no_stage_asks_for(latents, tmp_path):
    for given, got in (({"64x64": [latents]}, "64x64"), ({ANY_SET: [latents], "a": []}, "a")):
        message = f"latents: expected clips of 32x16, 48x32, 96x64, which .*, got {got}"
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", given)
    with pytest.raises(ValueError, match="expected clips of no set, which tiny-world .* a folder"):
        train(tmp_path / "run", latents, made=tiny_world())


def test_a_stage_without_the_one_before(latents, tmp_path):
    with pytest.raises(ValueError, match="adversarial: expected the result of diffusion in .*/run"):
        train(tmp_path / "run", latents, stages=["adversarial"])
    assert not (tmp_path / "run").exists()


def test_a_stage_starts_from_the_last_weights_and_the_average_is_exported(latents, tmp_path):
    """An extension that does not learn hands on the raw weights of the stage before."""
    stages = dict(recipe().stages)
    stages["adversarial"] = dataclasses.replace(
        stages["adversarial"], average=0.5, discriminator_start=None
    )
    still = {"generator_schedule": Schedule(0.0), "discriminator_schedule": Schedule(0.0)}
    extension = dataclasses.replace(
        stages["adversarial"], start="adversarial", discriminator_start="adversarial", **still
    )
    made = recipe(raw_starts=True, stages={**stages, "extension": extension})
    folder, out = train(tmp_path / "run", latents, made=made), tmp_path / "run"
    start = read_tensors(out / "diffusion" / "weights.safetensors")
    assert not (out / "diffusion" / "raw.safetensors").exists()  # it has no average
    raw, average = (
        read_tensors(out / "adversarial" / f"{name}.safetensors") for name in ("raw", "weights")
    )
    moved = "transformer.video_in.weight"
    assert not torch.equal(raw[moved], average[moved])
    torch.testing.assert_close(average[moved], (start[moved] + raw[moved]) / 2)
    for name in ("raw", "weights"):
        handed_on = read_tensors(out / "extension" / f"{name}.safetensors")
        torch.testing.assert_close(handed_on[moved], raw[moved])
    exported = read_tensors(folder / "model.safetensors")[moved]
    assert torch.equal(exported, raw[moved].bfloat16())
    (out / "adversarial" / "raw.safetensors").unlink()
    (out / "extension" / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="stage extension: expected the result of adversarial in"):
        train(out, latents, stages=["extension"], made=made)
    averaged = dataclasses.replace(made, raw_starts=False)
    train(tmp_path / "other", latents, made=averaged)
    handed_on = read_tensors(tmp_path / "other" / "extension" / "weights.safetensors")
    torch.testing.assert_close(handed_on[moved], average[moved])


def test_a_stage_starts_between_two_others(latents, tmp_path):
    """A stage without updates hands on the weighted mean of two stages' weights."""
    stages = dict(recipe().stages)
    mean = dataclasses.replace(
        stages["adversarial"],
        steps=0,
        discriminator_warmup=0,
        start="adversarial",
        discriminator_start="adversarial",
        mixed_with="diffusion",
        mixed_share=0.25,
    )
    made, out = recipe(stages={**stages, "mean": mean}), tmp_path / "run"
    train(out, latents, made=made)
    first, second, handed_on = (
        read_tensors(out / stage / "weights.safetensors")
        for stage in ("diffusion", "adversarial", "mean")
    )
    assert not torch.equal(
        first["transformer.video_in.weight"], second["transformer.video_in.weight"]
    )
    for name, weight in handed_on.items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * second[name])
    (out / "diffusion" / "weights.safetensors").unlink()
    (out / "mean" / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="stage mean: expected the result of diffusion in"):
        train(out, latents, stages=["mean"], made=made)


def test_a_model_with_conditions_starts_from_one_without(tmp_path):
    """Conditions of zero make it compute what the other model computes (docs/method.md#10)."""
    torch.manual_seed(0)
    before = WorldModel(MODEL, None)
    for parameter in before.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_module(tmp_path / "before.safetensors", before)
    posed = WorldModel(dataclasses.replace(MODEL, condition_channels=16), None)
    posed.load_start(tmp_path / "before.safetensors")
    x, recycled, condition = torch.randn(3, 1, 16, 2, 4, 6)
    words, time = posed.text_encoder(["ab"]), torch.ones(1)
    expected = before.transformer(x, recycled, None, *words, time)
    made = posed.transformer(x, recycled, torch.zeros_like(condition), *words, time)
    torch.testing.assert_close(made, expected)
    assert not torch.allclose(posed.transformer(x, recycled, condition, *words, time), expected)
    with pytest.raises(CheckpointError, match=r"video_in.weight: expected \(32, 128\), got"):
        save_module(tmp_path / "posed.safetensors", posed)
        before.load_start(tmp_path / "posed.safetensors")


def test_weights_that_are_not_there(latents, tmp_path):
    with pytest.raises(CheckpointError, match="none.safetensors: cannot be read: No such file"):
        train(tmp_path / "run", latents, tmp_path / "none.safetensors")


def test_the_command_from_videos_to_a_checkpoint(latents, tmp_path, monkeypatch, capsys):
    """The commands of docs/data.md, on small videos, with an autoencoder that stands alone."""
    monkeypatch.setitem(RECIPES, "small", recipe)
    out = tmp_path / "latents"
    given = ["encode", str(latents.parent / "videos"), "--model", str(latents), "--out", str(out)]
    assert main(given) == 2
    assert "bucket: expected one or more, got none; " in capsys.readouterr().err
    given += ["--seconds", str(8 / 24), "--bucket", "+".join(map(str, SIZES))]
    assert main(given) == 0
    assert (out / "index.json").read_bytes() != b"" and (out / "vae.safetensors").is_file()
    capsys.readouterr()
    run = tmp_path / "run"
    assert main(["train", "small", "--latents", str(out), "--out", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "small")
    assert StreamingGenerator.from_pretrained(run / "small").driven_by == "prompt"


def test_clips_of_another_rate(latents, tmp_path):
    """The frames of a second, and the checkpoint's, are those of --fps."""
    out, videos = tmp_path / "latents", str(latents.parent / "videos")
    given = ["encode", videos, "--model", str(latents), "--bucket", "48x32+96x64+32x16"]
    assert main([*given, "--fps", "12", "--seconds", str(8 / 12), "--out", str(out)]) == 0
    encoding = json.loads((out / "index.json").read_text())["encoding"]
    assert (encoding["fps"], encoding["latent_frames"]) == (12, 2)
    options = RunOptions(sample_every=None)
    assert StreamingGenerator.from_pretrained(train(tmp_path, out, options=options)).fps == 12


def exploring(**changes) -> Recipe:
    """A recipe like stage 1 of `paper-8b-camera`."""
    camera = CameraConfig(1.0, 0.02, 1.0, 1.0, 1.0)
    model = dataclasses.replace(MODEL, condition_channels=camera.channels)
    stages = {"diffusion": recipe().stages["diffusion"]}
    return recipe(model=model, camera=camera, stages=stages, scaled_camera=True, **changes)


@pytest.fixture(scope="module")
def travels(tmp_path_factory):
    """Two clips at two sizes that walk and turn, one of them more."""
    folder = tmp_path_factory.mktemp("travels")
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)
    (folder / "v").mkdir()
    for name, pace in (("a", 1), ("b", 3)):
        (folder / "v" / f"{name}.mkv").write_bytes(video(noise))
        (folder / "v" / f"{name}.txt").write_text(name)
        cameras = [yawed(0.004 * pace * n, (0.0, 0.0, 0.02 * pace * n)) for n in range(9)]
        (folder / "v" / f"{name}.camera.txt").write_text(trajectory(cameras))
    config = CutConfig((SIZES[:2],), 2, stride=9, motion="camera")
    encode(folder / "v", vae(), folder / "latents", config)
    return folder / "latents"


def test_rays_are_scaled_to_the_clips(travels, tmp_path):
    """Rays of all clips have unit deviation through the checkpoint's camera."""
    options = RunOptions(sample_every=None)
    folder = train(tmp_path / "run", travels, made=exploring(), options=options)
    camera = StreamingGenerator.from_pretrained(folder).model.camera
    assert camera.forward_step == 2 * camera.origin_deviation != 0
    rays = []
    for bucket in ("48x32", "96x64"):
        shards = LatentShards(travels, bucket, camera)
        for clip in range(len(shards)):
            motion = shards._window(clip, 0, 2, 0.0)[1]
            width, height = (int(side) // 8 for side in bucket.split("x"))
            channels = camera_rays(motion[None], camera, height, width)[0]
            rays.append(channels.unflatten(0, (4, 2, 3)).square().mean(dim=(0, 2, 3, 4, 5)))
    torch.testing.assert_close(torch.stack(rays).mean(dim=0), torch.ones(2), atol=0.01, rtol=0)
    # A recorded camera holds, with the clips or without them.
    assert train(tmp_path / "run", {}, made=exploring(), options=options) == folder


def test_rays_of_clips_that_cannot_scale_them(latents, travels, tmp_path):
    with pytest.raises(ValueError, match="latents: expected clips with camera motion, got none"):
        train(tmp_path / "run", latents, made=exploring())
    index = json.loads((travels / "index.json").read_text())
    for bucket in index["buckets"].values():
        for shard in bucket["shards"]:
            shard["ray_squares"] = [0.01, 0.0]
    (tmp_path / "still").mkdir()
    (tmp_path / "still" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a camera that moves and turns"):
        train(tmp_path / "run", tmp_path / "still", made=exploring())
    assert not (tmp_path / "run").exists()


@pytest.fixture
def begun(latents, tmp_path):
    """A run whose first stage has no result yet: its folder, latents and weights."""
    weights, moved = tmp_path / "start.safetensors", tmp_path / "latents"
    save_module(weights, WorldModel(MODEL, None))
    shutil.copytree(latents, moved)
    train(tmp_path / "run", moved, weights, stages=["diffusion"])
    (tmp_path / "run" / "diffusion" / "weights.safetensors").unlink()
    return tmp_path / "run", moved, weights


def change(path) -> None:
    """Change a byte of a file and, on file systems with coarse times as well, its time."""
    data, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time + 1, time + 1))


def test_a_shard_that_changed_is_noticed(begun):
    """Its size did not change, and neither did the index."""
    out, latents, weights = begun
    shard = latents / "48x32" / "00000.safetensors"
    change(shard)
    with pytest.raises(
        ValueError, match="48x32/00000.safetensors: expected the bytes .* got others; encode again"
    ):
        train(out, latents, weights)
    assert not (out / "diffusion" / "weights.safetensors").exists()


def test_a_shard_with_another_time_is_the_same_shard(begun, monkeypatch):
    """Its bytes are compared once, and not again in the next run."""
    out, latents, weights = begun
    os.utime(latents / "48x32" / "00000.safetensors", (0, 0))
    compared = []

    def record(path):
        compared.append(path.name)
        return file_digest(path)

    monkeypatch.setattr("aapt.runs.inputs.file_digest", record)
    for _ in range(2):
        train(out, latents, weights, stages=["diffusion"])
        (out / "diffusion" / "weights.safetensors").unlink()
    assert compared == ["00000.safetensors"]


def test_weights_that_changed_are_noticed(begun):
    out, latents, weights = begun
    change(weights)
    with pytest.raises(ValueError, match=r"weights: expected .* as before, got .*; train in ano"):
        train(out, latents, weights)


def test_a_record_of_an_older_version_is_completed(begun):
    """An older record holds digests only."""
    out, latents, weights = begun
    record = json.loads((out / "inputs.json").read_text())
    for parts in record["latents"].values():
        for part in parts:
            del part["stamp"]
    whole = dict(record["weights"])
    del record["weights"]["bytes"], record["weights"]["modified_ns"]
    write_json(out / "inputs.json", record)
    train(out, latents, weights, stages=["diffusion"])
    record = json.loads((out / "inputs.json").read_text())
    assert record["weights"] == whole and all("stamp" in p[0] for p in record["latents"].values())


def test_a_second_run_in_the_folder_is_refused_at_once(trained, latents, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "small", recipe)
    out = trained.parent
    before = sorted(out.rglob("*"))
    with folder_lock(out):
        given = ["train", "small", "--latents", str(latents), "--out", str(out)]
        assert main(given) == 2
    said = capsys.readouterr()
    expected = f"aapt: {out}: expected a folder in use by no other run, got one in use by process"
    assert said.out == "" and said.err.startswith(expected) and said.err.count("\n") == 1
    assert sorted(out.rglob("*")) == before
