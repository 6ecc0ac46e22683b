"""Evaluation on encoded clips, for every kind of checkpoint that the clips fit."""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from aapt.checkpoint import load_config, save_config, save_module, write_json
from aapt.commands.app import main
from aapt.data.latent_shards import LatentShards
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.clip_reader import CutConfig
from aapt.data.videos.encode import encode
from aapt.evaluate import Measurement, evaluate
from aapt.evaluate.clip_scenes import ClipScenes
from aapt.evaluate.drift_plot import plot_drift
from aapt.evaluate.measure import MeasuredFrames, measure
from aapt.evaluate.metrics import edge_energy, seam, sharpness
from aapt.evaluate.scenes import roll_out_scenes
from aapt.evaluate.windows import WINDOWS, Window
from aapt.model.conditioning import camera_rays
from aapt.model.config import CameraConfig
from aapt.model.world_model import WorldModel
from aapt.streaming.generator import StreamingGenerator
from aapt.streaming.noise import Noise
from aapt.streaming.student import StudentRollout
from aapt.vae import CausalVAE, tiny
from aapt.vae.folder import LIGHT, ORIGINAL, load_vae, save_vaes
from aapt.vae.pixels import to_pixels

from ..data.test_latent_shards import folder_of
from ..data.videos.test_keypoints import entry, person
from ..data.videos.test_trajectories import trajectory, yawed
from ..data.videos.videos import video
from ..helpers import read_video
from .test_evaluation import MODEL, MeanColour

HEIGHT, WIDTH, LENGTH = 32, 64, 9  # latent frames after the first of a clip
CAMERA = CameraConfig(1.1, 0.5, 0.0, 0.05, 0.025)  # not the world's
CHANNELS = {"camera": CAMERA.channels, "pose": 16, "none": 0}


def autoencoder(seed=0):
    torch.manual_seed(seed)
    return CausalVAE(tiny()).eval()


def save_checkpoint(folder, motion, height=HEIGHT, fps=24, channels=None, seed=0):
    """Save a random generator whose output depends on one kind of motion."""
    camera = CAMERA if motion == "camera" else None
    config = replace(MODEL, condition_channels=CHANNELS[motion] if channels is None else channels)
    torch.manual_seed(seed)
    model = WorldModel(config, camera)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "video_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_module(folder / "model.safetensors", model)
    facts = {"height": height, "width": WIDTH, "fps": fps, "prompts": []}
    parts = {"model": asdict(config), "camera": camera and asdict(camera)}
    save_config(folder, facts | parts | save_vaes(folder, {LIGHT: autoencoder()}))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Make three videos of one clip each, with a caption, camera motion and keypoints."""
    folder = tmp_path_factory.mktemp("videos")
    frames = 1 + 4 * LENGTH
    noise = np.random.default_rng(0).integers(0, 255, (3, frames, 8, 16, 3), dtype=np.uint8)
    for name, pixels in zip("abc", noise.repeat(4, axis=2).repeat(4, axis=3)):
        (folder / f"{name}.mkv").write_bytes(video(pixels))
        (folder / f"{name}.txt").write_text(f"this is {name}")
        cameras = [yawed(0.02 * n, (0.0, 0.0, 0.01 * n)) for n in range(frames)]
        (folder / f"{name}.camera.txt").write_text(trajectory(cameras))
        arms = [entry(person({6: (4 + n, 2), 8: (4 + n, 30)})) for n in range(frames)]
        (folder / f"{name}.keypoints.json").write_text(json.dumps(arms))
    return folder


@pytest.fixture(scope="module")
def encoded(videos, tmp_path_factory):
    """Encode the videos once for each kind of motion."""
    folders = {}
    for motion in CHANNELS:
        folders[motion] = tmp_path_factory.mktemp("latents") / motion
        config = CutConfig(((Bucket(WIDTH, HEIGHT),),), LENGTH, stride=100, motion=motion)
        encode(videos, autoencoder(), folders[motion], config)
    return folders


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {motion: save_checkpoint(folder / motion, motion) for motion in CHANNELS}


def scenes_of(folder, checkpoint, count=2, seed=0):
    generator = StreamingGenerator.from_pretrained(checkpoint)
    return generator, ClipScenes(folder, {checkpoint: generator}, count, seed)


def quiet(checkpoint, out, latents, **settings):
    return evaluate([checkpoint], out, latents=latents, log=lambda _: None, **settings)


def test_whole_clips_are_read_by_their_numbers(tmp_path):
    batch = LatentShards(folder_of(tmp_path, "pose")).whole([4, 0])
    assert batch.latents[:, 2, :, 1, 1].tolist() == [list(range(40, 47)), list(range(7))]
    assert batch.motion[:, 2, :, 1, 1].tolist() == [list(range(41, 47)), list(range(1, 7))]
    assert list(batch.prompts) == ["4", "0"]


def test_starts_are_different_clips_and_do_not_depend_on_their_number(encoded, checkpoints):
    _, three = scenes_of(encoded["none"], checkpoints["none"], count=3)
    assert sorted(three.prompts) == ["this is a", "this is b", "this is c"]
    _, one = scenes_of(encoded["none"], checkpoints["none"], count=1)
    assert one.prompts == three.prompts[:1] and torch.equal(one.latents, three.latents[:1])
    firsts = {scenes_of(encoded["none"], checkpoints["none"], 1, s)[1].prompts[0] for s in range(9)}
    assert len(firsts) > 1


def test_the_truth_is_what_the_autoencoder_makes_of_the_clips(encoded, checkpoints):
    generator, scenes = scenes_of(encoded["none"], checkpoints["none"])
    frames = [0, 3, 4, 31, 36, 47]  # the last is past the end
    with torch.no_grad():
        expected = to_pixels(generator.vae.decode(scenes.latents))[:, frames[:-1]]
    made, statistics = scenes.truth(generator, frames, WINDOWS, nullcontext)
    assert list(made) == ["truth"] and made["truth"].numbers == frames[:-1]
    assert (made["truth"].pixels.int() - expected.int()).abs().max() <= 1
    (first,) = statistics  # no other window is covered
    deviation = scenes.latents[:, :, 1:9].transpose(1, 2).flatten(2).double().std(dim=-1)
    torch.testing.assert_close(first[..., 1].double(), deviation, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("motion", CHANNELS)
def test_a_rollout_repeats_the_motion_of_its_clip(encoded, checkpoints, motion):
    """Compare with the training rollout on the clip's channels, repeated."""
    generator, scenes = scenes_of(encoded[motion], checkpoints[motion])
    steps = LENGTH + 3
    found, statistics, _ = roll_out_scenes(generator, scenes, steps, range(1 + 4 * steps), seed=0)

    model, clips = generator.model, LatentShards(encoded[motion], camera=generator.model.camera)
    motions = clips.whole(scenes.numbers).motion
    condition = motions
    if motion == "camera":
        condition = camera_rays(motions, CAMERA, *generator.latent_size)
    if condition is not None:
        assert condition.abs().max() > 0.1
        condition = torch.cat([condition, condition[:, :, :3]], dim=2)
    first = scenes.latents[:, :, :1]
    rollout = StudentRollout(model.transformer, *model.text_encoder(scenes.prompts), first)
    noises = [Noise(start, first[:1].shape) for start in range(2)]
    noise = [torch.cat([draw(step) for draw in noises]) for step in range(steps)]
    made = torch.cat([first, rollout.roll(torch.cat(noise, dim=2), condition).output], dim=2)
    with torch.no_grad():
        expected = to_pixels(generator.vae.decode(made))
    assert (found.pixels.int() - expected.int()).abs().max() <= 1
    deviation = made.transpose(1, 2).flatten(2).std(dim=-1)
    torch.testing.assert_close(statistics[..., 1], deviation, atol=1e-4, rtol=1e-4)


def test_after_the_clip_its_last_frames_are_the_truth(encoded, checkpoints):
    """Metrics of paired frames exist only within the clip."""
    _, scenes = scenes_of(encoded["none"], checkpoints["none"])
    random = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (2, 32, HEIGHT, WIDTH, 3), generator=random, dtype=torch.uint8)
    dim = torch.cat([real[:, :1], real], dim=1) // 2
    truth, (within, beyond, *_) = MeasuredFrames.of(real, 8), WINDOWS
    found = measure(dim, truth, None, scenes, within)
    error = ((real - dim[:, 1:]).double() ** 2).mean().item()
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / error))
    assert found.palette_error == pytest.approx(0.25, abs=0.01)
    later = measure(dim, truth, None, scenes, beyond)
    ratio = sharpness(dim[:, 1:]) / sharpness(real)
    assert ratio < 0.6 and later.sharpness == found.sharpness == pytest.approx(ratio)
    assert later.feature_distance == found.feature_distance > 0.5
    steepness = edge_energy(dim[:, 1:]) / edge_energy(real)
    assert later.edge_sharpness == found.edge_sharpness == pytest.approx(steepness)
    assert later.seam == seam(dim[:, 1:], 8)
    whole = {"sharpness", "edge_sharpness", "seam", "flicker", "feature_distance"}
    others = {f.name for f in fields(Measurement)} - whole
    assert {name for name in others if getattr(later, name) is not None} == set()


@pytest.mark.parametrize("motion", CHANNELS)
def test_every_kind_of_checkpoint_is_evaluated(encoded, checkpoints, tmp_path, motion):
    report = quiet(checkpoints[motion], tmp_path, encoded[motion], starts=2, seconds=1.5)
    found = report.windows["0-1.3 s"]
    assert list(found) == ["truth", motion]
    assert (found["truth"].sharpness, found["truth"].feature_distance) == (1.0, 0.0)
    assert found[motion].psnr < 40 and found[motion].feature_distance > 0
    assert found[motion].yaw_correlation is None and found[motion].theme_kept is None


def test_a_rollout_longer_than_its_clips(encoded, checkpoints, tmp_path):
    baseline = save_checkpoint(tmp_path / "baseline", "none", seed=1)
    lines, out = [], tmp_path / "out"
    report = evaluate(
        [checkpoints["none"], baseline],
        out,
        latents=encoded["none"],
        starts=3,
        seconds=6.0,
        log=lines.append,
    )
    assert [line.split(":")[0] for line in lines] == [
        "truth",
        "none rollout",
        "baseline rollout",
        "metrics",
    ]
    saved = json.loads((out / "report.json").read_text())
    assert saved == json.loads(report.as_json())
    assert saved["settings"]["latents"] == str(encoded["none"])
    assert saved["truth"].startswith("3 clips of ") and "1.50 s each" in saved["truth"]
    assert saved["probe"] is None and saved["other_theme"] is None
    early, late = saved["windows"]["0-1.3 s"], saved["windows"]["4-6 s"]
    assert set(late["truth"].values()) == {None}
    assert early["none"]["psnr"] > 0 and late["none"]["psnr"] is None
    for name in ("latent_deviation", "sharpness", "feature_distance"):
        assert late["none"][name] > 0 and early["truth"][name] is not None
    assert late["none"] != late["baseline"]
    lines = saved["timelines"]
    assert lines["truth"]["seconds"] == [1] and lines["none"]["seconds"] == [1, 2, 3, 4, 5, 6]
    assert lines["none"]["palette_error"][0] > 0 and set(lines["none"]["palette_error"][1:]) == {
        None
    }
    assert all(value > 0 for value in lines["none"]["sharpness"])

    table = report.table()
    cells = {column.header: list(column.cells) for column in table.columns}
    assert "yaw corr" not in cells and "theme kept" not in cells
    assert cells["source"] == 2 * ["truth", "none", "baseline"]
    assert cells["PSNR dB"][3:] == ["-", "-", "-"] and "-" not in cells["PSNR dB"][1:3]
    assert cells["sharpness"][3] == "-" and "-" not in cells["sharpness"][4:]
    assert "as the autoencoder decodes them" in table.caption
    assert len(plot_drift(report).axes) == 7  # no panel of obedience
    assert Image.open(out / "drift.png").width > 1000

    sheet = np.asarray(Image.open(out / "sheet.png").convert("L"))  # 0, 1 and 5 s, five times
    width, height = 5 * WIDTH, 5 * HEIGHT
    last = sheet[:, -width:-1]
    rows = [last[18 + row * (height + 1) + 4 * (row // 3) :][:height] for row in range(9)]
    assert [row.max() == 0 for row in rows] == 3 * [False, False, True]


def test_clips_of_the_original_autoencoder_fit_a_light_one(encoded, checkpoints, tmp_path):
    folder = save_checkpoint(tmp_path / "light", "none")
    vaes = save_vaes(folder, {LIGHT: autoencoder(1), ORIGINAL: load_vae(encoded["none"])})
    save_config(folder, load_config(folder) | vaes)
    _, scenes = scenes_of(encoded["none"], folder)
    assert scenes.steps == LENGTH
    (folder / "original_vae.safetensors").unlink()
    save_config(folder, {k: v for k, v in load_config(folder).items() if k != ORIGINAL})
    with pytest.raises(
        ValueError, match=r"expected latents of the autoencoder of .*light \(\w{8}\)"
    ):
        scenes_of(encoded["none"], folder)


@pytest.mark.parametrize(
    ("model", "clips", "message"),
    [
        ({"motion": "camera"}, "none", "expected clips with camera motion for .*, got none"),
        ({"motion": "pose"}, "camera", "expected clips with pose motion for .*, got camera"),
        ({"motion": "none"}, "camera", "expected clips with none or pose motion .*, got camera"),
        ({"motion": "pose", "channels": 4}, "pose", "expected 16 condition channels.* got 4"),
        ({"motion": "none", "height": 64}, "none", "expected clips of 64x64 for .*, got 64x32"),
        ({"motion": "none", "fps": 30}, "none", "expected 30 frames per second, as .* has, got 24"),
    ],
)
def test_clips_that_do_not_fit_are_refused(encoded, tmp_path, model, clips, message):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", **model)
    with pytest.raises(ValueError, match=message):
        quiet(checkpoint, tmp_path / "out", encoded[clips], starts=1, seconds=2.0)
    assert not (tmp_path / "out").exists()


def test_a_model_without_motion_takes_clips_with_skeletons(encoded, checkpoints):
    _, scenes = scenes_of(encoded["pose"], checkpoints["none"])
    assert scenes.condition(StreamingGenerator.from_pretrained(checkpoints["none"]))(1) is None


def test_settings_that_clips_cannot_meet(encoded, checkpoints, tmp_path):
    checkpoint, folder = checkpoints["none"], encoded["none"]
    for changes, message in (
        ({"starts": 4}, "starts: expected 1 to 3, the clips of 64x32 in .*none, got 4"),
        ({"starts": 0}, "starts: expected 1 to 3"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"latents": tmp_path}, "expected a folder of encoded clips with index.json"),
    ):
        given = {"latents": folder, "starts": 1, "seconds": 2.0, **changes}
        with pytest.raises(ValueError, match=message):
            quiet(checkpoint, tmp_path / "out", **given)


def test_clips_that_end_before_the_first_window(videos, checkpoints, tmp_path):
    config = CutConfig(((Bucket(WIDTH, HEIGHT),),), 7, stride=100)
    encode(videos, autoencoder(), tmp_path / "short", config)
    with pytest.raises(ValueError, match="short: expected clips of at least 8 latent frames .* 7"):
        scenes_of(tmp_path / "short", checkpoints["none"])
    index = json.loads((tmp_path / "short" / "index.json").read_text())
    index["encoding"]["fps"] = 12
    write_json(tmp_path / "short" / "index.json", index)
    with pytest.raises(ValueError, match="short: expected 24 frames per second, as .* has, got 12"):
        scenes_of(tmp_path / "short", checkpoints["none"])


def test_the_command(encoded, checkpoints, tmp_path, capsys):
    network = tmp_path / "network.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        torch.jit.script(MeanColour()).save(str(network))
    given = ["--starts", 2, "--seconds", 6, "--fid", network, "--out", tmp_path / "out"]
    arguments = ["eval", checkpoints["pose"], "--latents", encoded["pose"], *given]
    assert main([str(part) for part in arguments]) == 0
    said = capsys.readouterr()
    assert "latent std" in said.out and "FID" in said.out and "yaw corr" not in said.out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(sources["pose"]["fid"] > 0 for sources in found["windows"].values())
    arguments[3] = encoded["none"]
    assert main([str(part) for part in arguments]) == 2
    said = capsys.readouterr().err
    assert "expected clips with pose motion for" in said and said.count("\n") == 1
    assert main(["eval", str(checkpoints["pose"]), "--out", str(tmp_path)]) == 2
    assert "measured on encoded clips" in capsys.readouterr().err


def test_videos_of_clips_end_with_the_clip(encoded, checkpoints, tmp_path):
    """The truth has no frames after the clip's end, the rollout has."""
    quiet(checkpoints["none"], tmp_path, encoded["none"], starts=1, seconds=2.0, videos=4)
    paths = [tmp_path / "videos" / f"0-seed-0-{source}.mp4" for source in ("none", "truth")]
    assert sorted((tmp_path / "videos").iterdir()) == paths
    made, truth = map(read_video, paths)
    assert len(made) == 49 and len(truth) == 1 + 4 * 9
    assert (made[0].int() - truth[0].int()).abs().float().mean() < 4  # one frame, twice encoded


def test_cameras_are_the_trajectory_and_start_over_with_it(encoded, checkpoints):
    """Relative to the frame before the window; after the clip's last step comes its first.

    Frames of an mkv have times in whole milliseconds, which moves a pose by up to 2.4e-4.
    """
    _, scenes = scenes_of(encoded["camera"], checkpoints["camera"])
    ways = [yawed(0.02 * n, (0.0, 0.0, 0.01 * n)) for n in range(1 + 4 * LENGTH)]
    whole = scenes.cameras(Window("whole", 1, LENGTH))
    for found in whole:
        torch.testing.assert_close(found, torch.stack(ways), rtol=0, atol=5e-4)
    expected = [torch.eye(4, dtype=torch.float64)]
    for n in [*range(4 * LENGTH - 7, 4 * LENGTH + 1), *range(1, 9)]:
        expected.append(expected[-1] @ torch.linalg.solve(ways[n - 1], ways[n]))
    found = scenes.cameras(Window("over the end", LENGTH - 1, LENGTH + 2))
    torch.testing.assert_close(found[0], torch.stack(expected), rtol=0, atol=5e-4)
    assert scenes_of(encoded["none"], checkpoints["none"])[1].cameras(WINDOWS[0]) is None
